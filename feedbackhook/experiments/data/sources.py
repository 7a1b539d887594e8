"""The entry points of the readers: the samples of each dataset, found and not decoded yet.

How data lie on disk is said where they are read: `data_torchvision` for torchvision's classes,
`data_folders` for folders of classes, `audio` for TIMIT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data import arrays
from feedbackhook.experiments.data import folders as data_folders
from feedbackhook.experiments.data import torchvision_sets as data_torchvision
from feedbackhook.experiments.data.items import Item as Item
from feedbackhook.experiments.data.items import Sources
from feedbackhook.experiments.data.items import decode as decode
from feedbackhook.experiments.data.registry import PAPER, Dataset
from feedbackhook.liao2016 import timit as audio

# those of the paper's datasets that torchvision does not read as they are used here
_READERS: dict[str, Callable[[Dataset, DataConfig], Sources]] = {
    "Caltech101": data_folders.drawn,
    "Caltech256-101": data_folders.drawn,
    "iCubWorld": data_folders.icubworld,
    "Flowers17": data_folders.flowers17,
    "PubFig83-ID": data_folders.drawn,
    "SUFR-W-ID": data_folders.sufr,
    "LFW-ID": data_folders.drawn,
    "MIT-Indoor67": data_folders.indoor67,
    "TIMIT-80": audio.timit,
}


def find(config: DataConfig) -> Sources:
    """The samples that ``config`` names, not decoded, downloaded first where it says so and they are missing.

    Raises:
        ConfigError: no dataset has this name, or a package is missing that reads it.
    """
    kind, _, path = config.name.partition(":")
    if kind == "imagefolder":
        return data_folders.image_folder(Path(path).resolve())
    if kind == "npz":
        return arrays.npz(Path(path).resolve())
    if config.name in _READERS:
        return _READERS[config.name](PAPER[config.name], config)
    return data_torchvision.named(config)


def locations(config: DataConfig) -> list[Path]:
    """The files and folders that ``config`` is read from, or none where that is not known."""
    kind, _, path = config.name.partition(":")
    if kind == "imagefolder":
        return list(data_folders.train_and_test(Path(path).resolve()))
    if kind == "npz":
        return [Path(path).resolve()]
    return data_torchvision.locations(config)
