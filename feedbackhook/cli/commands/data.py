"""`feedbackhook data list` and `feedbackhook data check`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table
from rich.text import Text

from feedbackhook.cli.parsers import Command
from feedbackhook.cli.printing import plain_table, print_whole

if TYPE_CHECKING:
    from feedbackhook.experiments.data.registry import Dataset
    from feedbackhook.experiments.data.verify import Checked

_DAMAGED = 2
_COLUMNS = 80


def _list_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")


def _list(given: Namespace) -> int:
    from feedbackhook.experiments.data.registry import DATASETS

    datasets = list(DATASETS.values())
    if given.json:
        print(json.dumps([dataset.described() for dataset in datasets], indent=2))
        return 0
    print_whole(_counts(datasets), "")
    print_whole(_home_pages(datasets), "")
    for paragraph in _paragraphs(datasets):
        print(textwrap.fill(paragraph, _COLUMNS, break_on_hyphens=False, break_long_words=False))
    return 0


def _counts(datasets: Iterable[Dataset]) -> Table:
    table = plain_table(show_edge=False)
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
    table = plain_table(show_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("home page", overflow="fold")
    for dataset in datasets:
        table.add_row(dataset.name, dataset.home_page)
    return table


def _paragraphs(datasets: Sequence[Dataset]) -> list[str]:
    from feedbackhook.experiments.data.digits import DIGITS

    licenses: dict[str, list[str]] = {}
    for dataset in datasets:
        licenses.setdefault(dataset.license, []).append(dataset.name)
    by_license = [f"{license}: {', '.join(names)}" for license, names in licenses.items()]
    downloads = ", ".join(dataset.name for dataset in datasets if dataset.downloadable)
    drawn = ", ".join(dataset.name for dataset in datasets if dataset.draw is not None)
    return [
        f"--data.download true downloads {downloads}; get the others from their home pages.",
        f"Licenses: {'; '.join(by_license)}.",
        *(f"{dataset.name}: {dataset.note}" for dataset in datasets if dataset.note),
        f"Drawn from larger sets: {drawn}. The draws are fixed and ours, since none are published.",
        f"data.name can also be {DIGITS}, imagefolder:PATH, or another class of torchvision.datasets.",
    ]


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", type=str, help="as data.name; --root has no effect on imagefolder:PATH")
    parser.add_argument("--root", type=str, default="data", help="as data.root")


def _check(given: Namespace) -> int:
    from feedbackhook.experiments.config import DataConfig
    from feedbackhook.experiments.data.verify import check

    found = check(DataConfig(given.name, root=given.root))
    count = len(found.problems)
    if count:
        verdict = f"{given.name} has {count} problem{'s' if count > 1 else ''}:"
    elif found.differs:
        verdict = f"{given.name} can be used: nothing that its draw needs is missing or damaged"
    else:
        verdict = f"{given.name} is complete: nothing is missing or damaged"
    hint = [f"What to do: {found.hint}"] if found.hint else []
    print_whole(_checked_table(found), verdict, *found.problems, *hint)
    return _DAMAGED if count else 0


def _checked_table(found: Checked) -> Table:
    table = plain_table()
    note = [f"Note: {found.note}"] if found.note else []
    if lines := [*found.short, *found.differs, *note]:  # with paths, which must not be cut or wrapped
        table.caption = Text("\n".join(lines), style="none", no_wrap=True, overflow="ignore")
        table.caption_justify = "left"
    for heading in ("split", "classes", "samples", "expected"):
        right = heading in ("classes", "samples")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for split in found.splits:
        table.add_row(split.name, f"{split.classes:,}", f"{split.images:,}", split.expected or "not known")
    return table


_LIST = Command(
    name="list",
    help="show the registered datasets",
    description="Show the registered datasets: size, home page, license, and where their files belong.",
    arguments=_list_arguments,
    run=_list,
)
_CHECK = Command(
    name="check",
    help="report all that is missing or damaged",
    description="Open and decode every file of a dataset, and report all that is missing or damaged.",
    arguments=_check_arguments,
    run=_check,
)
DATA = Command(
    name="data",
    help="show the registered datasets, or check the files of one",
    description="Show the registered datasets, or check the files of one.",
    subcommands=(_LIST, _CHECK),
)
