"""The optimizer clock: it tells a patch's listeners about optimizer steps. Updates that it cannot see."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.errors import warn
from feedbackhook.core.feedback import redrawn_by_updates
from feedbackhook.core.layer import Patched
from feedbackhook.core.learning import learns, mirrors
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import transformed


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


_SAMPLE = 1024  # how many entries of a weight are compared


class _Seen(NamedTuple):
    """What a weight was before a forward.

    Args:
        entries: some of its entries.
        backward: id of the last backward that had reached it.
        turns: how often its V had been redrawn or mirrored.
    """

    entries: Tensor
    backward: int
    turns: int


class UpdatesByHand:
    """Warns once if weights are updated without an optimizer, but their rule waits for optimizer steps.

    Entries are compared, since an update of `.data` leaves no other trace. A single change may have other
    causes (weights that are loaded, the first half of a step of SAM), so the second one counts. All this ends
    when an optimizer that holds a patched weight first steps.

    Args:
        state: the patch's.
    """

    def __init__(self, state: PatchState) -> None:
        self._state = weakref.ref(state)
        self._seen: weakref.WeakKeyDictionary[Patched, _Seen] = weakref.WeakKeyDictionary()
        self._changes = 0
        self._listening: RemovableHandle | None = state.listen_to_steps(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Stop looking, if the optimizer holds a patched weight. Its step may run forwards."""
        if (state := self._state()) is not None and state.held_by(optimizer):
            self._stop()

    def after_step(self, optimizer: Optimizer) -> None:
        """Do nothing."""

    def before_forward(self) -> None:
        """Compare the weights with those before the last forward, if a backward has reached them since."""
        if self._listening is None or (state := self._state()) is None or transformed():
            return
        changed = [message for each in state.patched if (message := self._look_at(each, state)) is not None]
        self._changes += bool(changed)
        if self._changes == 2:
            warn(changed[0])
            self._stop()

    def _look_at(self, each: Patched, state: PatchState) -> str | None:
        """Return what to say if a weight has been updated; None if it has not, or if its rule does not
        wait."""
        if (reason := _waits(each, state)) is None or (entries := _entries(each)) is None:
            return None
        before = self._seen.get(each)
        turns = each.feedback.draws + getattr(each.feedback, "mirrored", 0)
        self._seen[each] = now = _Seen(entries, each.last_backward, turns)
        if before is None or now.backward == before.backward or now.turns != before.turns:
            return None
        if not _differ(before.entries, entries):
            return None
        return (
            f"the weight of {each.info.name!r} is updated between backward and forward, but no optimizer "
            f"that holds a patched weight has stepped, and {type(each.feedback.rule).__name__} {reason}"
        )

    def _stop(self) -> None:
        if self._listening is not None:
            self._listening.remove()
        self._listening = None
        self._seen.clear()


def _waits(each: Patched, state: PatchState) -> str | None:
    """Return what a rule waits for an optimizer's step with, and the way out; None if it does not wait."""
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
    """Return some entries of the first trainable weight of a layer or site; None if there is none."""
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
