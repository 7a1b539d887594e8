"""How activations grow from the input of a module to its output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Growth:
    """Collects ratios of root mean squares of activations, for each module that takes and returns
    floating-point tensors: of its output to its input, and if it contains no other module, also of its input
    to the output of the one before it, which is how far a function between the two, or a skip connection that
    joins there, exceeds that output. (Root mean squares, since norms also grow with the number of entries.)

    Attributes:
        ratios: the largest ratio by the module's full name; infinite if the output is not finite.
        unit: the smallest relative distance of two numbers (eps) of the coarsest format seen.
    """

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        self.unit = 0.0
        self._last: float | None = None

    def observe(self, name: str, given: tuple[Any, ...], output: Any, leaf: bool) -> None:
        """Note one call of a module; `leaf` if it contains no other module."""
        before = next((x for x in given if _is_real(x)), None)
        after = output[0] if isinstance(output, (tuple, list)) and output else output
        if before is None or not _is_real(after):
            return
        self.unit = max(self.unit, *(torch.finfo(x.dtype).eps for x in (before, after)))
        small, large = _rms(before), _rms(after)
        steps = [(small, large)]
        if leaf:
            steps += [] if self._last is None else [(self._last, small)]
            self._last = large
        for first, then in steps:
            if not math.isfinite(then):
                self.ratios[name] = math.inf
            elif first > 0:
                self.ratios[name] = max(self.ratios.get(name, 0.0), then / first)

    def include(self, other: Growth) -> None:
        """Add what another observation saw."""
        self.unit = max(self.unit, other.unit)
        for name, ratio in other.ratios.items():
            self.ratios[name] = max(self.ratios.get(name, 0.0), ratio)

    def within(self, name: str) -> tuple[float, str]:
        """Return the largest ratio among a module and those that contain it, and which one it is; NaN if
        none is known."""
        parts = name.split(".")
        names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        found = ((self.ratios[each], each) for each in names if each in self.ratios)
        return max(found, default=(math.nan, ""))

    def largest(self) -> tuple[float, str]:
        """Return the largest ratio of all modules, and which one it is; NaN if none is known."""
        return max(((ratio, name) for name, ratio in self.ratios.items()), default=(math.nan, ""))


@contextmanager
def observe_growth(model: nn.Module) -> Iterator[Growth]:
    """Observe the modules inside the model, without the model itself, within this context."""
    growth = Growth()
    handles = []

    def hook_of(name: str, leaf: bool) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            growth.observe(name, given, output, leaf)

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                leaf = next(module.children(), None) is None
                handles.append(module.register_forward_hook(hook_of(name, leaf)))
        yield growth
    finally:
        for handle in handles:
            handle.remove()


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _rms(tensor: Tensor) -> float:
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=wide)) / math.sqrt(tensor.numel())
