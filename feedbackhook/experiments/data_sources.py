"""Readers: the images of each dataset, found and not decoded yet.

A draw ranks names by a hash of them, so it depends on nothing else: not on the order in which a file system
lists them, nor on the version of a generator.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

from feedbackhook.experiments.config import ConfigError, DataConfig, one_line
from feedbackhook.experiments.datasets import PAPER, Dataset, Draw

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAW_SEED = 0  # the same for every run

# Other classification classes of torchvision.datasets, too, and the arguments that make the training and the
# test set of each; None where the data have no such split and get ours.
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

# what torchvision's readers raise where files are missing or damaged
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


class Item(NamedTuple):
    """One image, not decoded yet.

    Args:
        name: its file, or its place where a file holds many.
        read: opens it; gives a PIL image and its class.
        label: the class, where it is known before the image is read.
    """

    name: str
    read: Callable[[], tuple[Image, int]]
    label: int | None = None


@dataclass
class Sources:
    """What a reader found.

    Args:
        splits: the images of `train` and `test`, or of `all` where the data come without a split. One that
            could not be opened is not there, and a fault says why.
        folder: of a draw, all images of the folder that it is from.
        faults: what is missing or damaged, each by its path. Whether images can be decoded is not among it.
        way_out: what to do about the faults.
    """

    splits: dict[str, list[Item]] = field(default_factory=dict)
    folder: list[Item] | None = None
    faults: list[str] = field(default_factory=list)
    way_out: str = ""


def decode(item: Item) -> tuple[Image, int]:
    """The image, and its class.

    Raises:
        ConfigError: it is damaged or no image; the message names it.
    """
    from PIL.Image import DecompressionBombError

    try:
        image, label = item.read()
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise ConfigError(f"{item.name} cannot be decoded: {error}") from error
    return image, label


def find(config: DataConfig) -> Sources:
    """The images that ``config`` names, not decoded, downloaded first where it says so and they are missing.

    Raises:
        ConfigError: no dataset has this name.
    """
    kind, _, path = config.name.partition(":")
    if kind == "imagefolder":
        return _image_folder(Path(path).resolve())
    dataset = PAPER.get(config.name)
    if dataset is not None and dataset.draw is not None:
        return _drawn(dataset, dataset.draw, config)
    return _torchvision(config)


def locations(config: DataConfig) -> list[Path]:
    """The files and folders that ``config`` is read from, or none where that is not known."""
    kind, _, path = config.name.partition(":")
    root = _root(config)
    if kind == "imagefolder":
        return list(_train_and_test(Path(path).resolve()))
    if config.name in PAPER:
        return [root / where for where in PAPER[config.name].where]
    if config.name in ("EMNIST", "FashionMNIST", "KMNIST", "QMNIST"):
        return [root / config.name]
    return []


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().resolve()


def _train_and_test(path: Path) -> tuple[Path, Path]:
    test = path / "test"
    return path / "train", path / "val" if not test.is_dir() and (path / "val").is_dir() else test


def _image_folder(path: Path) -> Sources:
    found = Sources(
        way_out="imagefolder:PATH needs PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or "
        "PATH/val/CLASS/IMAGE), of the same classes"
    )
    folders = dict(zip(("train", "test"), _train_and_test(path), strict=True))
    images = {split: _class_folders(folder, found.faults) for split, folder in folders.items()}
    for split, other in (("train", "test"), ("test", "train")):
        for name, paths in images[split].items():
            if not paths:
                found.faults.append(f"{folders[split] / name} holds no images")
            if images[other] and name not in images[other]:
                found.faults.append(f"{folders[other] / name} is missing; {folders[split] / name} is there")
    found.splits = {split: _numbered(paths, list(paths)) for split, paths in images.items() if paths}
    return found


def _class_folders(folder: Path, faults: list[str]) -> dict[str, list[str]]:
    """The image files in each class folder, both sorted; a folder that cannot be read joins ``faults``."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        faults.append(f"{folder} is missing")
        return {}
    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError:
        faults.append(f"{folder} holds no folders of classes")
        return {}
    except OSError as error:
        faults.append(f"{folder} cannot be read: {one_line(error)}")
        return {}
    images: dict[str, list[str]] = {name: [] for name in found.classes}
    for path, label in found.samples:
        images[found.classes[label]].append(path)
    return images


