"""Rules whose V is random, independent of W, and made of fewer random numbers than it has entries.

A weight counts as one matrix for each group of a convolution: its first dimension by all others, of sizes m
and n, in PyTorch's layout. The standard deviation of an entry of V is an option; by default it is that of the
layer's own initialization (see `initial_distribution`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from feedbackhook.core.learning import full_precision
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.initialization import initial_distribution
from feedbackhook.rules.options import Redraw, check_choice, check_integer, check_number
from feedbackhook.rules.random import Random
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import blocks, wide


@register_rule("low_rank")
@dataclass(frozen=True)
class LowRank:
    """V = Q P, with Q of shape (m, rank) and P of shape (rank, n), both normal and drawn once.

    Args:
        rank: number of columns of Q. V has at most this rank.
        std: standard deviation of V's entries. None is that of the layer's own initialization.
        redraw: whether Q and P are drawn once ("never") or again after each optimizer step on W ("update").
    """

    rank: int = 8
    std: float | None = None
    redraw: Redraw = "never"

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        if self.std is not None:
            check_number("std", self.std, 0)
        check_choice("redraw", self.redraw, Redraw)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw Q and P for each group, in float32 or better."""
        std = initial_distribution(rng.layer).std if self.std is None else self.std
        groups, m, n = blocks(weight, rng.layer.groups).shape
        q = rng.normal(weight.new_empty(groups, m, self.rank), "Q").mul_(std / math.sqrt(self.rank))
        p = rng.normal(weight.new_empty(groups, self.rank, n), "P")
        return {"Q": _in_precision_of(weight, q), "P": _in_precision_of(weight, p)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Multiply Q and P."""
        with full_precision(weight.device):
            return (parts["Q"] @ parts["P"]).view(weight.shape).to(weight.dtype)

    def expected_angle(self, weight: Tensor) -> float:
        """Return 90 degrees."""
        return 90.0


@register_rule("toeplitz")
@dataclass(frozen=True)
class Toeplitz(Random):
    """V[i, j] = t[i - j + n - 1]: a Toeplitz matrix, constant along its diagonals, with normal t, drawn once.

    Here i and j are the two channels (or features) of a weight, of which there are m and n in a group. In a
    convolution an entry of t is a kernel. The product with V is a convolution along the channels too.

    Args:
        std: standard deviation of V's entries. None is that of the layer's own initialization.
        redraw: whether t is drawn once ("never") or again after each optimizer step on W ("update").
    """

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw t for each group, of shape (groups, m + n - 1, *kernel)."""
        std = initial_distribution(rng.layer).std if self.std is None else self.std
        groups = rng.layer.groups
        diagonals = weight.shape[0] // groups + weight.shape[1] - 1
        t = rng.normal(weight.new_empty(groups, diagonals, *weight.shape[2:])).mul_(std)
        return {"t": t.to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Put t on the diagonals of V."""
        windows = parts["t"].flip(1).unfold(1, weight.shape[1], 1)  # the last row of V first
        return windows.flip(1).movedim(-1, 2).reshape(weight.shape)


def _in_precision_of(weight: Tensor, x: Tensor) -> Tensor:
    return x.to(wide(weight.new_empty(0)).dtype)
