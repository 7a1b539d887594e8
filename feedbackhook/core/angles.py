"""Angles, norms and signs of pairs of tensors, summed in blocks so that large tensors need little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 17  # float64 numbers compared at a time on a CPU: two buffers of 1 MiB stay in cache
_GPU_BLOCK = 1 << 24  # the same on a GPU, where they take a few hundred MiB at most


class Sums(NamedTuple):
    """The sums that give the angle, norms and sign agreement of two tensors a and b. Sums of parts add up:
    of the calls of one layer, and of the layers of one network.

    Args:
        ab: sum over a o b.
        aa: sum over a o a.
        bb: sum over b o b.
        agreeing: number of entries with the same nonzero sign.
        nonzero: number of entries that are nonzero in both.
    """

    ab: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    agreeing: float = 0.0
    nonzero: float = 0.0

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Sums:
        """Return the sums of two tensors of one shape."""
        return cls(*sums_of(gathered(a), gathered(b)).tolist())

    @classmethod
    def listed(cls, sums: Sequence[Tensor]) -> list[Sums]:
        """Return what `sums_of` has returned for several pairs, all with one transfer from their device."""
        if not sums:
            return []
        device = sums[0].device
        return [cls(*row) for row in torch.stack([each.to(device) for each in sums]).tolist()]

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        """Return the sums of all parts together."""
        return cls(*map(sum, zip(*parts, strict=True)))

    @property
    def angle(self) -> float:
        """The angle between a and b in degrees, 0 to 180, to about 1e-6; NaN if either is all zero."""
        ab, aa, bb = self[:3]
        if not aa * bb > 0:
            return math.nan
        across = aa * bb - ab * ab
        return math.degrees(math.atan2(math.sqrt(max(across, 0.0)), ab))

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b, -1 to 1; NaN if either is all zero."""
        norms = (self.aa * self.bb) ** 0.5
        return max(-1.0, min(1.0, self.ab / norms)) if norms else float("nan")

    @property
    def sign_agreement(self) -> float:
        """The fraction, 0 to 1, of the entries nonzero in both whose signs agree; NaN if there are none."""
        return self.agreeing / self.nonzero if self.nonzero else float("nan")

    @property
    def norm_ratio(self) -> float:
        """norm(a) / norm(b); NaN if b is all zero."""
        return (self.aa / self.bb) ** 0.5 if self.bb else float("nan")


def sums_of(a: Tensor, b: Tensor, signs: bool = True) -> Tensor:
    """Return the numbers of `Sums` as a tensor, shape (5,), on the device of two tensors of one shape.

    Without `signs`, only the first three, shape (3,).
    """
    a, b = _flat(a.detach(), b.detach())
    dtype, size = _wide(a), min(_block(a), a.numel())
    # All blocks use the same two buffers: allocating new ones takes longer than what is done with them.
    buffers = [torch.empty(size, dtype=dtype, device=a.device) for _ in range(2)]
    sums = []
    for parts in zip(a.split(size), b.split(size), strict=True):
        rest = len(parts[0])
        room = buffers if rest == size else [buffer[:rest] for buffer in buffers]
        x, y = (
            part if part.dtype == dtype else wide.copy_(part) for part, wide in zip(parts, room, strict=True)
        )
        sums += [x.dot(y), x.dot(x), y.dot(y)]
        if signs:
            agreed = torch.mul(x, y, out=room[0]).sign_()  # 1, -1, or 0 if one is zero: faster than comparing
            sums += [agreed.sum(), agreed.dot(agreed)]
    count = 5 if signs else 3
    total = torch.stack(sums).view(-1, count).sum(0)
    if signs:
        total[3] = (total[3] + total[4]) / 2  # from agreeing minus opposed
    return total


def angles_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle in degrees, shape (N,), between each row of a and the same row of b, shape (N, D);
    NaN if either is all zero."""
    sums = []
    rows = max(1, _block(a) // max(1, a.shape[1]))
    for start in range(0, len(a), rows):
        x, y = (part[start : start + rows].to(_wide(a)) for part in (a, b))
        sums.append(torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], dim=1))
    return _angles(torch.cat(sums)) if sums else a.new_empty(0, dtype=_wide(a))


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (a DTensor of torch.distributed) as a whole; every rank must call this."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole.to_dense() if whole.is_sparse else whole


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten both in the same order: that of memory if both have the same, which saves a copy."""
    if a.stride() == b.stride() and not a.is_contiguous():
        order = sorted(range(a.dim()), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return a.reshape(-1), b.reshape(-1)


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype for sums: float64, except on Apple's GPUs, which lack it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _block(x: Tensor) -> int:
    return _BLOCK if x.device.type == "cpu" else _GPU_BLOCK


def _angles(sums: Tensor) -> Tensor:
    """Return degrees, shape (N,), from a.b, a.a and b.b, shape (N, 3); NaN if a or b is all zero."""
    ab, aa, bb = sums.unbind(1)
    across = (aa * bb - ab * ab).clamp(min=0).sqrt()
    return torch.where(aa * bb > 0, torch.rad2deg(torch.atan2(across, ab)), torch.nan)
