"""Updates of weights without an optimizer, where a rule waits for optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.errors import warn
from feedbackhook.core.feedback import redrawn_by_updates
from feedbackhook.core.layer import Patched
from feedbackhook.core.learning import learns, mirrors
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import transformed

_SAMPLE = 1024  # how many entries of a weight are compared


class _Seen(NamedTuple):
    """What a weight was before a forward.

    Args:
        layer: the layer or site that it belongs to.
        entries: some of its entries.
        backward: id of the last backward that had reached it.
        turns: how often its V had been redrawn or mirrored.
    """

    layer: weakref.ref[Patched]
    entries: Tensor
    backward: int
    turns: int


class UpdatesByHand:
    """Warns once if weights are updated without an optimizer, but their rule waits for optimizer steps.

    It looks at the first weight whose rule waits. Entries are compared, since an update of `.data` leaves no
    other trace. A single change may have other causes (weights that are loaded, the first half of a step of
    SAM), so the second one counts. All this ends when an optimizer that holds a patched weight first steps.

    Args:
        state: the patch's.
    """

    def __init__(self, state: PatchState) -> None:
        self._state = weakref.ref(state)
        self._seen: _Seen | None = None
        self._changes = 0
        self._listening: RemovableHandle | None = state.listen_to_steps(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Stop looking, if the optimizer holds a patched weight. Its step may run forwards."""
        if (state := self._state()) is not None and state.held_by(optimizer):
            self._stop()

    def after_step(self, optimizer: Optimizer) -> None:
        """Do nothing."""

    def before_forward(self) -> None:
        """Compare a weight with what it was before the last forward, if a backward has reached it since."""
        if self._listening is None or (state := self._state()) is None or transformed():
            return
        if (waiting := next(_waiting(state), None)) is None:
            return
        layer, entries, reason = waiting
        turns = layer.feedback.draws + getattr(layer.feedback, "mirrored", 0)
        before = self._seen
        self._seen = now = _Seen(weakref.ref(layer), entries, layer.last_backward, turns)
        if before is None or before.layer() is not layer or before.turns != now.turns:
            return
        self._changes += before.backward != now.backward and _differ(before.entries, entries)
        if self._changes == 2:
            self._stop()
            warn(
                f"the weight of {layer.info.name!r} is updated between backward and forward, but no "
                "optimizer that holds a patched weight has stepped, and "
                f"{type(layer.feedback.rule).__name__} {reason} "
                "(nothing is wrong if weights are only loaded or perturbed)"
            )

    def _stop(self) -> None:
        if self._listening is not None:
            self._listening.remove()
        self._listening = self._seen = None


def _waiting(state: PatchState) -> Iterator[tuple[Patched, Tensor, str]]:
    """Yield the layers and sites whose rule waits for optimizer steps, with some entries of their first
    trainable weight, and with what the rule waits for and the way out."""
    for each in state.patched:
        if (reason := _reason(each, state)) is not None and (entries := _entries(each)) is not None:
            yield each, entries, reason


def _reason(each: Patched, state: PatchState) -> str | None:
    rule = each.feedback.rule
    if redrawn_by_updates(rule):
        return "draws V again after optimizer steps alone; call patch.redraw() after each update"
    if mirrors(rule):
        if getattr(rule, "every", None) is None:
            return None
        return "has its mirror phases after optimizer steps alone; call patch.mirror() after updates"
    if learns(rule) and not state.handed_out:
        return "learns in optimizer steps alone; pass patch.parameters() to an optimizer"
    return None


def _entries(each: Patched) -> Tensor | None:
    for parameter in each.parameters():
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad and not parameter.is_meta:
            local = getattr(parameter, "to_local", None)  # a DTensor of torch.distributed has it
            flat = (parameter if local is None else local()).detach().reshape(-1)
            return flat[:: max(1, flat.numel() // _SAMPLE)].clone()
    return None


def _differ(before: Tensor, after: Tensor) -> bool:
    """Whether entries of one weight have changed, and not just its shape, dtype or device."""
    alike = (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
    return alike and not torch.equal(before, after)
