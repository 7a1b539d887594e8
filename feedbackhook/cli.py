"""The command line: ``feedbackhook COMMAND``; what it prints is made in console.py."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from feedbackhook.console import (
    checked_table,
    duration,
    file_size,
    layer_table,
    layer_totals,
    mean_table,
    print_datasets,
    print_whole,
    rate_lines,
    run_progress,
    run_summary,
    sweep_progress,
    test_table,
    too_few_lines,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from feedbackhook.experiments.config import SweepConfig
    from feedbackhook.experiments.sweep.grid import PlannedRun

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_FAILED = 1
_OF_ANALYSIS = ("altair", "jinja2", "vl_convert")  # what the extra of this name installs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 where runs of a sweep failed, 2 for what cannot run
    so, 130 for an interruption, 143 for SIGTERM.

    A diverged run is a result, not an error: its status is 0.
    """
    from feedbackhook import ExactGradientError
    from feedbackhook.experiments.config import ConfigError
    from feedbackhook.experiments.parser_messages import plain_words
    from feedbackhook.experiments.training.stopping import exit_status
    from feedbackhook.report.errors import ReportError
    from feedbackhook.store.errors import StoreError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser()
        given = parser.instantiate(parser.parse_args(_config_first(arguments)))
        _check_processes(given.command)
        return _COMMANDS[given.command](given[given.command])
    except ArgumentError as error:
        return _refuse(plain_words(error), error)
    except (ConfigError, StoreError, ReportError, ExactGradientError) as error:
        return _refuse(str(error), error)
    except UnicodeDecodeError as error:
        return _refuse(f"the configuration file is not UTF-8 text: {error}", error)
    except KeyboardInterrupt as stop:
        return exit_status(stop)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        extra = "analysis" if error.name in _OF_ANALYSIS else "experiments"
        return _refuse(f"{error}: pip install 'feedbackhook[{extra}]'", error)


def _check_processes(command: str) -> None:
    from feedbackhook.experiments.training.processes import shared_error, world_size

    if command == "sweep" and (count := world_size()) > 1:
        raise shared_error(
            f"torchrun has started {count} processes, and each would run the whole sweep: start it without "
            "torchrun; it makes its own processes"
        )


