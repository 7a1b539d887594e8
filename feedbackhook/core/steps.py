"""The clock: each step of an optimizer that holds a patched weight, for rules that redraw and for watches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Clock:
    """Tells of the steps of all optimizers, as long as `owner` lives and `stop` is not called.

    An optimizer that steps another inside its own step (Lookahead, SAM's `step(closure)`) makes one update:
    `after` is told of the inner one, which comes first, and not of the outer.

    Args:
        owner: is not kept alive, and is the first argument of both functions.
        before: called before each step, with the optimizer.
        after: called after each step that had none inside.
    """

    def __init__(
        self, owner: Any, before: Callable[[Any, Optimizer], None], after: Callable[[Any, Optimizer], None]
    ) -> None:
        _take_off_the_retired()
        self._owner, self._before, self._after = weakref.ref(owner), before, after
        self._steps = 0
        self._begun: dict[int, int] = {}  # by the id of an optimizer: how many steps had ended before its own
        self._handles = [
            register_optimizer_step_pre_hook(self._begins),
            register_optimizer_step_post_hook(self._ends),
        ]
        for handle in self._handles:
            weakref.finalize(owner, _RETIRED.append, handle)

    def stop(self) -> None:
        """No step is told of any more."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (owner := self._owner()) is not None:
            if not torch.compiler.is_compiling():
                self._begun[id(optimizer)] = self._steps
            self._before(owner, optimizer)

    def _ends(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (owner := self._owner()) is None:
            return
        if not torch.compiler.is_compiling():
            if self._begun.pop(id(optimizer), self._steps) != self._steps:
                return  # one inside it has been told of
            self._steps += 1
        self._after(owner, optimizer)


_RETIRED: list[RemovableHandle] = []
"""Hooks of owners that were collected without `stop`. They do nothing any more, and stay until the next
clock: the collector may run while an optimizer walks torch's dict of hooks, which then must not change."""


def _take_off_the_retired() -> None:
    while _RETIRED:
        _RETIRED.pop().remove()
