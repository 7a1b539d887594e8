"""Random parts that are drawn again: what an optimizer step makes due, and how many layers draw at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from feedbackhook.core.feedback import Feedback, redrawn_by_updates
from feedbackhook.core.layer import Layer
from feedbackhook.core.state import PatchState
from feedbackhook.rng import CounterRNG, Together


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


class DrawAhead:
    """Draws what is due for many layers at once, before a forward."""

    def __init__(self) -> None:
        self._together = Together()

    def before_forward(self, layers: Iterable[Layer]) -> None:
        """Draw the random numbers of the layers whose random parts are due, where that is faster than one
        layer after the other: on all devices but the CPU, and there with the fused kernel."""
        due: dict[torch.device, list[CounterRNG]] = {}
        for layer in layers:
            if isinstance(layer.feedback, Feedback) and (draw := layer.feedback.next_draw()) is not None:
                numbers, device = draw
                if device.type != "cpu" or numbers.fused:
                    due.setdefault(device, []).append(numbers)
        for device, draws in due.items():
            self._together.draw(draws, device)
