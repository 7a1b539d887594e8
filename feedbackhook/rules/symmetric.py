"""The rule that keeps exact backprop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules.registry import register_rule


@register_rule("symmetric")
@dataclass(frozen=True)
class Symmetric:
    """V = W: exact backprop through the same machinery."""

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw nothing."""
        return {}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return W."""
        return weight

    def expected_angle(self, weight: Tensor) -> float:
        """Return 0 degrees."""
        return 0.0
