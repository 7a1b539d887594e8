"""Rules that mix W with a random direction: the angle between V and W is an option.

V has the Frobenius norm of W, so that the direction alone changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import Redraw, check_choice, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import constant, norm_of, wide, with_norm_of


@register_rule("angle")
@dataclass(frozen=True)
class Angle:
    """V at an exact angle to the current W, with the norm of W: V = cos(a) W + sin(a) norm(W) D.

    D is the unit vector along what is orthogonal to W of a normal random tensor R. For an all-zero W, V = 0.

    Args:
        degrees: the angle a between V and W, flattened, from 0 to 180 degrees.
        redraw: whether R is drawn once ("never") or again after each optimizer step ("update"). Even if R is
            fixed, D follows W, and the angle stays exact.
    """

    degrees: float = 45.0
    redraw: Redraw = "never"

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees, 0, 180)
        check_choice("redraw", self.redraw, Redraw)

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Check that there are directions orthogonal to each weight.

        Raises:
            ValueError: a weight has a single entry, and the angle is neither 0 nor 180 degrees.
        """
        single = [layer.name for layer in layers if math.prod(layer.shape) == 1]
        if single and self.degrees not in (0, 180):
            raise ValueError(
                f"no V is at {self.degrees:g} degrees to the weight of {', '.join(map(repr, single))}, which "
                f"has a single entry; pass exclude={single}"
            )

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw R."""
        radians = math.radians(self.degrees)
        return {
            "R": rng.normal(weight).to(weight.dtype),
            "cos": constant(math.cos(radians), weight),
            "sin": constant(math.sin(radians), weight),
        }

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W."""
        w, r = wide(weight), wide(parts["R"])
        norm = norm_of(w)
        divisor = torch.where(norm > 0, norm, 1)
        along = _dot(r, w) / divisor / divisor
        across = torch.addcmul(r, w, -along)
        left = _dot(across, w) / divisor / divisor  # what rounding has left along W
        length = norm_of(across)
        step = torch.where(length > 0, parts["sin"] * norm / length, 0)
        return torch.addcmul(across * step, w, parts["cos"] - step * left).to(weight.dtype)

    def expected_angle(self, weight: Tensor) -> float:
        """Return `degrees`, or NaN if W is all zero."""
        return float(self.degrees) if bool(weight.any()) else math.nan


@register_rule("noise")
@dataclass(frozen=True)
class Noise:
    """V = scale (W + level rms(W) E), with E normal and rms(W) the root mean square of the current W.

    Args:
        level: standard deviation of the noise as a multiple of rms(W). The angle between V and W is about
            arctan(level).
        redraw: whether E is drawn once ("never") or again after each optimizer step on W ("update").
        scale: "norm" gives V the norm of W; None is 1.
    """

    level: float = 1.0
    redraw: Redraw = "never"
    scale: Literal["norm"] | None = "norm"

    def __post_init__(self) -> None:
        check_number("level", self.level, 0)
        check_choice("redraw", self.redraw, Redraw)
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["norm"])

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw E."""
        each = self.level / math.sqrt(max(1, weight.numel()))
        return {"E": rng.normal(weight).to(weight.dtype), "level": constant(each, weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W."""
        w = wide(weight)
        v = w + parts["level"] * norm_of(w) * wide(parts["E"])
        return (v if self.scale is None else with_norm_of(w, v)).to(weight.dtype)

    def expected_angle(self, weight: Tensor) -> float:
        """Return arctan(level) in degrees, or NaN if W is all zero."""
        return math.degrees(math.atan(self.level)) if bool(weight.any()) else math.nan


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())
