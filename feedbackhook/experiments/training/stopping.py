"""Signals that stop a process: its run ends as `interrupted`, with its status written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # Python's defaults


class Terminated(KeyboardInterrupt):
    """This process has received SIGTERM."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """Return 128 plus the number of the signal, as shells do."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


class _Handler:
    """Raises KeyboardInterrupt for the first signal, or remembers it while `held`."""

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
    """Raise KeyboardInterrupt in the block for the first SIGINT, or :class:`Terminated` for a first SIGTERM.

    Later signals are ignored: Ctrl-C reaches each process of a sweep twice, from the terminal and from the
    sweep, and the second must not interrupt the run while it writes its status. Only the main thread receives
    signals; in another thread this does nothing.

    Args:
        always: replace handlers that the program has set itself, too.
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
    """Postpone what :func:`stoppable` raises until the block is done."""
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
