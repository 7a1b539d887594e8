"""Checks a dataset: decodes every sample, and reports all that is missing, damaged or not as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.decode import decode
from feedbackhook.experiments.data.digits import DIGITS
from feedbackhook.experiments.data.items import Item
from feedbackhook.experiments.data.registry import DATASETS, Dataset


@dataclass(frozen=True)
class CheckedSplit:
    """The contents of a split, and what they should be.

    Args:
        name: `train`, `test`, or `all`, if a split is drawn from all images or the data come without one.
        classes: number of classes among the images that can be decoded.
        images: number of images that can be decoded; for the splits of a draw, of all images.
        expected: what was published, in words; empty if unknown.
    """

    name: str
    classes: int
    images: int
    expected: str = ""


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Args:
        splits: the splits that could be opened.
        problems: all that is missing, damaged or not as published, each with its path.
        hint: what to do if files are missing.
        short: classes in a draw that have fewer samples than are drawn, and are used with what they have.
        differs: how the folder of a draw differs from the published one, although it has all that the draw
            needs.
        note: what a reader of results should know about this version of the dataset.
    """

    splits: list[CheckedSplit]
    problems: list[str]
    hint: str
    short: list[str]
    differs: list[str]
    note: str


def check(config: DataConfig) -> Checked:
    """Decode every image of the data; if they are a draw from a folder, every image in the folder.

    Raises:
        ConfigError: no dataset has this name, it has no files, or a package that is needed to read it is not
            installed.
    """
    if config.name == DIGITS:
        raise ConfigError(f"{DIGITS} comes with scikit-learn and has no files to check")
    sources, dataset = readers.find(config), DATASETS.get(config.name)
    problems, splits = list(sources.problems), []
    if sources.folder is not None and dataset is not None and dataset.draw is not None:
        expected = f"{dataset.draw.folder_classes:,} classes"
        splits.append(_decoded("all", sources.folder, expected, problems))
        for name, items in sources.splits.items():  # part of the above
            classes = len({item.label for item in items})
            splits.append(CheckedSplit(name, classes, len(items), _published(dataset, name)))
    else:
        for name, items in sources.splits.items():
            split = _decoded(name, items, _published(dataset, name), problems)
            splits.append(split)
            if dataset is None or sources.problems:  # these say why images are missing
                continue
            decoded = split.images == len(items)  # otherwise a class may be missing because its images are
            complete = dataset.approximate or len(items) == _count(dataset, name)
            if not complete or (decoded and split.classes != dataset.classes):
                where = ", ".join(map(str, readers.locations(config)))
                what = f"{split.classes} classes, {len(items):,} images"
                problems.append(f"{where}: {name} has {what} instead of {split.expected}")
    return Checked(
        splits,
        problems,
        hint=sources.hint if sources.problems else "",
        short=sources.short,
        differs=sources.differs,
        note=dataset.note if dataset is not None else "",
    )


def _decoded(name: str, items: Sequence[Item], expected: str, problems: list[str]) -> CheckedSplit:
    """Decode each image; add those that cannot be decoded to ``problems``."""
    labels = []
    for item in items:
        try:
            labels.append(decode(item)[1])
        except ConfigError as error:
            problems.append(str(error))
    return CheckedSplit(name, len(set(labels)), len(labels), expected)


def _count(dataset: Dataset, split: str) -> int:
    return {"train": dataset.train, "test": dataset.test}[split]


def _published(dataset: Dataset | None, split: str) -> str:
    if dataset is None:
        return ""
    at_most = {"train": dataset.train_at_most, "test": dataset.test_at_most}[split]
    words = "about " if dataset.approximate else "at most " if at_most else ""
    return f"{dataset.classes} classes, {words}{_count(dataset, split):,} {dataset.sample}s"
