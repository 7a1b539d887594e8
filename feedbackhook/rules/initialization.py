"""The distributions that layers are initialized from, and the rule that draws V from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import check_choice
from feedbackhook.rules.registry import register_rule

Initialization = Literal["layer", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]


class Distribution(NamedTuple):
    """A distribution with mean 0.

    Args:
        name: "uniform" or "normal".
        std: its standard deviation.
    """

    name: Literal["uniform", "normal"]
    std: float

    def draw(self, weight: Tensor, rng: CounterRNG) -> Tensor:
        """Return numbers from it, float32, in the shape and on the device of `weight`."""
        if self.name == "normal":
            return rng.normal(weight).mul_(self.std)
        bound = math.sqrt(3) * self.std
        return rng.uniform(weight).mul_(2 * bound).sub_(bound)


def initial_distribution(layer: LayerInfo, init: Initialization = "layer") -> Distribution:
    """Return the distribution that a layer's weight is drawn from.

    With `fan_in` and `fan_out` as `torch.nn.init` counts them (a transposed convolution's `fan_in` is that of
    the convolution it transposes):

    | init | layer kind | distribution |
    |---|---|---|
    | "layer" | linear layers, convolutions, transposed convolutions | U[-b, b], b = 1/sqrt(fan_in) |
    | "layer" | projections of `nn.MultiheadAttention` | U[-b, b], b = sqrt(6/(fan_in + fan_out)) |
    | "layer" | `Conv1D` of transformers | N(0, 0.02^2) |
    | "kaiming_uniform", "kaiming_normal" | all | std = sqrt(2/fan_in), for ReLU (He et al. 2015) |
    | "xavier_uniform", "xavier_normal" | all | std = sqrt(2/(fan_in + fan_out)) (Glorot and Bengio 2010) |

    "layer" is what the constructors of these classes draw from in PyTorch and transformers.

    Raises:
        ValueError: the initialization of layers of this kind is not known.
    """
    taps = math.prod(layer.shape[2:])
    fan_out, fan_in = layer.shape[0] * taps, layer.shape[1] * taps
    if layer.kind == "Conv1D":  # transformers keeps the transposed weight
        fan_out, fan_in = fan_in, fan_out
    if init != "layer":
        scheme, _, name = init.partition("_")
        variance = 2 / fan_in if scheme == "kaiming" else 2 / (fan_in + fan_out)
        return Distribution("normal" if name == "normal" else "uniform", math.sqrt(variance))
    if layer.kind == "Conv1D":
        return Distribution("normal", 0.02)
    if layer.kind == "MultiheadAttention":
        return Distribution("uniform", math.sqrt(2 / (fan_in + fan_out)))
    if layer.kind == "Linear" or layer.kind.startswith("Conv"):
        return Distribution("uniform", 1 / math.sqrt(3 * fan_in))
    raise ValueError(
        f"how a {layer.kind} such as {layer.name!r} is initialized is not known, so V cannot be drawn in the "
        f"same way; exclude it, or give it mode 'random' with a std"
    )


@register_rule("FA")
@dataclass(frozen=True)
class FeedbackAlignment:
    """V drawn once from the distribution that W is initialized from: feedback alignment (Lillicrap et al.
    2016).

    Args:
        init: the distribution. "layer" is that of the layer's class, see `initial_distribution`. Name another
            if the model initializes its weights itself, which no rule can see.
    """

    init: Initialization = "layer"

    def __post_init__(self) -> None:
        check_choice("init", self.init, Initialization)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw V."""
        return {"V": initial_distribution(rng.layer, self.init).draw(weight, rng).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the V that was drawn."""
        return parts["V"]

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees."""
        return 90.0
