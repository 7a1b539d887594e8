"""The command line: ``feedbackhook train [CONFIG.yaml] [--key value ...]``, ``inspect`` and ``plot``."""

from __future__ import annotations

import json
import logging
import math
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console
    from rich.table import Table

    from feedbackhook.experiments.folder import RunResult
    from feedbackhook.experiments.inspection import Inspection
    from feedbackhook.experiments.train import Progress

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_INTERRUPTED = 130  # as shells have it


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

    from feedbackhook.experiments.config import RunConfig
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

    parser = ArgumentParser(
        prog="feedbackhook",
        description="Train networks whose error signals travel through feedback weights of your choice.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("train", train, help="train a network and leave a run folder")
    commands.add_subcommand("inspect", inspect, help="show a model's layers and what a patch would do")
    commands.add_subcommand("plot", plot, help="draw the figures of a run")
    return parser


def _config_first(arguments: list[str]) -> list[str]:
    """``train FILE ...`` as ``train --config FILE ...``."""
    if len(arguments) > 1 and arguments[0] == "train" and not arguments[1].startswith("-"):
        return ["train", "--config", *arguments[1:]]
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


_COMMANDS: dict[str, Callable[[Any], int]] = {"train": _train, "inspect": _inspect, "plot": _plot}


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


def _summary(console: Console, result: RunResult) -> None:
    ended = result.status if result.reason is None else f"{result.status}: {result.reason}"
    console.print(f"{ended} ({result.epoch} epochs kept)")
    if result.last_error is not None and result.best_error is not None:
        best = f"best {result.best_error:.2f}% (epoch {result.best_epoch})"
        console.print(f"test error: last {result.last_error:.2f}%, {best}")
    console.print(f"run folder: {result.folder}")
    if result.figures:
        console.print(f"figures: {len(result.figures)} in {result.folder}/figures")
