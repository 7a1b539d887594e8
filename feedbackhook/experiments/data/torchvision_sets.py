"""Reads the classification datasets of torchvision.datasets."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from feedbackhook.experiments.config import ConfigError, DataConfig, one_line
from feedbackhook.experiments.data.digits import DIGITS
from feedbackhook.experiments.data.items import Item, Sources, hint_if_missing, root
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.names import nearest

if TYPE_CHECKING:
    from PIL.Image import Image

# The classes of torchvision.datasets, and the arguments that select the training and the test set of each;
# None if the data have no such split, and are split by us.
_FLAG = ({"train": True}, {"train": False})
_NAMED = ({"split": "train"}, {"split": "test"})
_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_VAL = ({"split": "train"}, {"split": "val"})
_TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    **dict.fromkeys(["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"], _FLAG),
    **dict.fromkeys(["Country211", "DTD", "FER2013", "Flowers102", "Food101", "GTSRB", "PCAM"], _NAMED),
    **dict.fromkeys(["LFWPeople", "RenderedSST2", "STL10", "StanfordCars", "SVHN"], _NAMED),
    **dict.fromkeys(["FGVCAircraft", "OxfordIIITPet"], _TRAINVAL),
    **dict.fromkeys(["CLEVRClassification", "ImageNet", "Imagenette"], _VAL),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "INaturalist": ({"version": "2021_train"}, {"version": "2021_valid"}),
    "Places365": ({"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    **dict.fromkeys(["Caltech256", "EuroSAT", "FakeData", "SEMEION", "SUN397"], None),
}

# what torchvision raises if files are missing or damaged
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    AssertionError,
    EOFError,
    TypeError,
    KeyError,
    UnpicklingError,
)


def read(config: DataConfig) -> Sources:
    """Find the images of one of torchvision's datasets; download them first if configured so and missing.

    Raises:
        ConfigError: torchvision has no such dataset, or it is not for classification.
    """
    from torchvision import datasets

    if config.name not in _TORCHVISION:
        known = ", ".join(sorted({*_TORCHVISION, *DATASETS}))
        if hasattr(datasets, config.name):
            what = "has no classes for training and test."
        else:
            what = f"is unknown{nearest(config.name, [DIGITS, *DATASETS, *_TORCHVISION]) or '.'}"
        raise ConfigError(
            f"data.name {config.name!r} {what} Use {DIGITS}, imagefolder:PATH, or one of {known}"
        )
    constructor, folder = getattr(datasets, config.name), root(config)
    given = _accepted(constructor, {"root": str(folder), "download": config.download})
    splits = _TORCHVISION[config.name]
    named = {"all": {}} if splits is None else dict(zip(("train", "test"), splits, strict=True))
    found, failures = Sources(), []
    for split, arguments in named.items():
        try:
            dataset = constructor(**given, **arguments)
        except _UNREADABLE as error:
            failures.append(one_line(error))
            continue
        where = f"{', '.join(map(str, locations(config))) or folder} ({split})"
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is not None and len(labels) != len(dataset):
            failures.append(f"{where} has {len(dataset)} images but {len(labels)} labels")
            continue
        found.splits[split] = _listed(dataset, where, labels)
    if failures:  # name the files if torchvision lists them; otherwise quote its own words
        found.problems = _file_problems(constructor, folder) or list(dict.fromkeys(failures))
        found.hint = hint_if_missing(config, "download" in given, failures[0])
    return found


def locations(config: DataConfig) -> list[Path]:
    """Return the files and folders from which a dataset is read; empty if unknown."""
    if config.name in DATASETS:
        return [root(config) / path for path in DATASETS[config.name].paths]
    if config.name in ("EMNIST", "FashionMNIST", "KMNIST", "QMNIST"):
        return [root(config) / config.name]
    return []


def download(name: str, config: DataConfig) -> str | None:
    """Let torchvision download the dataset that it calls ``name``; return why it failed, or None."""
    from torchvision import datasets

    try:
        getattr(datasets, name)(root=str(root(config)), download=True)
    except _UNREADABLE as error:
        return one_line(error)
    return None


def _accepted(constructor: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those ``arguments`` that the constructor, or one to which it passes ``**kwargs``, accepts."""
    names: set[str] = set()
    for base in constructor.__mro__:
        parameters = inspect.signature(base).parameters
        names.update(parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return {name: value for name, value in arguments.items() if name in names}


def _listed(dataset: Any, where: str, labels: Any) -> list[Item]:
    """Return the images of one of torchvision's datasets. Iterating over most of them does not end."""
    known = [None] * len(dataset) if labels is None else [int(label) for label in labels]
    lists = [vars(dataset).get(name) for name in ("samples", "_samples", "_image_files", "_images", "data")]
    files = next((files for files in lists if isinstance(files, list) and _file(files[:1])), None)
    return [
        Item(
            f"image {i} of {where}" if files is None else _file(files[i : i + 1]),
            partial(_get, dataset, i),
            known[i],
        )
        for i in range(len(dataset))
    ]


def _file(entries: list[Any]) -> str:
    """Return the path in a list of one entry, a path or a path with a class; empty if there is none."""
    path = entries[0][0] if entries and isinstance(entries[0], tuple) else next(iter(entries), None)
    return str(path) if isinstance(path, (str, Path)) else ""


def _get(dataset: Any, i: int) -> tuple[Image, int]:
    image, label = dataset[i]
    return image, int(label)


def _file_problems(constructor: type, parent: Path) -> list[str]:
    """Return what is missing or damaged among the files that torchvision lists for a dataset."""
    problems = []
    for path, check in _published_files(constructor, parent):
        if not path.exists():
            problems.append(f"{path} is missing")
            continue
        try:
            check(path)
        except _UNREADABLE as error:
            problems.append(f"{path} is damaged: {one_line(error)}")
    return problems


def _published_files(constructor: Any, parent: Path) -> list[tuple[Path, Callable[[Path], object]]]:
    """Return the files of a dataset, each with a check that raises if it is damaged; empty if torchvision has
    no list of them."""
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    if issubclass(constructor, datasets.MNIST) and not issubclass(
        constructor, (datasets.EMNIST, datasets.QMNIST)
    ):
        folder = parent / constructor.__name__
        legacy = [folder / "processed" / name for name in (constructor.training_file, constructor.test_file)]
        if all(path.is_file() for path in legacy):  # torchvision prefers these
            return [(path, _holds_tensors) for path in legacy]
        names = [name.removesuffix(".gz") for name, _ in constructor.resources]
        return [(folder / "raw" / n, read_image_file if "images" in n else read_label_file) for n in names]
    checks: list[tuple[Path, Callable[[Path], object]]] = []
    if issubclass(constructor, datasets.CIFAR10):
        meta = (constructor.meta["filename"], constructor.meta["md5"])
        files = [*constructor.train_list, *constructor.test_list, meta]
        folder = parent / constructor.base_folder
    elif issubclass(constructor, datasets.STL10):
        files = [*constructor.train_list, *constructor.test_list]
        folder = parent / constructor.base_folder
    elif issubclass(constructor, datasets.SVHN):
        files, folder = [constructor.split_list[split][1:] for split in ("train", "test")], parent
    elif issubclass(constructor, datasets.Flowers102):
        files, folder = [constructor._file_dict[kind] for kind in ("label", "setid")], parent / "flowers-102"
        checks.append((folder / "jpg", os.listdir))
    else:
        return []
    return [*checks, *((folder / name, partial(_has_md5, md5)) for name, md5 in files)]


def _has_md5(md5: str, path: Path) -> None:
    from torchvision.datasets.utils import check_md5

    if not check_md5(path, md5):
        raise ValueError("its MD5 sum is not the published one")


def _holds_tensors(path: Path) -> None:
    import torch

    try:
        images, labels = torch.load(path, weights_only=True)
    except UnpicklingError as error:  # its own message advises loading the file anyway
        raise ValueError("it contains more than tensors, so it was not loaded") from error
    if len(images) != len(labels):
        raise ValueError(f"it has {len(images)} images but {len(labels)} labels")
