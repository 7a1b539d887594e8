"""The optimizer clock: it tells a patch's listeners about optimizer steps. Rules that redraw listen first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from feedbackhook import rng
from feedbackhook.core.feedback import Feedback, redrawn_by_updates
from feedbackhook.core.layer import Layer
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


class Redraw:
    """The step listener that redraws the layers whose rule asks for it after each update of their weight."""

    def __init__(self, state: PatchState) -> None:
        self._state = weakref.ref(state)

    def before_step(self, optimizer: Optimizer) -> None:
        """Do nothing: V changes after the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Redraw the layers whose weight the optimizer has updated, if their rule asks for it."""
        state = self._state()
        if state is None or not any(redrawn_by_updates(layer.feedback.rule) for layer in state.layers):
            return
        for layer in state.held_by(optimizer):
            if redrawn_by_updates(layer.feedback.rule):
                layer.feedback.redraw()


class Together:
    """Draws what is due for many layers at once, before a forward."""

    def __init__(self) -> None:
        self._together = rng.Together()

    def before_forward(self, layers: Iterable[Layer]) -> None:
        """Draw the random numbers of the layers whose random parts are due, where that is faster than one
        layer after the other: on all devices but the CPU, and there with the fused kernel."""
        due: dict[torch.device, list[rng.CounterRNG]] = {}
        for layer in layers:
            if isinstance(layer.feedback, Feedback) and (draw := layer.feedback.next_draw()) is not None:
                numbers, device = draw
                if device.type != "cpu" or numbers.fused:
                    due.setdefault(device, []).append(numbers)
        for device, draws in due.items():
            self._together.draw(draws, device)


_RETIRED: list[RemovableHandle] = []
"""Hooks of states that were collected without `stop`. They do nothing, and stay until the next clock starts:
the collector may run while an optimizer iterates over torch's dict of hooks, which must not change then."""


def _remove_retired() -> None:
    while _RETIRED:
        _RETIRED.pop().remove()
