"""Decodes every image of a dataset, and names all that is missing, damaged or other than published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import registry as datasets
from feedbackhook.experiments.data import sources as data_sources
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.experiments.data.sources import Item


@dataclass(frozen=True)
class CheckedSplit:
    """What is in a split, and what should be.

    Args:
        name: `train`, `test`, or `all` images, where a split is drawn from them or they come without one.
        classes: among the images that can be decoded.
        images: that can be decoded; of a draw, all.
        expected: what was published, in words; empty where that is not known.
    """

    name: str
    classes: int
    images: int
    expected: str = ""


@dataclass(frozen=True)
class Checked:
    """What was found.

    Args:
        splits: those that could be opened.
        faults: all that is missing, damaged or other than published, each by its path.
        way_out: what to do where files are missing.
        short: classes of a draw that have fewer samples than are drawn, and are used with what they have.
        differs: how the folder of a draw differs from the published one, though all that the draw needs is
            there.
        note: what of the dataset is ours, or is not known to be as in the paper.
    """

    splits: list[CheckedSplit]
    faults: list[str]
    way_out: str
    short: list[str]
    differs: list[str]
    note: str


def check(config: DataConfig) -> Checked:
    """Decode every image that ``config`` names, and of a folder from which images are drawn all others too.

    Raises:
        ConfigError: no dataset has this name, or it has no files, or a package is missing that reads it.
    """
    if config.name == "digits":
        raise ConfigError("digits come with scikit-learn: there are no files to check")
    sources, dataset = data_sources.find(config), datasets.PAPER.get(config.name)
    faults, splits = list(sources.faults), []
    way_out, note = sources.way_out if sources.faults else "", dataset.note if dataset is not None else ""
    if sources.folder is not None and dataset is not None and dataset.draw is not None:
        expected = f"{dataset.draw.of:,} classes"
        splits.append(_decoded("all", sources.folder, expected, faults))
        for name, items in sources.splits.items():  # part of the above
            classes = len({item.label for item in items})
            splits.append(CheckedSplit(name, classes, len(items), _published(dataset, name)))
        return Checked(splits, faults, way_out, sources.short, sources.differs, note)
    for name, items in sources.splits.items():
        split = _decoded(name, items, _published(dataset, name), faults)
        splits.append(split)
        if dataset is None or sources.faults:  # which say why images are missing
            continue
        decoded = split.images == len(items)  # else a class may be missing for its images' sake
        whole = dataset.about or len(items) == _count(dataset, name)
        if not whole or (decoded and split.classes != dataset.classes):
            where = ", ".join(map(str, data_sources.locations(config)))
            what = f"{split.classes} classes, {len(items):,} images"
            faults.append(f"{where}: {name} holds {what} in the place of {split.expected}")
    return Checked(splits, faults, way_out, sources.short, sources.differs, note)


def _decoded(name: str, items: Sequence[Item], expected: str, faults: list[str]) -> CheckedSplit:
    """Decodes each image; those that cannot be join ``faults``."""
    labels = []
    for item in items:
        try:
            labels.append(data_sources.decode(item)[1])
        except ConfigError as error:
            faults.append(str(error))
    return CheckedSplit(name, len(set(labels)), len(labels), expected)


def _count(dataset: Dataset, split: str) -> int:
    return {"train": dataset.train, "test": dataset.test}[split]


def _published(dataset: Dataset | None, split: str) -> str:
    if dataset is None:
        return ""
    at_most = {"train": dataset.train_at_most, "test": dataset.test_at_most}[split]
    words = "about " if dataset.about else "at most " if at_most else ""
    samples = "segments" if dataset.name == "TIMIT-80" else "images"
    return f"{dataset.classes} classes, {words}{_count(dataset, split):,} {samples}"
