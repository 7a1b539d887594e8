"""The datasets that are known by name: counts, home page, license, reader, and the network for each.

A package that brings datasets registers them when it is imported, as `feedbackhook.liao2016` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.items import Sources

LIBRARIES = ("torchvision", "pillow")
"""The packages that decode images."""


@dataclass(frozen=True)
class Draw:
    """A random choice of classes, and of images from each, out of a larger set.

    Args:
        folder_classes: number of classes in the complete set, not counting those in `exclude`.
        train: number of training images to draw from each class.
        test: number of test images to draw from the images that are left.
        min_test: smallest number of test images, for classes that have fewer images left than `test`.
        min_train: smallest number of training images, for classes that have fewer images than `train`;
            None: a class must have `train` of them.
        exclude: folders that are not classes of this draw.
        large_enough: draw only from classes that have enough images, and first from those that have
            `train + test`. False: every class that is drawn must have enough.
        last_class: the class that is drawn last from the complete set. An incomplete set in which it is also
            drawn last yields the same classes. Empty if unknown; then the set must be complete.
        folder_images: number of images in the complete set, not counting `exclude`; None if unknown.
        digest: hash of the images drawn from the complete set; empty if unknown.
    """

    folder_classes: int
    train: int
    test: int
    min_test: int
    exclude: tuple[str, ...] = ()
    large_enough: bool = False
    min_train: int | None = None
    last_class: str = ""
    folder_images: int | None = None
    digest: str = ""

    @property
    def min_images(self) -> int:
        """Smallest number of images of a class that can be drawn."""
        return (self.train if self.min_train is None else self.min_train) + self.min_test

    def train_count(self, images: int) -> int:
        """Number of training images to draw from a class of ``images``, which leaves `min_test` or more."""
        return min(self.train, images - self.min_test)


@dataclass(frozen=True)
class Dataset:
    """A dataset that `data.name` can name.

    Args:
        name: the value of `data.name`.
        network: the network to train on it when `model.name` is null.
        classes: number of classes, as published or as drawn.
        train: number of training images.
        test: number of test images; for a draw, the largest number possible.
        home_page: where to get it.
        license: its license, as its authors state it.
        downloadable: whether torchvision can download it.
        paths: its files or folders, relative to `data.root`.
        draw: how its classes and images are drawn; None: it comes with a split.
        approximate: whether `train` and `test` are approximate, because no exact counts are published.
        note: what a reader of results should know about this version of it; shown next to its results.
        sample: what one sample is called.
        libraries: packages whose version affects the decoded samples.
        reader: finds its samples; None: torchvision.datasets has a class of this name.
    """

    name: str
    network: str
    classes: int
    train: int
    test: int
    home_page: str
    license: str
    downloadable: bool
    paths: tuple[str, ...]
    draw: Draw | None = None
    approximate: bool = False
    note: str = ""
    sample: str = "image"
    libraries: tuple[str, ...] = LIBRARIES
    reader: Callable[[Dataset, DataConfig], Sources] | None = None

    @property
    def train_at_most(self) -> bool:
        """Whether there may be fewer training images than `train`."""
        return self.draw is not None and self.draw.min_train is not None

    @property
    def test_at_most(self) -> bool:
        """Whether there may be fewer test images than `test`."""
        return self.draw is not None and self.draw.min_test < self.draw.test

    def described(self) -> dict[str, Any]:
        """Return what describes the data, without how they are read, as values that JSON has."""
        names = [field.name for field in fields(self) if field.name not in ("libraries", "reader")]
        return {name: getattr(self, name) for name in names} | {"draw": self.draw and asdict(self.draw)}


DATASETS: dict[str, Dataset] = {}
"""The registered datasets by name; see :func:`register_dataset`."""

_NETWORKS: dict[str, str] = {}


def register_dataset(dataset: Dataset) -> None:
    """Make a dataset known as `data.name`.

    Raises:
        ValueError: another dataset has this name.
    """
    known = DATASETS.setdefault(dataset.name, dataset)
    if known != dataset:
        raise ValueError(f"a dataset named {dataset.name!r} is already registered: choose another name")


def register_network_for(data: str, network: str) -> None:
    """Set the network to train when `model.name` is null on ``data`` that is not a registered dataset."""
    _NETWORKS[data] = network


def network_for(data: str) -> str | None:
    """Return the name of the network to train on ``data`` when `model.name` is null; None if none is set."""
    return DATASETS[data].network if data in DATASETS else _NETWORKS.get(data)
