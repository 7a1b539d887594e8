"""What a process of a sweep does: one run, whatever becomes of it.

``python -m feedbackhook.experiments.sweep.worker`` runs as its own process and reads the run to train from
standard input.
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

ATTEMPTS = 3  # processes that a run may lose before it is kept as failed
IN_USE = 75  # exit status where another process holds the run's folder: sysexits' "try again later"
_POLL = 0.25  # seconds
_GRACE = 10.0  # seconds that a run has to end when the process is gone with which it is to end


def run_one(config: RunConfig, parent: int) -> str:
    """One run, from its checkpoint if there is one; how it went is in its folder. Returns the folder's name.

    Args:
        config: of the run.
        parent: the process with which this one is to end.

    Raises:
        FolderInUse: another process holds the folder, perhaps one that only seemed lost: try again later.
        KeyboardInterrupt: a signal has stopped the run.
    """
    try:
        with stoppable(always=True), _bound_to(parent):
            train(config, resume=True, draw=draw_run)
    except FolderInUse:
        raise
    except Exception as error:  # whatever ends a run is kept with it, and ends no other
        try:
            fail(config, f"{type(error).__name__}: {error}", traceback.format_exc())
        except OSError as full:  # the disk, perhaps
            logger.error("%s failed (%s), and that could not be kept: %s", config.output, error, full)
    return Path(str(config.output)).name


def begin_worker() -> None:
    """What a worker of the pool does first: without a run it leaves Ctrl-C to the sweep, which ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def fail(config: RunConfig, reason: str, details: str | None = None) -> None:
    """Keep that a run failed. One that had ended before, and whose figures could not be drawn, did not."""
    folder = RunFolder(str(config.output))
    result = folder.result()
    if result is not None and result.ended:
        logger.warning("%s has %s, and then: %s", config.output, result.status, reason)
        return
    if result is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        result = RunResult(folder.path)
        folder.write_result(result)  # a folder without a status is none of a run, whenever this is killed
    if not folder.trained():
        write_config(folder, resolve(config))
    if details is not None:
        folder.write_traceback(details)
    result.status, result.reason = "failed", reason
    folder.write_result(result)


def fail_for_lost_processes(config: RunConfig) -> None:
    """Keep that a run failed because it has used up its attempts."""
    fail(config, f"its process ended {ATTEMPTS} times: killed, or out of memory?")


def keep_interrupted(config: RunConfig) -> None:
    """Keep that a run was interrupted where its status says `running` and no process holds its folder."""
    folder = RunFolder(str(config.output))
    if holder(folder.path) is None:  # asked first: a process that just ends writes its status before
        result = folder.result()
        if result is not None and result.status == "running":
            result.status, result.reason = "interrupted", "the sweep was stopped, and its process with it"
            folder.write_result(result)


@contextmanager
def _bound_to(parent: int) -> Iterator[None]:
    """Within the block this process ends when ``parent`` does, however that ends: the next sweep must find
    nobody at work in the folders. The run is interrupted, and has some seconds to say so."""
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        run_one(*pickle.load(sys.stdin.buffer))
    except FolderInUse:
        sys.exit(IN_USE)
    except KeyboardInterrupt as stop:
        sys.exit(exit_status(stop))