def _numbered(images: dict[str, list[str]], classes: Sequence[str]) -> list[Item]:
    """The images of ``classes``, labelled by their places in it."""
    return [
        Item(path, partial(_open, path, label), label)
        for label, name in enumerate(classes)
        for path in images[name]
    ]


def _open(path: str, label: int) -> tuple[Image, int]:
    from torchvision.datasets.folder import default_loader

    return default_loader(path), label


def _drawn(dataset: Dataset, draw: Draw, config: DataConfig) -> Sources:
    folder = _root(config) / dataset.where[0]
    failure = _download(config) if config.download and dataset.downloads and not folder.is_dir() else None
    if not folder.is_dir():
        way_out = _way_out(config, dataset.downloads, failure, dataset.source)
        return Sources(faults=[f"{folder} is missing"], way_out=way_out)
    found = Sources(way_out=f"take {folder} away and unpack {_undrawn(dataset.name)} anew")
    images = {
        name: [path for path in paths if Path(path).parent.name == name]  # Caltech256 has folders inside
        for name, paths in _class_folders(folder, found.faults).items()
        if name not in draw.without
    }
    classes = list(images)
    found.folder = _numbered(images, classes)
    found.faults += [f"{folder / name} holds no images" for name in classes if not images[name]]
    if len(classes) != draw.of:
        found.faults.append(f"{folder} holds {len(classes)} classes in the place of {draw.of}")
    if draw.large_enough:
        classes = [name for name in classes if len(images[name]) >= draw.least]
        if lack := max(dataset.classes - len(classes), 0):
            what = f"{len(classes)} classes of {draw.least} images or more, {lack} fewer than are drawn"
            found.faults.append(f"{folder} holds {what}")
    chosen = sorted(_ranked(classes, "")[: dataset.classes])
    for name in chosen:
        if 0 < len(images[name]) < draw.least:
            what = f"{len(images[name])} images, {draw.least - len(images[name])} fewer than are drawn"
            found.faults.append(f"{folder / name} holds {what}")
    if not found.faults:
        ranked = {name: _ranked(images[name], f"{folder}{os.sep}") for name in chosen}
        for split, start, stop in (("train", 0, draw.train), ("test", draw.train, draw.train + draw.test)):
            part = {name: sorted(paths[start:stop]) for name, paths in ranked.items()}
            found.splits[split] = _numbered(part, chosen)
    return found


def _ranked(names: Iterable[str], prefix: str) -> list[str]:
    """Names in an order that is random and fixed, what they have in common left out of it."""

    def key(name: str) -> bytes:
        text = name.removeprefix(prefix).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(f"{_DRAW_SEED}/{text}")).digest()

    return sorted(names, key=key)


def _undrawn(name: str) -> str:
    """The dataset from which one is drawn, as torchvision calls it."""
    return name.partition("-")[0]


def _download(config: DataConfig) -> str | None:
    """Lets torchvision download the dataset from which one is drawn; gives what it failed with."""
    from torchvision import datasets

    try:
        getattr(datasets, _undrawn(config.name))(root=str(_root(config)), download=True)
    except _UNREADABLE as error:
        return one_line(error)
    return None


def _torchvision(config: DataConfig) -> Sources:
    from torchvision import datasets

    if config.name not in _TORCHVISION:
        known = ", ".join(sorted({*_TORCHVISION, *PAPER}))
        what = "has no classes for training and test" if hasattr(datasets, config.name) else "is unknown"
        raise ConfigError(
            f"data.name {config.name!r} {what}: use digits, imagefolder:PATH, or one of {known}"
        )
    constructor, root = getattr(datasets, config.name), _root(config)
    given = _accepted(constructor, {"root": str(root), "download": config.download})
    splits = _TORCHVISION[config.name]
    named = {"all": {}} if splits is None else dict(zip(("train", "test"), splits, strict=True))
    found, failures = Sources(), []
    for split, arguments in named.items():
        try:
            dataset = constructor(**given, **arguments)
        except _UNREADABLE as error:
            failures.append(one_line(error))
            continue
        where = f"{', '.join(map(str, locations(config))) or root} ({split})"
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is not None and len(labels) != len(dataset):
            failures.append(f"{where} holds {len(dataset)} images and {len(labels)} labels")
            continue
        found.splits[split] = _listed(dataset, where, labels)
    if failures:  # the file, where torchvision publishes which there must be, and else its own words
        found.faults = _published_faults(constructor, root) or list(dict.fromkeys(failures))
        found.way_out = _way_out(config, "download" in given, failures[0])
    return found


