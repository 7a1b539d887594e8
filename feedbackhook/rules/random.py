"""Rules whose V is random and independent of W."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import Redraw, check_choice, check_number
from feedbackhook.rules.registry import register_rule


@register_rule("random")
@dataclass(frozen=True)
class Random:
    """V normal with mean 0, independent of W: feedback alignment (Lillicrap et al. 2016).

    Args:
        std: standard deviation. None is 1/sqrt(3 fan_in), that of PyTorch's initial weights.
        redraw: whether V is drawn once ("never") or again after each optimizer step on W ("update").
    """

    std: float | None = None
    redraw: Redraw = "never"

    def __post_init__(self) -> None:
        if self.std is not None:
            check_number("std", self.std, 0)
        check_choice("redraw", self.redraw, Redraw)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw V."""
        std = 1 / math.sqrt(3 * rng.layer.fan_in) if self.std is None else self.std
        return {"V": rng.normal(weight).mul_(std).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the V that was drawn."""
        return parts["V"]

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees."""
        return 90.0
