"""The sign-concordant rules of Moskovitz, Litwin-Kumar and Abbott (2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules.initialization import initial_distribution
from feedbackhook.rules.options import Magnitude, Redraw, Scale, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.sign import Sign, angle_of_signs


@register_rule("uSF-SN")
@dataclass(frozen=True)
class StrictNormSign(Sign):
    """uSF with a strict norm: V = sign(W) norm(W) / norm(sign(W)), with Frobenius norms of the current W."""

    concordance: float = field(default=1.0, init=False)
    magnitude: Magnitude = field(default="uniform", init=False)
    redraw: Redraw = field(default="never", init=False)
    scale: Scale | float | None = field(default="norm", init=False)


@register_rule("uSF-init")
@dataclass(frozen=True)
class InitialMagnitudeSign:
    """uSF with initial magnitudes: V = abs(B0) o sign(W), with B0 from N(0, std^2), drawn once, and the sign
    of the current W.

    Args:
        std: standard deviation of B0. None is that of the layer's own initialization (see
            `initial_distribution`).
    """

    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None:
            check_number("std", self.std, 0)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw the magnitudes."""
        std = initial_distribution(rng.layer).std if self.std is None else self.std
        return {"abs(B0)": rng.normal(weight).abs_().mul_(std).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current signs of W."""
        return torch.sign(weight).mul_(parts["abs(B0)"])

    def expected_angle(self, weight: Tensor) -> float:
        """Return the angle between V and W in degrees, from the mean over B0 and over the nonzero entries of
        W: its cosine is sqrt(2/pi) mean(abs(W)) / sqrt(mean(W^2)). NaN if V is all zero."""
        return math.nan if self.std == 0 else angle_of_signs(weight, math.sqrt(2 / math.pi))
