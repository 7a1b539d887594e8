"""Which tensors share memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from torch import Tensor

from feedbackhook.core.torch_internals import storage_of

_Value = TypeVar("_Value")


class Memory(Generic[_Value]):
    """Finds tensors by the memory that they occupy. Several may have their places in one storage.

    Args:
        held: the tensors, each with what stands for it. Those without memory are left out.
    """

    def __init__(self, held: Iterable[tuple[Tensor, _Value]]) -> None:
        self._held: dict[int, list[tuple[Tensor, _Value]]] = {}
        for tensor, value in held:
            if (storage := storage_of(tensor)) is not None:
                self._held.setdefault(storage, []).append((tensor, value))

    def sharing(self, tensor: Tensor) -> list[_Value]:
        """Return what stands for the tensors that share memory with this one."""
        if (storage := storage_of(tensor)) is None or (held := self._held.get(storage)) is None:
            return []
        return [value for other, value in held if _overlap(tensor, other)]


def _overlap(one: Tensor, other: Tensor) -> bool:
    (begin, end), (at, to) = _extent(one), _extent(other)
    return at < end and begin < to


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's elements begin and end in their storage, in bytes."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    last = first + sum(int((size - 1) * stride) for size, stride in steps)
    return first * tensor.element_size(), (last + 1) * tensor.element_size()
