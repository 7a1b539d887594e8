"""Train one run of a sweep in a worker process, and keep how it ended in its folder.

``python -m feedbackhook.experiments.sweep.worker`` does so in its own process: it reads the configuration
from standard input.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feedbackhook.experiments.config import FolderInUse, RunConfig
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.stored import write_config
from feedbackhook.experiments.training.run import train
from feedbackhook.experiments.training.stopping import exit_status, stoppable
from feedbackhook.report.plots import draw_run
from feedbackhook.store.locks import holder
from feedbackhook.store.run_folder import RunFolder, RunResult

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # number of processes that a run may lose before it is kept as failed
IN_USE = 75  # exit status if another process holds the run folder: "try again later" in sysexits.h
_POLL = 0.25  # seconds
_GRACE = 10.0  # seconds that a run has to end after its parent process has ended


def run_one(config: RunConfig, parent: int, until: int | None = None) -> str:
    """Train a run, from its checkpoint if there is one, and return the name of its folder.

    How the run ended is written into the folder.

    Args:
        config: configuration of the run.
        parent: ID of the process whose end also ends this one.
        until: the epoch after which it pauses; None: train to the end.

    Raises:
        FolderInUse: another process holds the folder, perhaps one that only seemed lost: try again later.
        KeyboardInterrupt: a signal stopped the run.
    """
    try:
        with stoppable(always=True), _bound_to(parent):
            train(config, resume=True, draw=draw_run, until=until)
    except FolderInUse:
        raise
    except Exception as error:  # whatever ends a run is kept in its folder and stops no other run
        try:
            fail(config, f"{type(error).__name__}: {error}", traceback.format_exc())
        except OSError as full:  # the disk, perhaps
            logger.error(
                "%s failed (%s), which could not be written to its folder: %s", config.output, error, full
            )
    return Path(str(config.output)).name


def begin_worker() -> None:
    """Set up a worker of the pool: between runs it ignores Ctrl-C, since the sweep ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def fail(config: RunConfig, reason: str, details: str | None = None) -> None:
    """Mark a run as failed, unless it had already ended and only its figures could not be drawn."""
    folder = RunFolder(str(config.output))
    result = folder.result()
    if result is not None and result.ended:
        logger.warning("%s has %s; afterwards: %s", config.output, result.status, reason)
        return
    if result is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        result = RunResult(folder.path)
        folder.write_result(result)  # first, since a folder without a status is not a run folder
    if not folder.trained():
        write_config(folder, resolve(config))
    if details is not None:
        folder.write_traceback(details)
    result.status, result.reason = "failed", reason
    folder.write_result(result)


def fail_for_lost_processes(config: RunConfig) -> None:
    """Mark a run as failed because it has used up its attempts."""
    fail(config, f"its process ended {ATTEMPTS} times: killed, or out of memory?")


def keep_interrupted(config: RunConfig) -> None:
    """Mark a run as interrupted if its status is `running` although no process holds its folder."""
    folder = RunFolder(str(config.output))
    if holder(folder.path) is None:  # checked first: an ending process writes its status before it lets go
        result = folder.result()
        if result is not None and result.status == "running":
            result.status, result.reason = "interrupted", "the sweep was stopped, and its process with it"
            folder.write_result(result)


@contextmanager
def _bound_to(parent: int) -> Iterator[None]:
    """End this process when ``parent`` ends, within the block: the next sweep must find nobody at work in the
    folders. The run is interrupted and has some seconds to write its status."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL):
            if parent not in (os.getpid(), os.getppid()):
                os.kill(os.getpid(), signal.SIGTERM)
                done.wait(_GRACE)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background jobs of a shell ignore it
    try:
        run_one(*pickle.load(sys.stdin.buffer))
    except FolderInUse:
        sys.exit(IN_USE)
    except KeyboardInterrupt as stop:
        sys.exit(exit_status(stop))
