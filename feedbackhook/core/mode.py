"""The function mode that sees the calls inside the forward of a patched model."""

from __future__ import annotations

from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feedbackhook.core.layer import Layer
from feedbackhook.core.marks import Mark
from feedbackhook.core.memory import Memory
from feedbackhook.core.operations import WATCHED
from feedbackhook.core.projection import Attention
from feedbackhook.core.signals import Forward
from feedbackhook.core.torch_internals import next_sequence_number
from feedbackhook.core.weights import Copies


class Running(NamedTuple):
    """A module whose forward is running.

    Args:
        module: the module.
        mark: its mark.
        caller: the frame that called it; None while tracing, and while a checkpoint recomputes.
        calls: the number of calls of its layer when its forward began.
    """

    module: nn.Module
    mark: Mark
    caller: FrameType | None
    calls: int


class Handler(Protocol):
    """What the mode hands watched calls to."""

    def handle(self, mode: Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of a watched function."""


class Mode(TorchFunctionMode):
    """Hands the calls of watched functions to a handler, and lets all others through.

    A mode lives from the start of the outermost module's forward to its end. It holds the stack of running
    modules, so that this stack belongs to one thread, as the stack of modes does, and ends with its mode.

    Args:
        handler: runs the calls of functions in `WATCHED`.
        traced: whether this is the mode of traced code.

    Attributes:
        running: the stack of running modules.
        seen: the functions that the innermost module has called in forwards that passed the audit.
        new: the functions called for the first time, each with the set that it belongs to.
        copies: copies of patched weights made in this forward.
        memory: that of the patched weights, once it has been asked for.
        since: sequence number of the first autograd node that this forward may make.
        forward: what direct rules know of this forward; None if there are none.
        attention: where the batch is inside the call of `F.multi_head_attention_forward` that is running.
    """

    def __init__(self, handler: Handler, traced: bool = False) -> None:
        super().__init__()
        self.handler = handler
        self.traced = traced
        self.running: list[Running] = []
        self.seen: set[Any] = set()
        self.new: list[tuple[set[Any], Any]] = []
        self.copies: Copies = {}
        self.memory: Memory[tuple[Tensor, Layer]] | None = None
        self.since = 0 if traced else next_sequence_number()
        self.forward: Forward | None = None
        self.attention: Attention | None = None

    def begin(self, running: Running) -> None:
        """Put a module on the stack."""
        self.running.append(running)
        self.seen = running.mark.seen

    def end(self) -> Running:
        """Take the innermost module off the stack."""
        ended = self.running.pop()
        if self.running:
            self.seen = self.running[-1].mark.seen
        return ended

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not (self.traced or func in self.seen) and not torch.compiler.is_compiling():
            self.new.append((self.seen, func))
        if func not in WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)  # most calls take this, the fastest path
        return self.handler.handle(self, func, args, kwargs or {})
