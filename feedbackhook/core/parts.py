"""Which part of a weight a call uses, and the same part of its feedback weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Part(Protocol):
    """The part of a weight that a call uses, and so the part of its V."""

    def of(self, v: Tensor) -> Tensor:
        """Return the same part of V."""


class View(NamedTuple):
    """A view of a contiguous weight: its size, its stride, and its offset from the weight's first entry."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    @classmethod
    def between(cls, tensor: Tensor, base: Tensor) -> View:
        """Return how `tensor` lies in `base`."""
        return cls(tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())

    def of(self, v: Tensor) -> Tensor:
        """Return the same view of V."""
        v = v.contiguous()
        return v.as_strided(self.size, self.stride, v.storage_offset() + self.offset)


class Copied(NamedTuple):
    """The result of a function that only selects and orders entries of a weight, or of a part of it."""

    part: Part | None
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, v: Tensor) -> Tensor:
        """Return what the function makes of V."""
        return self.function(v if self.part is None else self.part.of(v), *self.args, **self.kwargs)


class ViewOfCopy(NamedTuple):
    """A view of a part that is a copy."""

    part: Part | None
    view: View

    def of(self, v: Tensor) -> Tensor:
        """Return the same view of the copy of V."""
        return self.view.of(v if self.part is None else self.part.of(v))


def whole_of(part: Part | None, gradient: Tensor, whole: Tensor) -> Tensor:
    """Return the gradient of a whole weight from that of the part that a call uses: zero elsewhere.

    Args:
        part: the part; None is all of the weight.
        gradient: in the shape of the part.
        whole: the weight, or a tensor like it.
    """
    if part is None:
        return gradient
    if isinstance(part, View) and 0 not in part.stride:  # no entry is used twice
        zeros = gradient.new_zeros(whole.shape)
        return torch.as_strided_scatter(zeros, gradient, part.size, part.stride, part.offset)
    with torch.enable_grad():
        template = torch.empty_like(whole, dtype=gradient.dtype).requires_grad_()
        used = part.of(template)
    (found,) = torch.autograd.grad(used, template, gradient)
    return found
