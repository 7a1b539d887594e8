"""What the command line prints: tables, bars and summaries."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from feedbackhook.experiments.data.registry import Dataset
    from feedbackhook.experiments.data.verify import Checked
    from feedbackhook.experiments.models.inspection import Inspection
    from feedbackhook.experiments.sweep.grid import PlannedRun
    from feedbackhook.experiments.training.progress import Progress
    from feedbackhook.report.compare import Comparison
    from feedbackhook.store.run_folder import RunResult

_COLUMNS = 80


def print_whole(table: Table, *lines: str) -> None:
    """Prints a table and lines, which hold paths, so that nothing is cut, wrapped or taken for markup."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe has no width to which the table should be cut
        console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    if table.row_count:
        console.print(table)
    for line in lines:
        console.print(line)


def print_datasets(datasets: Sequence[Dataset]) -> None:
    """Print the datasets within 80 columns: counts and paths, then home pages, then the rest."""
    from feedbackhook.experiments.data.digits import DIGITS

    print_whole(_dataset_counts(datasets), "")
    print_whole(_home_pages(datasets), "")
    licenses: dict[str, list[str]] = {}
    for dataset in datasets:
        licenses.setdefault(dataset.license, []).append(dataset.name)
    downloads = ", ".join(dataset.name for dataset in datasets if dataset.downloadable)
    drawn = ", ".join(dataset.name for dataset in datasets if dataset.draw is not None)
    of_licenses = [f"{license}: {', '.join(names)}" for license, names in licenses.items()]
    paragraphs = [
        f"--data.download true downloads {downloads}; get the others from their home pages.",
        f"Licenses: {'; '.join(of_licenses)}.",
        *(f"{dataset.name}: {dataset.note}" for dataset in datasets if dataset.note),
        f"Drawn from larger sets: {drawn}. The draws are fixed and ours, since none are published.",
        f"data.name can also be {DIGITS}, imagefolder:PATH, or another class of torchvision.datasets.",
    ]
    for paragraph in paragraphs:
        print(textwrap.fill(paragraph, _COLUMNS, break_on_hyphens=False, break_long_words=False))


