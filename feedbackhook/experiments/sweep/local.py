"""Run a sweep in worker processes on this machine, with joblib."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import joblib
from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor, get_reusable_executor

from feedbackhook.experiments.config import FolderInUse, SweepConfig
from feedbackhook.experiments.sweep.grid import PlannedRun, done
from feedbackhook.experiments.sweep.worker import ATTEMPTS, begin_worker, fail_for_lost_processes, run_one
from feedbackhook.store.locks import holder, process_name

logger = logging.getLogger(__name__)

_POLL = 1.0  # seconds
_GRACE = 30.0  # seconds that runs have to end by themselves
_IDLE = 300.0  # seconds after which a worker with nothing to do ends


def workers(config: SweepConfig, runs: Sequence[PlannedRun]) -> int:
    """Return the number of runs of a sweep to train at a time."""
    if config.workers is not None:
        return config.workers
    device = runs[0].resolved.protocol.device
    return 1 if device != "cpu" else max(1, joblib.cpu_count() // (runs[0].config.protocol.threads or 1))


def run_all(pending: list[PlannedRun], count: int, tell: Callable[[str], None] = logger.info) -> None:
    """Run them in worker processes, ``count`` at a time, until each has ended, paused or failed.

    A run whose folder another process holds lets the other runs go first and is tried again later. When the
    pool breaks, nobody knows which of its runs broke it: each of them loses an attempt, and a run with a
    single attempt left runs alone.
    """
    queue = _Queue(pending, tell)
    while queue.left:
        suspects = [run for run in queue.left.values() if queue.attempts[run.name] == ATTEMPTS - 1]
        others = [run for run in queue.left.values() if queue.attempts[run.name] < ATTEMPTS - 1]
        if any(holder(run.folder.path) is None for run in suspects) or not others:
            queue.work_off(suspects, 1)
        else:
            queue.work_off(others, count)


class _Queue:
    """The runs that have neither ended nor failed."""

    def __init__(self, pending: Sequence[PlannedRun], tell: Callable[[str], None]) -> None:
        self.left = {run.name: run for run in pending}
        self.attempts: Counter[str] = Counter()
        self._tell = tell
        self._told: set[str] = set()

    def work_off(self, runs: Sequence[PlannedRun], count: int) -> None:
        """Run them in a pool until it breaks, or until other processes hold all that are left."""
        waiting = deque(runs)
        first = self._free(waiting)
        if first is None:
            time.sleep(_POLL)
            return
        waiting.appendleft(first)
        running: dict[Future[str], PlannedRun] = {}
        # at least two, so that a run that runs alone does not end the workers of the next sweep
        pool = get_reusable_executor(max(2, count), timeout=_IDLE, initializer=begin_worker)
        try:
            while self._fill(pool, running, waiting, count):
                done, _ = wait(running, _POLL if waiting else None, FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    self._settle(running.pop(future), future.exception(), waiting)
        except BrokenProcessPool:
            for run in running.values():
                self._lose(run)
        except KeyboardInterrupt:
            self._tell("stopping the runs")
            _stop(running)
            pool.shutdown(kill_workers=True)
            raise

    def _fill(
        self,
        pool: ProcessPoolExecutor,
        running: dict[Future[str], PlannedRun],
        waiting: deque[PlannedRun],
        count: int,
    ) -> bool:
        """Give each idle worker a run; return whether any run is at work then."""
        while len(running) < count and (run := self._free(waiting)) is not None:
            running[pool.submit(run_one, run.config, os.getpid(), run.until)] = run
        return bool(running)

    def _free(self, waiting: deque[PlannedRun]) -> PlannedRun | None:
        """Take the next run whose folder no process holds; move the others to the end of the queue."""
        for _ in range(len(waiting)):
            run = waiting.popleft()
            other = holder(run.folder.path)
            if other is None:
                return run
            waiting.append(run)
            if run.name not in self._told:
                self._told.add(run.name)
                self._tell(
                    f"{run.name} is in use by {other}: the other runs continue, and it is tried again later"
                )
        return None

    def _settle(self, run: PlannedRun, error: BaseException | None, waiting: deque[PlannedRun]) -> None:
        """Decide what happens to a run that a worker has returned."""
        if error is None:
            del self.left[run.name]
        elif isinstance(error, FolderInUse):
            waiting.append(run)
        elif isinstance(error, KeyboardInterrupt):  # somebody stopped the worker, not the sweep
            self._lose(run)
            if self.attempts[run.name] < ATTEMPTS - 1:
                waiting.append(run)
        elif isinstance(error, BrokenProcessPool):
            self._lose(run)
            raise error
        else:
            raise error

    def _lose(self, run: PlannedRun) -> None:
        """Take an attempt from a run whose process, or one in the same pool, is gone."""
        if done(run):
            del self.left[run.name]
            return
        self.attempts[run.name] += 1
        logger.warning("the process of %s ended (attempt %d)", run.name, self.attempts[run.name])
        if self.attempts[run.name] == ATTEMPTS:
            fail_for_lost_processes(run.config)
            del self.left[run.name]


def _stop(running: dict[Future[str], PlannedRun]) -> None:
    """Ask the workers that hold a run folder to stop, and wait until they have written how the run ended."""
    until = time.monotonic() + _GRACE
    while time.monotonic() < until:
        held = {holder(run.folder.path) for future, run in running.items() if not future.done()}
        working = [p for p in multiprocessing.active_children() if process_name(p.pid) in held]
        if not working:
            return
        for process in working:
            process.terminate()
        wait(running, _POLL / 4)
