"""Signals that ask a process to stop: its run ends as `interrupted`, with its status written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # and what Python does


class Terminated(KeyboardInterrupt):
    """SIGTERM has asked this process to stop."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells report it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


class _Handler:
    """Raises KeyboardInterrupt for the first signal; once it is ``held``, at the end of that."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.held = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = number
            if not self.held:
                self.stop()

    def stop(self) -> None:
        raise KeyboardInterrupt if self.first == signal.SIGINT else Terminated("SIGTERM")


@contextmanager
def stoppable(always: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for the first SIGINT, :class:`Terminated` for the first SIGTERM.

    Later ones are ignored: Ctrl-C reaches each process of a sweep twice, from the terminal and from the
    sweep, and the second must not cut short how a run ends. Handlers that the program has set itself
    stay, unless ``always``. Only the main thread gets signals; in another, this does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        handler = _Handler()
        for number, default in _SIGNALS.items():
            if always or signal.getsignal(number) == default:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal that :func:`stoppable` would raise for wait until the block is done."""
    handlers = [h for number in _SIGNALS if isinstance(h := signal.getsignal(number), _Handler)]
    asked = [handler.first for handler in handlers]
    for handler in handlers:
        handler.held = True
    try:
        yield
    finally:
        for handler in handlers:
            handler.held = False
    for handler, before in zip(handlers, asked, strict=True):
        if before is None and handler.first is not None:
            handler.stop()
