"""The optimizer clock: it tells a patch's listeners about optimizer steps."""

from __future__ import annotations

import weakref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.state import PatchState


class Clock:
    """Tells the step listeners of a state about the steps of all optimizers.

    An optimizer that steps another inside its own step (Lookahead, SAM's `step(closure)`) makes one update:
    `after_step` is called for the inner step, which ends first, and not for the outer one.

    Args:
        state: the state, which the clock does not keep alive.
    """

    def __init__(self, state: PatchState) -> None:
        _remove_retired()
        self._state = weakref.ref(state)
        self._steps = 0
        self._begun: dict[int, int] = {}  # by id of an optimizer: how many steps had ended before its own
        self._handles = [
            register_optimizer_step_pre_hook(self._begins),
            register_optimizer_step_post_hook(self._ends),
        ]
        for handle in self._handles:
            weakref.finalize(state, _RETIRED.append, handle)

    def stop(self) -> None:
        """Stop telling about steps."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (state := self._state()) is None:
            return
        if not torch.compiler.is_compiling():
            self._begun[id(optimizer)] = self._steps
        for listener in list(state.step_listeners.values()):
            listener.before_step(optimizer)

    def _ends(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (state := self._state()) is None:
            return
        if not torch.compiler.is_compiling():
            if self._begun.pop(id(optimizer), self._steps) != self._steps:
                return  # a step inside this one has been told
            self._steps += 1
        for listener in list(state.step_listeners.values()):
            listener.after_step(optimizer)


_RETIRED: list[RemovableHandle] = []
"""Hooks of states that were collected without `stop`. They do nothing, and stay until the next clock starts:
the collector may run while an optimizer iterates over torch's dict of hooks, which must not change then."""


def _remove_retired() -> None:
    while _RETIRED:
        _RETIRED.pop().remove()
