"""Rules that take the sign of V from W."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import Magnitude, Redraw, Scale, check_choice, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import norm_of


@register_rule("sign")
@dataclass(frozen=True)
class Sign:
    """V = scale * (M o sign(W) o S), with the sign of the current W (after Liao, Leibo and Poggio 2016).

    Args:
        concordance: probability, 0 to 1, that an entry of S is +1, met within 2**-17 (8e-6). The paper's p is
            1 - concordance.
        magnitude: how M is chosen: "random" from U[0, 1] in steps of 2**-16, "uniform" 1, "weight" abs(W).
        redraw: whether M and S are drawn once ("never") or again after each optimizer step on W ("update").
        scale: "norm" gives V the Frobenius norm that W has when V is used (Moskovitz et al. 2018, for
            magnitude "uniform"; an all-zero W has V = 0), "fan_in" divides by the number of weights that
            feed one output unit, None is 1, and a number is used as it is.
    """

    concordance: float = 1.0
    magnitude: Magnitude = "random"
    redraw: Redraw = "never"
    scale: Scale | float | None = "norm"
    _disagreeing: ClassVar[float]

    def __post_init__(self) -> None:
        check_number("concordance", self.concordance, 0, 1)
        check_choice("magnitude", self.magnitude, Magnitude)
        check_choice("redraw", self.redraw, Redraw)
        if isinstance(self.scale, str):
            check_choice("scale", self.scale, Scale)
        elif self.scale is not None:
            check_number("scale", self.scale, 0)
        # Not in `draw`: until PyTorch 2.11, what computes with a float attribute is compiled for each value.
        object.__setattr__(self, "_disagreeing", 1 - self.concordance)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw the product of M and S, unless it is 1 or |W|, and the scale if it depends on the layer."""
        parts: dict[str, Tensor] = {}
        drawn = rng.uniform16(weight, "magnitude") if self.magnitude == "random" else None
        if self._disagreeing > 0:
            side = rng.uniform16(weight, "sign").sub_(self._disagreeing)
            drawn = torch.copysign(torch.ones_like(side) if drawn is None else drawn, side)
        if drawn is not None:
            parts["M o S"] = drawn.to(weight.dtype)
        if self.scale == "fan_in":
            parts["scale"] = torch.tensor(1 / rng.layer.fan_in, dtype=weight.dtype, device=weight.device)
        return parts

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W."""
        # Each step in place: for large weights, most of the time would go into allocating memory.
        v = weight.clone() if self.magnitude == "weight" else torch.sign(weight)
        if "M o S" in parts:
            v.mul_(parts["M o S"])
        if self.scale == "norm":
            norm = norm_of(v)
            v.mul_(torch.where(norm > 0, norm_of(weight) / norm, norm).to(v.dtype))
        elif self.scale is not None:
            v.mul_(parts["scale"] if self.scale == "fan_in" else self.scale)
        return v

    def expected_angle(self, weight: Tensor) -> float:
        """Return the angle between V and W in degrees, from the means over the random parts and over the
        nonzero entries of W; NaN if V is all zero.

        With c the concordance, the cosine is (2c - 1) times E(M) / sqrt(E(M^2)) = sqrt(3)/2 for random
        magnitudes, times mean(|W|) / sqrt(mean(W^2)) unless M is |W|.
        """
        if self.scale == 0:
            return math.nan
        of_magnitudes = math.sqrt(3) / 2 if self.magnitude == "random" else 1.0
        factor = (2 * self.concordance - 1) * of_magnitudes
        if self.magnitude != "weight":
            return angle_of_signs(weight, factor)
        return math.degrees(math.acos(factor)) if bool(weight.any()) else math.nan


def angle_of_signs(weight: Tensor, factor: float = 1.0) -> float:
    """Return the angle in degrees between W and a V with its signs and with magnitudes that do not depend on
    it; NaN if W is all zero.

    Its cosine is `factor` times mean(abs(W)) / sqrt(mean(W^2)), over the nonzero entries of W.
    """
    w = weight.detach().cpu().abs().double()
    w = w[w != 0]
    if not w.numel():
        return math.nan
    cosine = factor * float(w.mean() / w.square().mean().sqrt())
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
