"""Rules whose feedback learns from W's own gradient, so that it comes to track W.

G is W's own gradient, as backprop through the layer computes it from the error signal that V has sent. With
the same optimizer for W and for the learned tensors, and the same weight decay, their updates stay in step.
A weight counts as one matrix for each group of a convolution, its first dimension by all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from feedbackhook.core.learning import LearnsFrom, Local
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.initialization import Initialization, initial_distribution
from feedbackhook.rules.options import check_choice
from feedbackhook.rules.registry import register_rule


@register_rule("KP")
@dataclass(frozen=True)
class KolenPollack:
    """V moves along W's own gradient: dV = G (Kolen and Pollack 1994; Akrout et al. 2019).

    With the same optimizer and weight decay for both, W - V shrinks as (1 - lr decay)^t under SGD. Without
    weight decay it never shrinks.

    Args:
        init: the distribution that V is drawn from at the start, see `initial_distribution`.
    """

    init: Initialization = "layer"

    learns_from: ClassVar[LearnsFrom] = "gradient"

    def __post_init__(self) -> None:
        check_choice("init", self.init, Initialization)

    def initial(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw V."""
        return {"V": initial_distribution(rng.layer, self.init).draw(weight, rng)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return V as it has been learned."""
        return parts["V"]

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return G."""
        return {"V": local.weight_gradient}

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees, the angle at the start."""
        return 90.0