def _accepted(constructor: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that the constructor, or one that it hands its ``**kwargs`` to, names."""
    names: set[str] = set()
    for base in constructor.__mro__:
        parameters = inspect.signature(base).parameters
        names.update(parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return {name: value for name, value in arguments.items() if name in names}


def _listed(dataset: Any, where: str, labels: Any) -> list[Item]:
    """The images of one of torchvision's datasets. Most have no end of iteration, only a length."""
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
    """The path in a list of one, of a path or of a path and a class; empty where there is none."""
    path = entries[0][0] if entries and isinstance(entries[0], tuple) else next(iter(entries), None)
    return str(path) if isinstance(path, (str, Path)) else ""


def _get(dataset: Any, i: int) -> tuple[Image, int]:
    image, label = dataset[i]
    return image, int(label)


def _way_out(config: DataConfig, can_download: bool, failure: str | None, source: str = "") -> str:
    """What to do where a dataset is not in `data.root`; ``failure`` is what its download ended with."""
    there = f"set --data.root to the folder that holds it, which is not {_root(config)}"
    if not can_download:
        return f"torchvision cannot download it; {f'fetch it from {source} and ' if source else ''}{there}"
    if config.download:
        return f"the download into {_root(config)} did not help ({failure})"
    return f"fetch it with --data.download true, or {there}"


def _published_faults(constructor: type, root: Path) -> list[str]:
    """What is missing or damaged among the files that torchvision publishes for a dataset."""
    faults = []
    for path, test in _published_files(constructor, root):
        if not path.exists():
            faults.append(f"{path} is missing")
            continue
        try:
            test(path)
        except _UNREADABLE as error:
            faults.append(f"{path} is damaged: {one_line(error)}")
    return faults


def _published_files(constructor: Any, root: Path) -> list[tuple[Path, Callable[[Path], object]]]:
    """The files of a dataset with a test of each, which raises where it is damaged; none where torchvision
    keeps no list of them."""
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    if issubclass(constructor, datasets.MNIST) and not issubclass(
        constructor, (datasets.EMNIST, datasets.QMNIST)
    ):
        folder = root / constructor.__name__
        legacy = [folder / "processed" / name for name in (constructor.training_file, constructor.test_file)]
        if all(path.is_file() for path in legacy):  # torchvision takes these before the others
            return [(path, _holds_tensors) for path in legacy]
        names = [name.removesuffix(".gz") for name, _ in constructor.resources]
        return [(folder / "raw" / n, read_image_file if "images" in n else read_label_file) for n in names]
    tests: list[tuple[Path, Callable[[Path], object]]] = []
    if issubclass(constructor, datasets.CIFAR10):
        meta = (constructor.meta["filename"], constructor.meta["md5"])
        files = [*constructor.train_list, *constructor.test_list, meta]
        folder = root / constructor.base_folder
    elif issubclass(constructor, datasets.STL10):
        files = [*constructor.train_list, *constructor.test_list]
        folder = root / constructor.base_folder
    elif issubclass(constructor, datasets.SVHN):
        files, folder = [constructor.split_list[split][1:] for split in ("train", "test")], root
    elif issubclass(constructor, datasets.Flowers102):
        files, folder = [constructor._file_dict[kind] for kind in ("label", "setid")], root / "flowers-102"
        tests.append((folder / "jpg", os.listdir))
    else:
        return []
    return [*tests, *((folder / name, partial(_has_md5, md5)) for name, md5 in files)]


def _has_md5(md5: str, path: Path) -> None:
    from torchvision.datasets.utils import check_md5

    if not check_md5(path, md5):
        raise ValueError("its MD5 sum is not the published one")


def _holds_tensors(path: Path) -> None:
    import torch

    try:
        images, labels = torch.load(path, weights_only=True)
    except UnpicklingError as error:  # whose own words advise to load it all the same
        raise ValueError("it holds other things than tensors, and was not loaded") from error
    if len(images) != len(labels):
        raise ValueError(f"it holds {len(images)} images and {len(labels)} labels")
