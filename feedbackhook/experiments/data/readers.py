"""Chooses the reader of a dataset, which finds its samples without decoding them."""

from __future__ import annotations

from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data import torchvision_sets
from feedbackhook.experiments.data.arrays import npz
from feedbackhook.experiments.data.image_folder import image_folder, train_and_test
from feedbackhook.experiments.data.items import Sources
from feedbackhook.experiments.data.registry import DATASETS


def find(config: DataConfig) -> Sources:
    """Find the samples of the data, not decoded; download them first if configured so and they are missing.

    Raises:
        ConfigError: no dataset has this name, or a package that is needed to read it is not installed.
    """
    kind, _, path = config.name.partition(":")
    if kind == "imagefolder":
        return image_folder(Path(path).resolve())
    if kind == "npz":
        return npz(Path(path).resolve())
    dataset = DATASETS.get(config.name)
    if dataset is not None and dataset.reader is not None:
        return dataset.reader(dataset, config)
    return torchvision_sets.read(config)


def locations(config: DataConfig) -> list[Path]:
    """Return the files and folders from which the data are read; empty if unknown."""
    kind, _, path = config.name.partition(":")
    if kind == "imagefolder":
        return list(train_and_test(Path(path).resolve()))
    if kind == "npz":
        return [Path(path).resolve()]
    return torchvision_sets.locations(config)