def _refuse(message: str, error: Exception) -> int:
    """Tells the user what is wrong; of several processes one does."""
    from feedbackhook.experiments.training.processes import ReportedByMain, is_local_main

    logger.debug("refused", exc_info=error)
    if is_local_main() and not isinstance(error, ReportedByMain):
        print(f"feedbackhook: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE_ERROR


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from feedbackhook.experiments.config import RunConfig, SweepConfig
    from feedbackhook.experiments.models.inspection import InspectConfig

    train = ArgumentParser(
        description="Train a network with feedback weights; leaves a run folder with a table and figures.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    train.add_argument(
        "--config", action="config", help="a YAML file; its name alone may stand first instead"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run folder")
    train.add_class_arguments(RunConfig)

    sweep = ArgumentParser(
        description="Run the product of conditions, datasets, learning rates and seeds. The same command "
        "goes on where it stopped; feedbackhook table makes its table.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    sweep.add_argument(
        "--config", action="config", help="a YAML file; its name alone may stand first instead"
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="show the runs and what they would take; run none"
    )
    sweep.add_class_arguments(SweepConfig)

    inspect = ArgumentParser(
        description="Show a model's layers in forward order, which would be patched, and what V would be.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    inspect.add_class_arguments(InspectConfig, as_positional=True)
    inspect.add_argument(
        "--json", action="store_true", help="print one JSON object in the place of the table"
    )

    plot = ArgumentParser(
        description="Draw every figure for which the table of a run, or of all runs in a folder, has values.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    plot.add_argument("run", type=str, help="a run folder, or a folder of such")
    plot.add_argument("--output", type=str | None, help="where the figures go; null: RUN/figures")
    plot.add_argument(
        "--size", type=Literal["readme", "column", "slide"], default="readme", help="where they are shown"
    )
    plot.add_argument("--dark", type=bool, default=False, help="light on dark")
    plot.add_argument(
        "--formats", type=list[Literal["png", "svg", "pdf"]], default=["png", "svg"], help="kinds of files"
    )

    table = ArgumentParser(
        description="Make the table of a sweep: condition by dataset, beside the paper's error rates.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    table.add_argument("sweep", type=str, help="the folder of the sweep")
    table.add_argument(
        "-o",
        "--output",
        type=str | None,
        help="where table.md, table.csv and table.png go; null: into the sweep",
    )

    report = ArgumentParser(
        description="Write a page about a sweep: its table, curves, alignment and runs, in one HTML file "
        "that needs no network.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    report.add_argument("sweep", type=str, help="the folder of the sweep")
    report.add_argument("-o", "--output", type=str | None, help="the file; null: report.html in the sweep")

    compare = ArgumentParser(
        description="Compare configurations over their seeds, each at the learning rate chosen for it: final "
        "and best test error with 95% intervals, and a paired test against the first.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    compare.add_argument("runs", type=str, nargs="+", help="run folders, or folders of such")
    compare.add_argument(
        "--against",
        type=str | None,
        help="the configuration that the others are tested against; `all`: test each two; null: the first",
    )
    compare.add_argument(
        "--rates", type=bool, default=False, help="set learning rates beside each other, and choose none"
    )

    data = ArgumentParser(
        description="Show the registered datasets, or check the files of one.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_list = ArgumentParser(
        description="Show the registered datasets: size, home page, license, and where their files belong.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_list.add_argument(
        "--json", action="store_true", help="print one JSON array in the place of the table"
    )
    data_check = ArgumentParser(
        description="Open and decode every file of a dataset, and report all that is missing or damaged.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_check.add_argument("name", type=str, help="as data.name; --root has no effect on imagefolder:PATH")
    data_check.add_argument("--root", type=str, default="data", help="as data.root")

    parser = ArgumentParser(
        prog="feedbackhook",
        description="Train networks whose error signals travel through feedback weights of your choice.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("train", train, help="train a network and leave a run folder")
    commands.add_subcommand("sweep", sweep, help="train under many conditions, on many data")
    commands.add_subcommand("table", table, help="make the table of a sweep, beside the paper's")
    commands.add_subcommand("report", report, help="write a page about a sweep, in one HTML file")
    commands.add_subcommand("compare", compare, help="compare configurations over their seeds")
    commands.add_subcommand("inspect", inspect, help="show a model's layers and what a patch would do")
    commands.add_subcommand("plot", plot, help="draw the figures of a run")
    commands.add_subcommand("data", data, help="show the registered datasets, or check the files of one")
    actions = data.add_subcommands(required=True, dest="action")
    actions.add_subcommand("list", data_list, help="show the registered datasets")
    actions.add_subcommand("check", data_check, help="report all that is missing or damaged")
    return parser


def _config_first(arguments: list[str]) -> list[str]:
    """``train FILE ...`` as ``train --config FILE ...``, and so for ``sweep``."""
    if len(arguments) > 1 and arguments[0] in ("train", "sweep") and not arguments[1].startswith("-"):
        return [arguments[0], "--config", *arguments[1:]]
    return arguments


def _train(given: Namespace) -> int:
    from rich.console import Console

    from feedbackhook.experiments.config import RunConfig
    from feedbackhook.experiments.training.processes import is_main
    from feedbackhook.experiments.training.run import train
    from feedbackhook.report.plots import draw_run

    config = RunConfig(**{field.name: given[field.name] for field in fields(RunConfig)})
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not is_main())
    try:
        with run_progress(console) as progress:
            result = train(config, resume=given.resume, progress=progress, tell=console.print, draw=draw_run)
    except KeyboardInterrupt:
        console.print("interrupted; --resume goes on from the last finished epoch, if there is one")
        raise
    run_summary(console, result)
    return 0


def _sweep(given: Namespace) -> int:
    from rich.console import Console

    from feedbackhook.experiments.config import SweepConfig
    from feedbackhook.experiments.sweep.grid import plan, shrink
    from feedbackhook.experiments.sweep.run import sweep

    config = SweepConfig(**{field.name: given[field.name] for field in fields(SweepConfig)})
    console = Console(highlight=False, soft_wrap=True, markup=False)
    runs, folder = plan(config), shrink(config).output
    if given.dry_run:
        _dry_run(console, config, runs)
        return 0
    try:
        with sweep_progress(console, runs) as progress:
            results = sweep(config, progress, console.print, runs)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        raise
    ended = Counter(result.status for result in results.values())
    console.print(", ".join(f"{count} {status}" for status, count in sorted(ended.items())))
    for name, result in results.items():
        if not result.ended:
            console.print(f"{name} {result.status}: {result.reason}")
    console.print(f"runs: {folder}", f"their table: feedbackhook table {folder}", sep="\n")
    return 0 if all(result.ended for result in results.values()) else _FAILED


def _dry_run(console: Console, config: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    from feedbackhook.experiments.sweep.estimate import estimate
    from feedbackhook.experiments.sweep.grid import check, ended, shrink
    from feedbackhook.experiments.sweep.local import workers

    check(runs)
    estimates = estimate(runs)
    for run in runs:
        seconds, size = estimates[run.name]
        state = "  (has ended)" if ended(run) else ""
        console.print(f"{run.name}  {duration(seconds)}, {file_size(size)}{state}")
    left = [run for run in runs if not ended(run)]
    count = 1 if config.backend == "dask" else workers(config, runs)
    seconds = sum(estimates[run.name].seconds for run in left) / count
    size = sum(estimates[run.name].size for run in left)
    console.print(
        f"{len(runs)} runs, {len(left)} of them to be run: about {duration(seconds)} with {count} at a "
        f"time, and {file_size(size)} in {shrink(config).output}"
    )
    console.print("measured on some steps with random images; runs side by side slow one another down")
    if left and config.record.weights == "all":
        console.print("weights and checkpoints count: --record.weights best keeps less, none the least")


def _inspect(given: Namespace) -> int:
    from feedbackhook.experiments.models.inspection import InspectConfig, inspect

    config = InspectConfig(**{field.name: given[field.name] for field in fields(InspectConfig)})
    found = inspect(config)
    if given.json:
        content = {**vars(found), "layers": [layer._asdict() for layer in found.layers]}
        print(json.dumps(_without_nan(content), indent=2))
    else:
        print_whole(layer_table(found), *layer_totals(found))
    return 0


def _data(given: Namespace) -> int:
    return {"list": _data_list, "check": _data_check}[given.action](given[given.action])


def _data_list(given: Namespace) -> int:
    from feedbackhook.experiments.data.registry import DATASETS

    if given.json:
        print(json.dumps([dataset.described() for dataset in DATASETS.values()], indent=2))
    else:
        print_datasets(list(DATASETS.values()))
    return 0


def _data_check(given: Namespace) -> int:
    from feedbackhook.experiments.config import DataConfig
    from feedbackhook.experiments.data.verify import check

    found = check(DataConfig(given.name, root=given.root))
    count = len(found.problems)
    summary = f"{given.name} is complete: nothing is missing or damaged"
    if found.differs:
        summary = f"{given.name} can be used: nothing that its draw needs is missing or damaged"
    if count:
        summary = f"{given.name} has {count} problem{'s' if count > 1 else ''}:"
    hint = [f"What to do: {found.hint}"] if found.hint else []
    print_whole(checked_table(found), summary, *found.problems, *hint)
    return _USAGE_ERROR if count else 0


def _plot(given: Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from feedbackhook.experiments.config import ConfigError
    from feedbackhook.report import theme
    from feedbackhook.report.plots import draw_all
    from feedbackhook.store.recorder import read

    try:
        table = read(given.run)
        with theme.use(given.size, given.dark):
            written, missing = draw_all(table, given.output or Path(given.run) / "figures", given.formats)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for path in written:
        console.print(f"figure: {path}")
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}")
    return 0


def _table(given: Namespace) -> int:
    from feedbackhook.report.aggregate import sweep_table
    from feedbackhook.report.tables import as_markdown, write

    table = sweep_table(given.sweep)
    print(as_markdown(table))
    for path in write(table, given.output or given.sweep):
        print(path)
    return 0


def _report(given: Namespace) -> int:
    from pathlib import Path

    from feedbackhook.report.html.page import write

    print(write(given.sweep, given.output or Path(given.sweep) / "report.html"))
    return 0


def _compare(given: Namespace) -> int:
    from feedbackhook.report.compare import compare
    from feedbackhook.report.runs import collect

    runs = collect(*given.runs)
    found = compare(runs, given.against, given.rates)
    left_out = [f"left out: {name}: {reason}" for name, reason in runs.skipped.items()]
    too_few = too_few_lines(found)
    if found.tests["p"].notna().any():
        print_whole(mean_table(found), *rate_lines(found), *left_out)
        print_whole(test_table(found), *too_few)
    else:
        print_whole(mean_table(found), *rate_lines(found), *left_out, *too_few)
    return 0


def _without_nan(content: Any) -> Any:
    """The same with null for what is not a number, of which JSON knows nothing."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "train": _train,
    "sweep": _sweep,
    "table": _table,
    "report": _report,
    "compare": _compare,
    "inspect": _inspect,
    "plot": _plot,
    "data": _data,
}