def _dataset_counts(datasets: Iterable[Dataset]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for heading in ("name", "classes", "training", "test"):
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    table.add_column("in data.root", overflow="fold")
    about = {True: "≈ ", False: ""}
    for dataset in datasets:
        table.add_row(
            dataset.name,
            str(dataset.classes),
            f"{'≤ ' if dataset.train_at_most else about[dataset.approximate]}{dataset.train:,}",
            f"{'≤ ' if dataset.test_at_most else about[dataset.approximate]}{dataset.test:,}",
            "\n".join(dataset.paths),
        )
    return table


def _home_pages(datasets: Iterable[Dataset]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("home page", overflow="fold")
    for dataset in datasets:
        table.add_row(dataset.name, dataset.home_page)
    return table


def _write_below(table: Table, lines: Sequence[str]) -> None:
    """Lines under a table, which hold paths: they are not cut or wrapped."""
    from rich.text import Text

    if lines:
        table.caption = Text("\n".join(lines), style="none", no_wrap=True, overflow="ignore")
        table.caption_justify = "left"


def checked_table(found: Checked) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    note = [f"Note: {found.note}"] if found.note else []
    _write_below(table, [*found.short, *found.differs, *note])
    for heading in ("split", "classes", "samples", "expected"):
        right = heading in ("classes", "samples")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for split in found.splits:
        table.add_row(split.name, f"{split.classes:,}", f"{split.images:,}", split.expected or "not known")
    return table


def mean_table(found: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, title="test error [%]: mean over seeds (95% interval)")
    headings = ["configuration", "dataset", *(["rate"] if found.chosen_by else []), "runs", "final", "best"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("configuration", "dataset") else "right")
    for row in found.means.to_dict("records"):
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        spans = (
            interval_text(*(row[f"{kind}_{end}"] for end in ("mean", "low", "high")))
            for kind in ("final", "best")
        )
        rate = [f"{row['learning_rate']:g}"] if found.chosen_by else []
        table.add_row(row["configuration"], row["dataset"], *rate, f"{row['runs']}{diverged}", *spans)
    return table


def rate_lines(found: Comparison) -> list[str]:
    """How learning rates were chosen."""
    if not found.chosen_by:
        return []
    most = found.means["rates"].max()
    return [
        f"rate: the learning rate, of up to {most}, with the smallest {found.chosen_by}",
        "(--rates true shows all rates beside each other)",
    ]


def test_table(found: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    from feedbackhook.report.compare import ERRORS

    tests = found.tests
    several = tests["second"].nunique() > 1
    title = "first less second" if several else f"less {tests['second'].iloc[0]}"
    title += ", on the same data with the same seed: Wilcoxon's signed-rank test"
    if (count := tests["p"].notna().sum()) > len(ERRORS):
        title += f"; p is not corrected for {count} tests"
    table = Table(box=box.SIMPLE, pad_edge=False, title=title)
    names = ["first", "second"] if several else ["configuration"]
    for heading in (*names, "error", "pairs", "median [points]", "effect", "verdict"):
        table.add_column(
            heading, justify="right" if heading in ("pairs", "median [points]", "effect") else "left"
        )
    for row in tests.to_dict("records"):
        median = "" if row["pairs"] == 0 else f"{row['difference']:+.2f}"
        effect = "" if row["effect"] is None or row["effect"] != row["effect"] else f"{row['effect']:+.2f}"
        compared = (row["first"], row["second"])[: len(names)]
        table.add_row(*compared, row["error"], str(row["pairs"]), median, effect, row["verdict"])
    return table


def too_few_lines(found: Comparison) -> list[str]:
    """Which tests could not be made, said once."""
    from feedbackhook.report.statistics import LEAST_PAIRS

    few = found.tests[found.tests["p"].isna()]
    if few.empty:
        return []
    which = "every test" if len(few) == len(found.tests) else f"{len(few)} of {len(found.tests)} tests"
    most = few["differing"].max()
    return [
        f"Too few runs for {which}: one takes {LEAST_PAIRS} pairs, on the same data with the same seed, "
        f"whose errors differ, and there are at most {most}."
    ]


def interval_text(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}" if low != low else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def layer_table(found: Inspection) -> Table:
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


def layer_totals(found: Inspection) -> list[str]:
    patched = sum(layer.rule is not None for layer in found.layers)
    rerouted = sum(layer.rule is not None and bool(layer.upstream) for layer in found.layers)
    share = 100 * found.patched_weights / found.parameters
    channels, height, width = found.image
    of = f"an image of {channels}x{height}x{width}" if height > 1 else f"{channels} features"
    return [
        f"{found.model} on {of}: {len(found.layers)} layers, {patched} patched, "
        f"{rerouted} of these with an error signal to send on",
        f"{found.parameters:,} parameters, {found.patched_weights:,} of them ({share:.1f}%) patched weights",
    ]


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def file_size(count: float) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


@contextmanager
def run_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
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
def sweep_progress(
    console: Console, runs: Sequence[PlannedRun]
) -> Iterator[Callable[[dict[str, RunResult | None]], None]]:
    """How many runs have ended and the time that is left: a bar on a terminal, else a line an ended run."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    from feedbackhook.experiments.sweep.progress import ENDED, SweepClock

    clock = SweepClock(runs)
    shown: dict[str, str] = {}
    told: list[bool] = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs  {task.description}"))
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(runs))

        def draw(states: dict[str, RunResult | None]) -> None:
            ended = {name: result for name, result in states.items() if result and result.status in ENDED}
            left = clock.left(states)
            time_left = "" if left is None else f"about {duration(left)} left"
            counts = Counter(result.status for result in states.values() if result)
            words = [f"{count} {status}" for status, count in sorted(counts.items())]
            bar.update(task, completed=len(ended), description=", ".join([*words, time_left]).rstrip(", "))
            for name, result in ended.items():
                if shown.get(name) != result.status and told and not console.is_terminal:
                    best = "" if result.best_error is None else f": best test error {result.best_error:.2f}%"
                    words = [f"{name} {result.status}{best}", time_left]
                    console.print(f"[{len(ended)}/{len(runs)}]", ", ".join(words).rstrip(", "), markup=False)
            shown.clear()  # but for what has ended: a run that failed may fail again
            shown.update({name: result.status for name, result in ended.items()})
            told.append(True)  # what had ended before is no news

        yield draw


def run_summary(console: Console, result: RunResult) -> None:
    ended = result.status if result.reason is None else f"{result.status}: {result.reason}"
    console.print(f"{ended} ({result.epoch} epochs kept)")
    if result.last_error is not None and result.best_error is not None:
        best = f"best {result.best_error:.2f}% (epoch {result.best_epoch})"
        console.print(f"test error: last {result.last_error:.2f}%, {best}")
    console.print(f"run folder: {result.folder}")
    if result.figures:
        console.print(f"figures: {len(result.figures)} in {result.folder}/figures")
