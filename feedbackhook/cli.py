"""The command line: ``feedbackhook train [CONFIG.yaml] [--key value ...]``, ``inspect`` and ``plot``."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console
    from rich.table import Table

    from feedbackhook.experiments.config import SweepConfig
    from feedbackhook.experiments.data_check import Checked
    from feedbackhook.experiments.datasets import Dataset
    from feedbackhook.experiments.folder import RunResult
    from feedbackhook.experiments.inspection import Inspection
    from feedbackhook.experiments.sweep import PlannedRun
    from feedbackhook.experiments.train import Progress

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_INTERRUPTED = 130  # as shells have it
_FAILED = 1
_ENDED = ("finished", "diverged", "failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for what cannot run so, 130 for an interruption.

    A diverged run is a result, not an error: its status is 0.
    """
    from feedbackhook import ExactGradientError
    from feedbackhook.experiments.config import ConfigError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser()
        given = parser.instantiate(parser.parse_args(_config_first(arguments)))
        return _COMMANDS[given.command](given[given.command])
    except (ArgumentError, ConfigError, ExactGradientError) as error:
        return _refuse(str(error), error)
    except UnicodeDecodeError as error:
        return _refuse(f"the configuration file is not UTF-8 text: {error}", error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        return _refuse(f"{error}: pip install 'feedbackhook[experiments]'", error)


def _refuse(message: str, error: Exception) -> int:
    logger.debug("refused", exc_info=error)
    print(f"feedbackhook: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE_ERROR


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from feedbackhook.experiments.config import RunConfig, SweepConfig
    from feedbackhook.experiments.inspection import InspectConfig

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
        "--formats", type=list[Literal["png", "svg", "pdf"]], default=["png", "svg"], help="kinds of files"
    )

    table = ArgumentParser(
        description="Make the table of a sweep: condition by dataset, beside the paper's error rates.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    table.add_argument("sweep", type=str, help="the folder of the sweep")
    table.add_argument(
        "--output", type=str | None, help="where table.md, table.csv and table.png go; null: into the sweep"
    )

    data = ArgumentParser(
        description="Show the paper's datasets, or check the files of one.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_list = ArgumentParser(
        description="Show the paper's datasets: size, home page, licence, and where each is looked for.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_list.add_argument(
        "--json", action="store_true", help="print one JSON array in the place of the table"
    )
    data_check = ArgumentParser(
        description="Open and decode every file of a dataset, and name all that is missing or damaged.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    data_check.add_argument("name", type=str, help="as data.name; of imagefolder:PATH the root has no effect")
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
    commands.add_subcommand("inspect", inspect, help="show a model's layers and what a patch would do")
    commands.add_subcommand("plot", plot, help="draw the figures of a run")
    commands.add_subcommand("data", data, help="show the paper's datasets, or check the files of one")
    actions = data.add_subcommands(required=True, dest="action")
    actions.add_subcommand("list", data_list, help="show the paper's datasets")
    actions.add_subcommand("check", data_check, help="name all that is missing or damaged")
    return parser


def _config_first(arguments: list[str]) -> list[str]:
    """``train FILE ...`` as ``train --config FILE ...``, and so for ``sweep``."""
    if len(arguments) > 1 and arguments[0] in ("train", "sweep") and not arguments[1].startswith("-"):
        return [arguments[0], "--config", *arguments[1:]]
    return arguments


def _train(given: Namespace) -> int:
    from rich.console import Console

    from feedbackhook.experiments.config import RunConfig
    from feedbackhook.experiments.train import train

    config = RunConfig(**{field.name: given[field.name] for field in fields(RunConfig)})
    console = Console(highlight=False, soft_wrap=True)
    try:
        with _progress(console) as progress:
            result = train(config, resume=given.resume, progress=progress)
    except KeyboardInterrupt:
        console.print("interrupted; --resume goes on from the last finished epoch, if there is one")
        return _INTERRUPTED
    _summary(console, result)
    return 0


def _sweep(given: Namespace) -> int:
    from rich.console import Console

    from feedbackhook.experiments.config import SweepConfig
    from feedbackhook.experiments.sweep import plan, shrink, sweep

    config = SweepConfig(**{field.name: given[field.name] for field in fields(SweepConfig)})
    console = Console(highlight=False, soft_wrap=True)
    runs, folder = plan(config), shrink(config).output
    if given.dry_run:
        _dry_run(console, config, runs)
        return 0
    try:
        with _sweep_progress(console, runs) as progress:
            results = sweep(config, progress)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return _INTERRUPTED
    ended = Counter(result.status for result in results.values())
    console.print(", ".join(f"{count} {status}" for status, count in sorted(ended.items())))
    for name, result in results.items():
        if result.status not in ("finished", "diverged"):
            console.print(f"{name} {result.status}: {result.reason}")
    console.print(f"runs: {folder}", f"their table: feedbackhook table {folder}", sep="\n")
    return 0 if set(ended) <= {"finished", "diverged"} else _FAILED


def _dry_run(console: Console, config: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    from feedbackhook.experiments.sweep import ended, estimate, shrink, workers

    estimates = estimate(runs)
    for run in runs:
        seconds, size = estimates[run.name]
        state = "  (has ended)" if ended(run) else ""
        console.print(f"{run.name}  {_duration(seconds)}, {_size(size)}{state}")
    left = [run for run in runs if not ended(run)]
    count = workers(config, runs)
    seconds = sum(estimates[run.name].seconds for run in left) / count
    size = sum(estimates[run.name].size for run in left)
    console.print(
        f"{len(runs)} runs, {len(left)} of them to be run: about {_duration(seconds)} with {count} at a "
        f"time, and {_size(size)} in {shrink(config).output}"
    )
    console.print("measured on some steps with random images; runs side by side slow one another down")


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _inspect(given: Namespace) -> int:
    from rich.console import Console

    from feedbackhook.experiments.inspection import InspectConfig, inspect

    config = InspectConfig(**{field.name: given[field.name] for field in fields(InspectConfig)})
    found = inspect(config)
    if given.json:
        content = {**vars(found), "layers": [layer._asdict() for layer in found.layers]}
        print(json.dumps(_without_nan(content), indent=2))
    else:
        console, table = Console(highlight=False, soft_wrap=True), _layer_table(found)
        if not console.is_terminal:  # a file or a pipe has no width to which the table should be cut
            console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
        console.print(table, *_totals(found), sep="\n")
    return 0


def _data(given: Namespace) -> int:
    return {"list": _data_list, "check": _data_check}[given.action](given[given.action])


def _data_list(given: Namespace) -> int:
    from feedbackhook.experiments.datasets import PAPER

    if given.json:
        print(json.dumps([asdict(dataset) for dataset in PAPER.values()], indent=2))
    else:
        drawn = ", ".join(name for name, dataset in PAPER.items() if dataset.draw is not None)
        _print_whole(
            _dataset_table(PAPER.values()),
            f"Drawn from larger sets: {drawn}. The draws are fixed and ours; the paper publishes none.",
            "data.name may also be digits, imagefolder:PATH, or another class of torchvision.datasets.",
        )
    return 0


def _data_check(given: Namespace) -> int:
    from feedbackhook.experiments.config import DataConfig
    from feedbackhook.experiments.data_check import check

    found = check(DataConfig(given.name, root=given.root))
    count = len(found.faults)
    whole = f"{given.name} is whole: nothing is missing or damaged"
    faults = f"{given.name} has {count} fault{'s' if count > 1 else ''}:"
    way_out = [f"What to do: {found.way_out}"] if found.way_out else []
    _print_whole(_checked_table(found), faults if count else whole, *found.faults, *way_out)
    return _USAGE_ERROR if count else 0


def _print_whole(table: Table, *lines: str) -> None:
    """Prints a table and lines, which hold paths, so that nothing is cut, wrapped or taken for markup."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe has no width to which the table should be cut
        console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    if table.row_count:
        console.print(table)
    for line in lines:
        console.print(line)


def _dataset_table(datasets: Iterable[Dataset]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("name", "in the paper", "classes", "training", "test", "downloads"):
        right = heading in ("classes", "training", "test")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for heading in ("in data.root", "licence", "source"):
        table.add_column(heading, overflow="fold")
    for dataset in datasets:
        table.add_row(
            dataset.name,
            dataset.paper_name,
            str(dataset.classes),
            f"{dataset.train:,}",
            f"{'≤ ' if dataset.test_at_most else ''}{dataset.test:,}",
            "yes" if dataset.downloads else "no",
            ", ".join(dataset.where),
            dataset.licence,
            dataset.source,
        )
    return table


def _checked_table(found: Checked) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("split", "classes", "images", "expected"):
        right = heading in ("classes", "images")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for split in found.splits:
        table.add_row(split.name, f"{split.classes:,}", f"{split.images:,}", split.expected or "not known")
    return table


def _plot(given: Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from feedbackhook.experiments.config import ConfigError
    from feedbackhook.recorder import read
    from feedbackhook.report.plots import draw_all

    try:
        table = read(given.run)
        written, missing = draw_all(table, given.output or Path(given.run) / "figures", given.formats)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    console = Console(highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"figure: {path}")
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}")
    return 0


def _table(given: Namespace) -> int:
    from feedbackhook.report.tables import as_markdown, sweep_table, write

    table = sweep_table(given.sweep)
    print(as_markdown(table))
    for path in write(table, given.output or given.sweep):
        print(path)
    return 0


def _layer_table(found: Inspection) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in (
        "depth",
        "layer",
        "kind",
        "shape",
        "weights",
        "rule",
        "upstream",
        "angle V, W",
        "norm V / W",
    ):
        right = heading in ("depth", "weights", "angle V, W", "norm V / W")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            "unused" if layer.depth is None else str(layer.depth),
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            layer.rule or "exact",
            {True: "yes", False: "no", None: ""}[layer.upstream],
            "" if layer.weight_angle is None else f"{layer.weight_angle:.1f}°",
            "" if layer.norm_ratio is None else f"{layer.norm_ratio:.2f}",
        )
    return table


def _totals(found: Inspection) -> list[str]:
    patched = sum(layer.rule is not None for layer in found.layers)
    rerouted = sum(layer.rule is not None and bool(layer.upstream) for layer in found.layers)
    share = 100 * found.patched_weights / found.parameters
    channels, height, width = found.image
    return [
        f"{found.model} on an image of {channels}x{height}x{width}: {len(found.layers)} layers, {patched} "
        f"patched, {rerouted} of these with an error signal to send on",
        f"{found.parameters:,} parameters, {found.patched_weights:,} of them ({share:.1f}%) patched weights",
    ]


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
    "inspect": _inspect,
    "plot": _plot,
    "data": _data,
}


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with loss and accuracy on a terminal, else nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

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
def _sweep_progress(
    console: Console, runs: Sequence[PlannedRun]
) -> Iterator[Callable[[dict[str, RunResult | None]], None]]:
    """How many runs have ended and the time that is left: a bar on a terminal, else a line an ended run."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    clock = _SweepClock(runs)
    shown: set[str] = set()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs  {task.description}"))
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(runs))

        def draw(states: dict[str, RunResult | None]) -> None:
            ended = {name: result for name, result in states.items() if result and result.status in _ENDED}
            left = clock.left(states)
            time_left = "" if left is None else f"about {_duration(left)} left"
            counts = Counter(result.status for result in states.values() if result)
            words = [f"{count} {status}" for status, count in sorted(counts.items())]
            bar.update(task, completed=len(ended), description=", ".join([*words, time_left]).rstrip(", "))
            for name in ended.keys() - shown:
                result = ended[name]
                best = "" if result.best_error is None else f": best test error {result.best_error:.2f}%"
                if not console.is_terminal and not clock.first:
                    words = [f"{name} {result.status}{best}", time_left]
                    console.print(f"[{len(ended)}/{len(runs)}]", ", ".join(words).rstrip(", "), markup=False)
            shown.update(ended)
            clock.first = False

        yield draw


class _SweepClock:
    """The time that a sweep still takes, at the pace of this one so far.

    Where datasets differ, an epoch of each weighs what a rehearsal of it took.
    """

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        from feedbackhook.experiments.sweep import estimate

        several = len({run.dataset for run in runs}) > 1
        estimates = estimate(runs) if several else {}
        self._epochs = {run.name: run.config.protocol.epochs for run in runs}
        self._weight = {run.name: estimates[run.name].seconds if several else 1.0 for run in runs}
        self._begin = time.monotonic()
        self._at_begin: float | None = None
        self.first = True

    def left(self, states: dict[str, RunResult | None]) -> float | None:
        """Seconds, or None where nothing has been done yet."""
        done = sum(self._weight[name] * self._share(name, result) for name, result in states.items())
        if self._at_begin is None:
            self._at_begin = done
        if done == self._at_begin:
            return None
        pace = (done - self._at_begin) / (time.monotonic() - self._begin)
        return (sum(self._weight.values()) - done) / pace

    def _share(self, name: str, result: RunResult | None) -> float:
        if result is None:
            return 0.0
        return 1.0 if result.status in _ENDED else result.epoch / self._epochs[name]


def _summary(console: Console, result: RunResult) -> None:
    ended = result.status if result.reason is None else f"{result.status}: {result.reason}"
    console.print(f"{ended} ({result.epoch} epochs kept)")
    if result.last_error is not None and result.best_error is not None:
        best = f"best {result.best_error:.2f}% (epoch {result.best_epoch})"
        console.print(f"test error: last {result.last_error:.2f}%, {best}")
    console.print(f"run folder: {result.folder}")
    if result.figures:
        console.print(f"figures: {len(result.figures)} in {result.folder}/figures")
