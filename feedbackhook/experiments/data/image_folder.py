"""Reads folders of images: one folder for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from feedbackhook.experiments.config import one_line
from feedbackhook.experiments.data.items import Item, Sources

if TYPE_CHECKING:
    from PIL.Image import Image


def image_folder(path: Path) -> Sources:
    """Find the images of `imagefolder:PATH`: train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)."""
    found = Sources(
        hint="imagefolder:PATH needs PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or "
        "PATH/val/CLASS/IMAGE), with the same classes in both"
    )
    train, test = train_and_test(path)
    return matching_classes({"train": train, "test": test}, found)


def train_and_test(path: Path) -> tuple[Path, Path]:
    """Return the training and test folders inside a folder of images."""
    test = path / "test"
    return path / "train", path / "val" if not test.is_dir() and (path / "val").is_dir() else test


def matching_classes(folders: Mapping[str, Path], found: Sources) -> Sources:
    """Add to ``found`` the images of a training and a test folder, which must have the same classes."""
    images = {split: class_images(folder, found.problems) for split, folder in folders.items()}
    for split, other in (("train", "test"), ("test", "train")):
        for name, paths in images[split].items():
            if not paths:
                found.problems.append(f"{folders[split] / name} contains no images")
            if images[other] and name not in images[other]:
                here, there = folders[split] / name, folders[other] / name
                found.problems.append(f"{there} is missing, but {here} exists")
    found.splits = {split: label_images(paths, list(paths)) for split, paths in images.items() if paths}
    return found


def class_images(folder: Path, problems: list[str]) -> dict[str, list[str]]:
    """Return the image files in each class folder, both sorted; if the folder cannot be read, add why to
    ``problems``."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        problems.append(f"{folder} is missing")
        return {}
    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError:
        problems.append(f"{folder} contains no class folders")
        return {}
    except OSError as error:
        problems.append(f"{folder} cannot be read: {one_line(error)}")
        return {}
    images: dict[str, list[str]] = {name: [] for name in found.classes}
    for path, label in found.samples:
        images[found.classes[label]].append(path)
    return images


def label_images(images: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[Item]:
    """Return the images of ``classes``, labeled by their position in it."""
    return [image_item(path, label) for label, name in enumerate(classes) for path in images[name]]


def image_item(path: str, label: int) -> Item:
    """Return the image in a file as a sample of class ``label``."""
    return Item(path, partial(_open, path, label), label)


def _open(path: str, label: int) -> tuple[Image, int]:
    from torchvision.datasets.folder import default_loader

    return default_loader(path), label
