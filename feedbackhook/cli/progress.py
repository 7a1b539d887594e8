"""Progress of a run and of a sweep: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from feedbackhook.cli.printing import duration

if TYPE_CHECKING:
    from rich.console import Console

    from feedbackhook.experiments.sweep.grid import PlannedRun
    from feedbackhook.experiments.training.run import Progress
    from feedbackhook.store.run_folder import RunResult

States = Mapping[str, "RunResult | None"]

_ENDED = ("finished", "diverged", "failed")


@contextmanager
def run_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show a bar with loss and accuracy on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  {task.description}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("")
        accuracy = ""

        def draw(now: Progress) -> None:
            nonlocal accuracy
            if now.test_error is not None:
                accuracy = f"test accuracy {100 - now.test_error:.2f}%"
            loss = f"loss {now.train_loss:.4f}  " if now.epoch else ""
            done = max(now.epoch - 1 + now.batch / now.batches, 0)
            bar.update(task, total=now.epochs, completed=done, description=loss + accuracy)

        yield draw


@contextmanager
def sweep_progress(console: Console, runs: Sequence[PlannedRun]) -> Iterator[Callable[[States], None]]:
    """Show how many runs have ended and how much time is left.

    On a terminal this is a bar, elsewhere a line for each run that ends.
    """
    clock = SweepClock(runs)
    shown: dict[str, str] | None = None  # None until the first call: runs that ended before get no line
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs  {task.description}"))
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(runs))

        def draw(states: States) -> None:
            nonlocal shown
            ended = {name: result for name, result in states.items() if result and result.status in _ENDED}
            left = clock.left(states)
            time_left = [] if left is None else [f"about {duration(left)} left"]
            counts = Counter(result.status for result in states.values() if result)
            words = [f"{count} {status}" for status, count in sorted(counts.items())]
            bar.update(task, completed=len(ended), description=", ".join([*words, *time_left]))
            if shown is not None and not console.is_terminal:
                for name, result in ended.items():
                    if shown.get(name) != result.status:
                        line = ", ".join([_ended_line(name, result), *time_left])
                        console.print(f"[{len(ended)}/{len(runs)}]", line, markup=False)
            # only runs that have ended: a run that failed and runs again may fail again
            shown = {name: result.status for name, result in ended.items()}

        yield draw


def _ended_line(name: str, result: RunResult) -> str:
    best = "" if result.best_error is None else f": best test error {result.best_error:.2f}%"
    return f"{name} {result.status}{best}"


class SweepClock:
    """Estimates how long a sweep will still take, from its own pace so far.

    Runs on a slow dataset count for more: a run weighs as many seconds as the finished runs on its dataset
    took in this sweep. A dataset without a finished run gets the mean of the others.
    """

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._runs = runs
        self._begin: float | None = None
        self._at_begin: dict[str, float] = {}  # by run: share done when the sweep began
        self._failed_before: dict[str, RunResult] = {}  # in an earlier sweep; this one tries them again
        self._started: dict[str, float] = {}  # by run: when it was first seen running
        self._took: dict[str, dict[str, float]] = defaultdict(dict)  # by dataset and run: seconds if whole

    def left(self, states: States) -> float | None:
        """Seconds left, or None if nothing has been done yet."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            self._failed_before = {name: r for name, r in states.items() if r and r.status == "failed"}
            self._at_begin = self._shares(states)
        shares = self._shares(states)
        self._time(states, shares, now)
        weights = self._weights()
        done = sum(weights[name] * (share - self._at_begin[name]) for name, share in shares.items())
        if done <= 0:
            return None
        remaining = sum(weights[name] * (1 - share) for name, share in shares.items())
        return remaining * (now - self._begin) / done

    def _shares(self, states: States) -> dict[str, float]:
        """By run: the share of its epochs that is done, 1 once it has ended."""
        return {run.name: self._share(run, states[run.name]) for run in self._runs}

    def _share(self, run: PlannedRun, result: RunResult | None) -> float:
        if result is None:
            return 0.0
        if result.status in _ENDED and result != self._failed_before.get(run.name):
            return 1.0
        return result.epoch / run.config.protocol.epochs

    def _time(self, states: States, shares: Mapping[str, float], now: float) -> None:
        """Note when runs start, and how long each took that finishes."""
        for run in self._runs:
            result = states[run.name]
            if result is None:
                continue
            if result.status == "running":
                self._started.setdefault(run.name, now)
            elif result.status == "finished" and run.name in self._started:
                trained = shares[run.name] - self._at_begin[run.name]
                if trained > 0:
                    self._took[run.dataset].setdefault(run.name, (now - self._started[run.name]) / trained)

    def _weights(self) -> dict[str, float]:
        by_dataset = {dataset: mean(took.values()) for dataset, took in self._took.items() if took}
        other = mean(by_dataset.values()) if by_dataset else 1.0
        return {run.name: by_dataset.get(run.dataset, other) for run in self._runs}
