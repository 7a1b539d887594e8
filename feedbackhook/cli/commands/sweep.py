"""`feedbackhook sweep`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.filesize import decimal

from feedbackhook.cli.parsers import Command, config_from
from feedbackhook.cli.printing import duration, plain_console
from feedbackhook.cli.progress import sweep_progress
from feedbackhook.experiments.config import SweepConfig

if TYPE_CHECKING:
    from rich.console import Console

    from feedbackhook.experiments.sweep.grid import PlannedRun
    from feedbackhook.store.run_folder import RunResult

_RUNS_FAILED = 1


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="list the runs with time and disk; run none")
    parser.add_class_arguments(SweepConfig)


def _sweep(given: Namespace) -> int:
    from feedbackhook.experiments.sweep.grid import plan, shrink
    from feedbackhook.experiments.sweep.run import sweep

    _refuse_torchrun()
    config = config_from(SweepConfig, given)
    console = plain_console()
    runs, folder = plan(config), shrink(config).output
    if given.dry_run:
        _print_plan(console, config, runs)
        return 0
    try:
        with sweep_progress(console, runs) as progress:
            results = sweep(config, progress, console.print, runs)
    except KeyboardInterrupt:
        console.print("interrupted; rerun the same command to resume")
        raise
    _print_results(console, results)
    console.print(f"runs: {folder}", f"their table: feedbackhook table {folder}", sep="\n")
    return 0 if all(result.ended for result in results.values()) else _RUNS_FAILED


def _refuse_torchrun() -> None:
    from feedbackhook.experiments.training.processes import shared_error, world_size

    if (count := world_size()) > 1:
        raise shared_error(
            f"torchrun has started {count} processes, and each would run the whole sweep: start it without "
            "torchrun; it makes its own processes"
        )


def _print_results(console: Console, results: dict[str, RunResult]) -> None:
    counts = Counter(result.status for result in results.values())
    console.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    for name, result in results.items():
        if not result.ended:
            console.print(f"{name} {result.status}: {result.reason}")


def _print_plan(console: Console, config: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    from feedbackhook.experiments.sweep.estimate import estimate
    from feedbackhook.experiments.sweep.grid import check, done, shrink
    from feedbackhook.experiments.sweep.local import workers
    from feedbackhook.experiments.sweep.pruning import share_trained

    check(runs)
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    console.print(f"timing a few steps with each dataset's network: {', '.join(datasets)}")
    estimates = estimate(runs)
    left = [run for run in runs if not done(run)]
    for run in runs:
        seconds, size = estimates[run.name]
        state = "" if run in left else "  (has ended)"
        console.print(f"{run.name}  {duration(seconds)}, {decimal(round(size))}{state}")
    count = 1 if config.backend == "dask" else workers(config, runs)
    seconds = (
        share_trained(runs, config.protocol.lr_pruning)
        * sum(estimates[run.name].seconds for run in left)
        / count
    )
    size = sum(estimates[run.name].size for run in left)
    console.print(
        f"{len(runs)} runs, {len(left)} of them to be run: about {duration(seconds)} with {count} at a "
        f"time, and {decimal(round(size))} in {shrink(config).output}"
    )
    if config.protocol.lr_pruning:
        console.print("runs that protocol.lr_pruning ends early are counted in the total up to that epoch")
    console.print("measured on a few steps with random images; runs side by side slow each other down")
    if left and config.record.weights == "all":
        console.print(
            "most of it is weights and checkpoints: --record.weights best keeps less, none the least"
        )


SWEEP = Command(
    name="sweep",
    help="train under many conditions, on many datasets",
    description=(
        "Run the product of conditions, datasets, learning rates and seeds. Rerun the same command to "
        "resume; feedbackhook table makes the sweep's table."
    ),
    arguments=_arguments,
    run=_sweep,
    takes_config=True,
)
