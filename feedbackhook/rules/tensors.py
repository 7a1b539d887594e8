"""What several rules do with tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return the tensor in float32 or better; sums of half-precision numbers would be off."""
    return x if x.dtype == torch.float64 else x.float()


def constant(value: float, weight: Tensor) -> Tensor:
    """Return a number as a tensor without dimensions, in float32 or better, on the device of `weight`.

    As a random part it can change without making `torch.compile` compile again.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=weight.device)


def norm_of(x: Tensor) -> Tensor:
    """Return the Frobenius norm, summed in float32 or better."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return norm


def with_norm_of(weight: Tensor, v: Tensor) -> Tensor:
    """Return `v` with the Frobenius norm of `weight`; all zero if `v` is."""
    norm = norm_of(v)
    return v * torch.where(norm > 0, norm_of(weight) / norm, norm).to(v.dtype)


def blocks(weight: Tensor, groups: int) -> Tensor:
    """Return the weight as a matrix for each group: first dimension by all others, in the weight's layout."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)
