"""The runs of a sweep in worker processes on this machine, by joblib."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

import joblib

from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.plan import PlannedRun, ended
from feedbackhook.experiments.train import resolve
from feedbackhook.experiments.worker import ATTEMPTS, fail_for_lost_processes, run_one

logger = logging.getLogger(__name__)


def workers(config: SweepConfig, runs: Sequence[PlannedRun]) -> int:
    """How many runs of a sweep are at work at a time."""
    if config.workers is not None:
        return config.workers
    device = resolve(runs[0].config).protocol.device
    return 1 if device != "cpu" else max(1, joblib.cpu_count() // (runs[0].config.protocol.threads or 1))


def run_all(pending: list[PlannedRun], count: int) -> None:
    """Run them in worker processes, ``count`` at a time, until each has ended or failed.

    The pool begins runs in the order in which it gets them, so when it breaks those that ran are the first
    that have not ended. Nothing tells which of them broke it: each has an attempt less, and one that has a
    single attempt left has it alone.
    """
    attempts: Counter[str] = Counter()
    done: set[str] = set()
    while left := [run for run in pending if run.name not in done]:
        last = [run for run in left if attempts[run.name] == ATTEMPTS - 1][:1]
        at_once = 1 if last else count
        # joblib's pool of one would be this process itself, which no run may take down
        pool = joblib.Parallel(
            max(2, at_once), pre_dispatch=at_once, batch_size=1, return_as="generator_unordered"
        )
        try:
            for name in pool(joblib.delayed(run_one)(run.config, os.getpid()) for run in last or left):
                done.add(name)
        except BrokenProcessPool:
            done.update(run.name for run in left if ended(run))
            for run in [run for run in last or left if run.name not in done][:at_once]:
                attempts[run.name] += 1
                logger.warning("the process of %s ended (attempt %d)", run.name, attempts[run.name])
                if attempts[run.name] == ATTEMPTS:
                    fail_for_lost_processes(run.config)
                    done.add(run.name)
