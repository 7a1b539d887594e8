"""Rules whose feedback learns from W's own gradient, so that it comes to track W.

G is W's own gradient, as backprop through the layer computes it from the error signal that V has sent. With
the same optimizer and the same weight decay for W and for the learned tensors, their updates stay in step.
A weight counts as one matrix for each group of a convolution, its first dimension by all others (m by n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.learning import LearnsFrom, Local, full_precision
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.initialization import Initialization, initial_distribution
from feedbackhook.rules.options import check_choice, check_integer, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import blocks, wide


@dataclass(frozen=True)
class LearnedWeight:
    """A V that is learned entry by entry. Rules that extend it say how.

    Args:
        init: the distribution that V is drawn from at the start, see `initial_distribution`.
    """

    init: Initialization = "layer"

    def __post_init__(self) -> None:
        check_choice("init", self.init, Initialization)

    def initial(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw V."""
        return {"V": initial_distribution(rng.layer, self.init).draw(weight, rng)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return V as it has been learned."""
        return parts["V"]

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees, the angle at the start."""
        return 90.0


@register_rule("KP")
@dataclass(frozen=True)
class KolenPollack(LearnedWeight):
    """V moves along W's own gradient: dV = G (Kolen and Pollack 1994; Akrout et al. 2019).

    With the same optimizer and weight decay for both, W - V shrinks as (1 - lr decay)^t under SGD. Without
    weight decay it never shrinks.
    """

    learns_from: ClassVar[LearnsFrom] = "gradient"

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return G."""
        return {"V": local.weight_gradient}


@register_rule("PFA")
@dataclass(frozen=True)
class ProductFeedback:
    """V = B R, with B fixed and R learned: dR = B^T G (product feedback alignment, Ji-An and Benna 2024).

    The error signal first goes to a population of k = expansion * (number of output channels) units through
    B, and from there to the input through R. With the same weight decay for R and W, R comes to be B^T W, and
    V = B B^T W. B is normal with the variance 1/k, so that B B^T is about the identity.

    Args:
        expansion: k over the number of output channels (of a group).
        std: standard deviation of V's entries at the start. None is that of the layer's own initialization.
    """

    expansion: float = 10.0
    std: float | None = None

    learns_from: ClassVar[LearnsFrom] = "gradient"
    fixed: ClassVar[tuple[str, ...]] = ("expansion",)

    def __post_init__(self) -> None:
        check_number("expansion", self.expansion, 0)
        if self.std is not None:
            check_number("std", self.std, 0)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw B for each group, of shape (groups, out, k), in float32 or better. If the weight has its
        output channels in the second dimension, B is called "B2"."""
        groups, _, out, _ = _by_channels(weight, rng.layer)
        k = self._units(out)
        b = rng.normal(weight.new_empty(groups, out, k), "B").mul_(1 / math.sqrt(k))
        return {_name_of_b(rng.layer): self._mixed(_in_float32(b, weight))}

    def initial(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw R, of shape (groups, k, in * kernel), or (groups, in, k, kernel) if the weight has its output
        channels in the second dimension."""
        groups, inputs, out, taps = _by_channels(weight, rng.layer)
        std = initial_distribution(rng.layer).std if self.std is None else self.std
        k = self._units(out)
        second = _name_of_b(rng.layer) == "B2"
        shape = (groups, inputs, k, taps) if second else (groups, k, inputs * taps)
        return {"R": rng.normal(weight.new_empty(shape), "R").mul_(std)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Multiply B and R."""
        r = wide(parts["R"])
        with full_precision(weight.device):
            if "B" in parts:
                v = parts["B"].to(r.dtype) @ r
            else:
                v = torch.einsum("gikt,gok->giot", r, parts["B2"].to(r.dtype))
        return v.reshape(weight.shape).to(weight.dtype)

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return B^T G."""
        r, g = parts["R"], local.weight_gradient
        if "B" in parts:
            return {"R": parts["B"].to(r.dtype).mT @ blocks(g, len(r))}
        groups, inputs, _, taps = r.shape
        return {
            "R": torch.einsum("giot,gok->gikt", g.reshape(groups, inputs, -1, taps), parts["B2"].to(r.dtype))
        }

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees, the angle at the start."""
        return 90.0

    def _units(self, out: int) -> int:
        return max(1, round(self.expansion * out))

    def _mixed(self, b: Tensor) -> Tensor:
        return b


@register_rule("PFA-o")
@dataclass(frozen=True)
class OrthogonalProductFeedback(ProductFeedback):
    """PFA with an orthogonal B and as many units as output channels, so that V comes to be W."""

    expansion: float = field(default=1.0, init=False)

    def _mixed(self, b: Tensor) -> Tensor:
        """Return an orthogonal B."""
        if b.device.type == "meta":
            return b
        q: Tensor = torch.linalg.qr(wide(b))[0]
        return q


@register_rule("LDFA")
@dataclass(frozen=True)
class LowDimensionalFeedback:
    """V = Q P of low rank, both learned: dQ = G P^T, dP = Q^T G (low-dimensional feedback alignment, Hanut
    and Kadmon 2025, with the local rule of their code, in which the error signal passes `rank` units).

    Args:
        rank: number of columns of Q.
        init: "random", or "svd": the best approximation of the initial W, as in their code.
        std: standard deviation of V's entries at a random start. None is that of the layer's own
            initialization.
    """

    rank: int = 8
    init: Literal["random", "svd"] = "random"
    std: float | None = None

    learns_from: ClassVar[LearnsFrom] = "gradient"
    fixed: ClassVar[tuple[str, ...]] = ("rank",)

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_choice("init", self.init, Literal["random", "svd"])
        if self.std is not None:
            check_number("std", self.std, 0)

    def initial(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return Q, of shape (groups, m, rank), and P, of shape (groups, rank, n)."""
        matrices = blocks(weight, rng.layer.groups)
        groups, m, n = matrices.shape
        if self.init == "svd" and weight.device.type != "meta":
            a, s, bt = torch.linalg.svd(wide(matrices), full_matrices=False)
            kept = min(self.rank, s.shape[1])
            q, p = (
                wide(weight.new_zeros(shape)) for shape in ((groups, m, self.rank), (groups, self.rank, n))
            )
            root = s[:, :kept].sqrt()
            q[..., :kept], p[:, :kept] = a[..., :kept] * root.unsqueeze(1), root.unsqueeze(2) * bt[:, :kept]
            return {"Q": q, "P": p}
        std = initial_distribution(rng.layer).std if self.std is None else self.std
        each = math.sqrt(std / math.sqrt(self.rank))  # Q and P are of equal size, so that both learn
        q = rng.normal(weight.new_empty(groups, m, self.rank), "Q").mul_(each)
        return {"Q": q, "P": rng.normal(weight.new_empty(groups, self.rank, n), "P").mul_(each)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Multiply Q and P."""
        with full_precision(weight.device):
            return (wide(parts["Q"]) @ wide(parts["P"])).reshape(weight.shape).to(weight.dtype)

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return G P^T and Q^T G."""
        q, p = parts["Q"], parts["P"]
        g = blocks(local.weight_gradient, len(q))
        return {"Q": g @ p.mT, "P": q.mT @ g}


def _name_of_b(layer: LayerInfo) -> str:
    """Return "B2" if the weight has its output channels in the second dimension."""
    return "B2" if layer.kind == "Conv1D" or layer.kind.startswith("ConvTranspose") else "B"


def _by_channels(weight: Tensor, layer: LayerInfo) -> tuple[int, int, int, int]:
    """Return the number of groups, and the numbers of input channels, output channels and kernel taps in one
    group."""
    first, second = weight.shape[0] // layer.groups, weight.shape[1]
    taps = math.prod(weight.shape[2:])
    inputs, out = (first, second) if _name_of_b(layer) == "B2" else (second, first)
    return layer.groups, inputs, out, taps


def _in_float32(numbers: Tensor, weight: Tensor) -> Tensor:
    """Return numbers in float32, or in float64 if the weight is."""
    return numbers.double() if weight.dtype == torch.float64 else numbers.float()
