"""Estimate the time left of a sweep while it runs, from the progress that its own runs have made."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.store.run_folder import RunResult

ENDED = ("finished", "diverged", "pruned", "failed")


class SweepClock:
    """The time that a sweep still needs, at its pace so far.

    A run on a slow dataset counts for more than one on a fast dataset: each run weighs the mean time that the
    finished runs on its dataset took. Until one has finished, it weighs as much as an average run.

    Args:
        runs: the planned runs.
    """

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._runs = runs
        self._begin: float | None = None
        self._at_begin: dict[str, float] = {}  # the share of each run that was done before this sweep
        self._failed_before: dict[str, RunResult] = {}  # by an earlier sweep; this one tries them again
        self._seen: dict[str, tuple[float, float]] = {}  # when each run started in view, and its share then
        self._seconds: dict[str, float] = {}  # duration of each whole run that finished in view

    def left(self, states: Mapping[str, RunResult | None]) -> float | None:
        """Return the seconds left, or None if nothing has been done yet.

        Args:
            states: how each run stands, by name; None is a run that has not started.
        """
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            self._failed_before = {
                name: result for name, result in states.items() if result and result.status == "failed"
            }
            self._at_begin = {run.name: self._share(run, states[run.name]) for run in self._runs}
        shares = {run.name: self._share(run, states[run.name]) for run in self._runs}
        self._watch(now, states, shares)
        weights = self._weights()
        done = sum(weights[name] * (share - self._at_begin[name]) for name, share in shares.items())
        if done <= 0:
            return None
        left = sum(weights[name] * (1 - share) for name, share in shares.items())
        return left * (now - self._begin) / done

    def _share(self, run: PlannedRun, result: RunResult | None) -> float:
        """The share of a run that is done, 0 to 1."""
        if result is None:
            return 0.0
        if result.status in ENDED and result != self._failed_before.get(run.name):
            return 1.0
        return result.epoch / run.config.protocol.epochs

    def _watch(self, now: float, states: Mapping[str, RunResult | None], shares: Mapping[str, float]) -> None:
        """Measure how long runs take, from when they are first seen running to when they have finished."""
        for name, result in states.items():
            if result is not None and result.status == "running":
                self._seen.setdefault(name, (now, shares[name]))
                continue
            began, share = self._seen.pop(name, (now, 1.0))
            if result is not None and result.status == "finished" and share < 1:
                self._seconds[name] = (now - began) / (1 - share)

    def _weights(self) -> dict[str, float]:
        """The weight of each run, by name."""
        of_dataset: dict[str, list[float]] = {}
        for run in self._runs:
            if (seconds := self._seconds.get(run.name, 0.0)) > 0:
                of_dataset.setdefault(run.dataset, []).append(seconds)
        means = {dataset: fmean(seconds) for dataset, seconds in of_dataset.items()}
        average = fmean(means.values()) if means else 1.0
        return {run.name: means.get(run.dataset, average) for run in self._runs}
