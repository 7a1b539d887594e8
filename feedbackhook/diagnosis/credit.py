"""What a small step of one layer does to the loss, along its delivered and along its exact gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Credit(NamedTuple):
    """How much the loss falls for a step of length h of one layer: (L(W + h d) - L(W - h d)) / 2 for the unit
    direction d of a gradient.

    Args:
        delivered: along the delivered gradient.
        exact: along the exact gradient.
        resolution: the rounding error of either, u max(abs(L)) for the format's rounding unit u.
    """

    delivered: float
    exact: float
    resolution: float

    @property
    def ratio(self) -> float:
        """How much of the exact gradient's fall the delivered gradient gets: 1 if they point the same way,
        negative if the loss rises; NaN if the exact gradient's fall is within rounding errors."""
        return self.delivered / self.exact if self.exact > self.resolution else math.nan

    @property
    def uncertainty(self) -> float:
        """The rounding error of `ratio`."""
        return self.resolution / self.exact if self.exact > self.resolution else math.nan


def credit(
    loss: Callable[[], float],
    parameters: Sequence[Tensor],
    delivered: Sequence[Tensor],
    exact: Sequence[Tensor],
) -> Credit:
    """Return the credit of one layer. The parameters are afterwards as before, bit for bit.

    The step's length is norm(W) eps^(1/3), at which the error of the difference quotient from the third
    derivative and that from rounding are about equal (Press et al. 2007, Numerical Recipes, section 5.7).

    Args:
        loss: computes the loss with the current parameters, always for the same batches and random numbers.
        parameters: the layer's.
        delivered: the gradient of each.
        exact: the same under exact backprop.
    """
    eps = max(torch.finfo(p.dtype).eps for p in parameters)
    length = _norm(parameters) * eps ** (1 / 3)
    seen: list[float] = []

    def fall(direction: Sequence[Tensor]) -> float:
        norm = _norm(direction)
        if not norm > 0 or not math.isfinite(norm):
            return math.nan
        ends = []
        for sign in (-1, 1):
            with _moved(parameters, direction, sign * length / norm):
                ends.append(loss())
        seen.extend(ends)
        return (ends[1] - ends[0]) / 2

    falls = fall(delivered), fall(exact)
    return Credit(*falls, eps / 2 * max(map(abs, seen), default=0.0))


@contextmanager
def _moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], by: float) -> Iterator[None]:
    """Move the parameters, through `data`, so that graphs that saved them stay valid."""
    before = [p.detach().clone() for p in parameters]
    try:
        for p, d in zip(parameters, direction, strict=True):
            p.data.add_(d, alpha=by)
        yield
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.data.copy_(value)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach().double())) for t in tensors))
