"""Rules whose V is the current W with less information: some of its entries, or a few bits of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import Redraw, check_choice, check_integer, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import constant, norm_of, wide, with_norm_of


@register_rule("sparse")
@dataclass(frozen=True)
class Sparse:
    """V = scale (W o K), with a random mask K of zeros and ones.

    Args:
        share: probability, 0 to 1, that K keeps an entry. The angle between V and W is about
            arccos(sqrt(share)).
        redraw: whether K is drawn once ("never") or again after each optimizer step on W ("update").
        scale: "norm" gives V the norm of the current W (if K keeps nothing of W, V = 0); None is 1.
    """

    share: float = 0.1
    redraw: Redraw = "never"
    scale: Literal["norm"] | None = "norm"

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)
        check_choice("redraw", self.redraw, Redraw)
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["norm"])

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw K, as booleans: a quarter of the memory of a float32 weight."""
        return {"K": rng.uniform(weight) < self.share}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W."""
        v = torch.where(parts["K"], weight, 0)
        return v if self.scale is None else with_norm_of(weight, wide(v)).to(weight.dtype)

    def expected_angle(self, weight: Tensor) -> float:
        """Return arccos(sqrt(share)) in degrees, or NaN if V is all zero."""
        if self.share == 0 or not bool(weight.any()):
            return math.nan
        return math.degrees(math.acos(math.sqrt(self.share)))


@register_rule("quantized")
@dataclass(frozen=True)
class Quantized:
    """V = scale Q(W), the current W rounded to a few bits, with one step for the whole layer.

    With n = 2^(bits - 1) - 1 and m = max(abs(W)), Q(W) = round(n W / m) m / n: a number of values from -m to
    m that includes 0. One bit is the sign: Q(W) = mean(abs(W)) sign(W), the closest multiple of sign(W) to W
    (Rastegari et al. 2016, equation 6, for the whole layer).

    Args:
        bits: number of bits, 1 to 16.
        scale: "norm" gives V the norm of the current W; None is 1.
    """

    bits: int = 4
    scale: Literal["norm"] | None = "norm"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 16)
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["norm"])

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return the number of steps on each side of 0, which nothing is drawn for."""
        return {"n": constant(2 ** (self.bits - 1) - 1, weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W."""
        w, n = wide(weight), parts["n"]
        if self.bits == 1:
            v = torch.sign(w) * w.abs().mean()
        else:
            largest = torch.linalg.vector_norm(w, ord=math.inf)
            # The product first: it is exact for short numbers, so that ties do not depend on the format.
            v = torch.round(w * n / torch.where(largest > 0, largest, 1)) * (largest / n)
        return (v if self.scale is None else with_norm_of(w, v)).to(weight.dtype)

    def expected_angle(self, weight: Tensor) -> float:
        """Return the angle between V and W in degrees, which W determines; NaN if W is all zero."""
        w = weight.detach().cpu().double()
        v = self.feedback(w, {"n": constant(2 ** (self.bits - 1) - 1, w)})
        if not bool(w.any()):
            return math.nan
        cosine = float((v * w).sum() / (norm_of(v) * norm_of(w)))
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
