"""`feedbackhook train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from feedbackhook.cli.parsers import Command, config_from
from feedbackhook.cli.printing import plain_console
from feedbackhook.cli.progress import run_progress
from feedbackhook.experiments.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from feedbackhook.store.run_folder import RunResult


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in the run folder")
    parser.add_class_arguments(RunConfig)


def _train(given: Namespace) -> int:
    from feedbackhook.experiments.training.processes import is_main
    from feedbackhook.experiments.training.run import train
    from feedbackhook.report.plots import draw_run

    console = plain_console(quiet=not is_main())
    try:
        with run_progress(console) as progress:
            config = config_from(RunConfig, given)
            result = train(config, resume=given.resume, progress=progress, tell=console.print, draw=draw_run)
    except KeyboardInterrupt:
        console.print("interrupted; --resume continues after the last finished epoch, if there is one")
        raise
    _print_result(console, result)
    return 0


def _print_result(console: Console, result: RunResult) -> None:
    epochs = "1 epoch" if result.epoch == 1 else f"{result.epoch} epochs"
    if result.reason is None:
        console.print(f"{result.status} after {epochs}")
    else:
        console.print(f"{result.status}: {result.reason} ({epochs} kept)")
    if result.last_error is not None and result.best_error is not None:
        best = f"best {result.best_error:.2f}% (epoch {result.best_epoch})"
        console.print(f"test error: last {result.last_error:.2f}%, {best}")
    console.print(f"run folder: {result.folder}")
    if result.figures:
        console.print(f"figures: {len(result.figures)} in {result.folder}/figures")


TRAIN = Command(
    name="train",
    help="train a network and leave a run folder",
    description="Train a network with feedback weights. Leaves a run folder with a table and figures.",
    arguments=_arguments,
    run=_train,
    takes_config=True,
)
