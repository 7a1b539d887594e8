"""Progress of a run and of a sweep: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from feedbackhook.cli.printing import duration

if TYPE_CHECKING:
    from rich.console import Console

    from feedbackhook.experiments.sweep.grid import PlannedRun
    from feedbackhook.experiments.training.progress import Progress
    from feedbackhook.store.run_folder import RunResult

States = Mapping[str, "RunResult | None"]


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
    from feedbackhook.experiments.sweep.progress import ENDED, SweepClock

    clock = SweepClock(runs)
    shown: dict[str, str] | None = None  # None until the first call: runs that ended before get no line
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs  {task.description}"))
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(runs))

        def draw(states: States) -> None:
            nonlocal shown
            ended = {name: result for name, result in states.items() if result and result.status in ENDED}
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
