"""Readers: folders of classes, with the splits that they come with, or with a draw from them.

A draw ranks names by a hash of them, so it depends on nothing else: not on the order in which a file system
lists them, nor on the version of a generator.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedbackhook.experiments.config import DataConfig, one_line
from feedbackhook.experiments.data import torchvision_sets as data_torchvision
from feedbackhook.experiments.data.items import Item, Sources, root, way_out
from feedbackhook.experiments.data.registry import Dataset, Draw

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAW_SEED = 0  # the same for every run
_FLOWERS17_A_CLASS = 80  # images, one class after the other


def image_folder(path: Path) -> Sources:
    """A folder of one's own: train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)."""
    found = Sources(
        way_out="imagefolder:PATH needs PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or "
        "PATH/val/CLASS/IMAGE), of the same classes"
    )
    train, test = train_and_test(path)
    return _of_same_classes({"train": train, "test": test}, found)


def train_and_test(path: Path) -> tuple[Path, Path]:
    """The folders of a folder of one's own."""
    test = path / "test"
    return path / "train", path / "val" if not test.is_dir() and (path / "val").is_dir() else test


def _of_same_classes(folders: Mapping[str, Path], found: Sources) -> Sources:
    """The images of a training and a test folder, whose classes must be the same."""
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


def _numbered(images: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[Item]:
    """The images of ``classes``, labelled by their places in it."""
    return [_image(path, label) for label, name in enumerate(classes) for path in images[name]]


def _image(path: str, label: int) -> Item:
    return Item(path, partial(_open, path, label), label)


def _open(path: str, label: int) -> tuple[Image, int]:
    from torchvision.datasets.folder import default_loader

    return default_loader(path), label


# -------------------------------------------------------------------------------------------------- draws


def drawn(dataset: Dataset, config: DataConfig) -> Sources:
    """A draw from one folder of classes."""
    assert dataset.draw is not None
    draw, name = dataset.draw, dataset.name.partition("-")[0]  # as torchvision or its authors call it
    folder = root(config) / dataset.where[0]
    download = config.download and dataset.downloads and not folder.is_dir()
    failure = data_torchvision.download(name, config) if download else None
    if not folder.is_dir():
        out = way_out(config, dataset.downloads, failure, dataset.source)
        return Sources(faults=[f"{folder} is missing"], way_out=out)
    found = Sources(way_out=f"take {folder} away and unpack {name} anew")
    images = {
        label: [path for path in paths if Path(path).parent.name == label]  # Caltech256 has folders inside
        for label, paths in _class_folders(folder, found.faults).items()
        if label not in draw.without
    }
    _draw(images, lambda label: folder / label, dataset, draw, folder, found)
    return found


def sufr(dataset: Dataset, config: DataConfig) -> Sources:
    """SUFR-W 1.3: images 1.jpg, 2.jpg, ... in one folder; the n-th line of the text file beside them, `ID #
    NAME`, says who is in the n-th."""
    assert dataset.draw is not None
    folder = root(config) / dataset.where[0]
    info = folder / "SUFR_in_the_wild_info.txt"
    found = _there(dataset, config, [folder, info])
    if found.faults:
        return found
    paths = {int(path.stem): str(path) for path in folder.glob("*.jpg") if path.stem.isdecimal()}
    images: dict[str, list[str]] = {}
    people = info.read_text("utf-8", "surrogateescape").rstrip().splitlines()
    for number, line in enumerate(people, 1):
        match = re.fullmatch(r"\s*(\d+)\s*#\s*(.*\S)\s*", line)
        if match is None:
            found.faults.append(f"{info} is damaged: line {number} is not 'ID # NAME'")
            continue
        of_person = images.setdefault(f"{int(match[1])} {match[2]}", [])
        of_person.append(str(folder / f"{number}.jpg"))  # which need not be there, unless it is drawn
    found.faults += [
        f"{path} is not in {info}, which ends at line {len(people)}"
        for number, path in sorted(paths.items())
        if not 1 <= number <= len(people)
    ]
    _draw(images, lambda person: f"{folder} ({person})", dataset, dataset.draw, folder, found)
    missing = [str(folder / f"{number}.jpg") for number in range(1, len(people) + 1) if number not in paths]
    drawn = {item.name for items in found.splits.values() for item in items}
    if needed := [path for path in missing if path in drawn or not found.splits]:
        found.faults += [f"{path} is missing; {info} names it" for path in needed]
        found.splits = {}
    elif missing:
        count = f"{len(people) - len(missing):,} of the {len(people):,} images"
        found.differs.append(f"{folder} holds {count} that {info.name} names; {_SAME}")
    found.folder = [item for item in found.folder or [] if item.name not in set(missing)]
    return found


def _draw(
    images: dict[str, list[str]],
    place: Callable[[str], object],
    dataset: Dataset,
    draw: Draw,
    folder: Path,
    found: Sources,
) -> None:
    """Draws from the ``images`` of each class, into ``found``; ``place`` is what a class is called there."""
    classes = list(images)
    found.folder = _numbered(images, classes)
    found.faults += [f"{place(name)} holds no images" for name in classes if not images[name]]
    holds = f"{folder} holds {len(classes)} classes in the place of {draw.of}"
    if len(classes) > draw.of or (len(classes) < draw.of and not draw.last):
        found.faults.append(holds)
    if draw.large_enough:
        classes = [name for name in classes if len(images[name]) >= draw.least]
    if (lack := dataset.classes - len(classes)) > 0 and (draw.large_enough or draw.last):
        enough = f" of {draw.least} images or more" if draw.large_enough else ""
        found.faults.append(f"{folder} holds {len(classes)} classes{enough}, {lack} fewer than are drawn")
    rank = ranked(classes, "")
    if draw.large_enough:  # those that have fewer than are drawn come last
        rank.sort(key=lambda name: len(images[name]) < draw.train + draw.test)
    rank = rank[: dataset.classes]
    count = sum(map(len, images.values()))
    differs = len(images) < draw.of or (draw.images is not None and count < draw.images)
    if differs and draw.last and rank[-1:] != [draw.last] and lack <= 0:
        found.faults.append(
            f"{holds}, and not all that are drawn from the whole set: {rank[-1]} would be drawn in the place "
            "of one that is missing or lacks images"
        )
    chosen = sorted(rank)
    for name in chosen:
        _tell_size(len(images[name]), place(name), draw, found)
    if not found.faults:
        parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
        for name in chosen:
            paths = ranked(images[name], f"{folder}{os.sep}")
            end = draw.training(len(paths))
            parts["train"][name], parts["test"][name] = (
                sorted(paths[:end]),
                sorted(paths[end : end + draw.test]),
            )
        found.splits = {split: _numbered(part, chosen) for split, part in parts.items()}
    if differs and not found.faults:
        same = draw.digest == digest(found.splits, folder)
        found.differs.append(_difference(folder, len(images), count, draw, _SAME if same else _SAME_CLASSES))


_SAME = "what is drawn is the same as from the whole set"
_SAME_CLASSES = (
    "the classes that are drawn are those of the whole set; from a class that lacks images, others are drawn"
)


def _difference(folder: Path, classes: int, images: int, draw: Draw, what: str) -> str:
    """How a folder differs from the published one, and ``what`` follows for the draw."""
    of_classes = [f"{classes:,} of the {draw.of:,} classes"] if classes < draw.of else []
    of_images = [f"{images:,} of the {draw.images:,} images"] if draw.images is not None else []
    return f"{folder} holds {' and '.join([*of_classes, *of_images])} that were published; {what}"


def _tell_size(count: int, place: object, draw: Draw, found: Sources) -> None:
    """Says of a class that is drawn that it has too few images, or fewer than are drawn."""
    if 0 < count < draw.least:
        what = f"{count} images, {draw.least - count} fewer than are drawn"
        found.faults.append(f"{place} holds {what}")
    elif draw.least <= count < draw.train + draw.test:
        found.short.append(
            f"{place} holds {count} images: {draw.training(count)} for training in the place of "
            f"{draw.train}, {count - draw.training(count)} for testing in the place of {draw.test}"
        )


def digest(splits: Mapping[str, Sequence[Item]], folder: Path) -> str:
    """A hash of which images are drawn into which split and class, whatever the place of the folder."""
    names = (
        f"{split}/{item.label}/{Path(item.name).relative_to(folder).as_posix()}"
        for split, items in splits.items()
        for item in items
    )
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def ranked(names: Iterable[str], prefix: str) -> list[str]:
    """Names in an order that is random and fixed, what they have in common left out of it."""

    def key(name: str) -> bytes:
        text = name.removeprefix(prefix).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(f"{_DRAW_SEED}/{text}")).digest()

    return sorted(names, key=key)


# --------------------------------------------------------------------------------------- published splits


def flowers17(dataset: Dataset, config: DataConfig) -> Sources:
    """Flowers17: jpg/image_0001.jpg to image_1360.jpg, 80 of each class in a row, and datasplits.mat; of its
    three splits the first, trn1 and tst1. val1 is left out, as the validation set of Flowers102 is."""
    folder = root(config) / dataset.where[0]
    jpg, splits = folder / "jpg", folder / "datasplits.mat"
    found = _there(dataset, config, [jpg, splits])
    if found.faults:
        return found
    try:
        numbers = _matlab_numbers(splits, {"train": "trn1", "test": "tst1"})
    except _NO_MATLAB as error:
        found.faults.append(f"{splits} is damaged: {one_line(error)}")
        return found
    last = _FLOWERS17_A_CLASS * dataset.classes
    for split, chosen in numbers.items():
        if wrong := [number for number in chosen if not 1 <= number <= last]:
            found.faults.append(f"{splits} is damaged: it names image {wrong[0]} of {last}")
            continue
        paths = [
            (jpg / f"image_{number:04d}.jpg", (number - 1) // _FLOWERS17_A_CLASS) for number in sorted(chosen)
        ]
        found.splits[split] = _present(paths, splits, found.faults)
    return found


def indoor67(dataset: Dataset, config: DataConfig) -> Sources:
    """MIT-Indoor67: Images/CLASS/IMAGE, and TrainImages.txt and TestImages.txt beside it, a line
    `CLASS/IMAGE` for each."""
    folder = root(config) / dataset.where[0]
    lists = {"train": folder / "TrainImages.txt", "test": folder / "TestImages.txt"}
    found = _there(dataset, config, [folder / "Images", *lists.values()])
    if found.faults:
        return found
    named = {split: list(_class_lines(path, found.faults)) for split, path in lists.items()}
    classes = sorted({label for lines in named.values() for label, _ in lines})
    for split, lines in named.items():
        paths = [(folder / "Images" / label / name, classes.index(label)) for label, name in sorted(lines)]
        found.splits[split] = _present(paths, lists[split], found.faults)
    return found


def icubworld(dataset: Dataset, config: DataConfig) -> Sources:
    """iCubWorld 1.0: train/CATEGORY and test/categorization/CATEGORY, with the images of a category in it or
    in folders of objects inside."""
    train, test = (root(config) / where for where in dataset.where)
    found = _there(dataset, config, [train, test])
    return found if found.faults else _of_same_classes({"train": train, "test": test}, found)


# what scipy raises of a file that is damaged, or is none of Matlab's
_NO_MATLAB = (OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, EOFError, zlib.error)


def _matlab_numbers(path: Path, names: Mapping[str, str]) -> dict[str, list[int]]:
    """Vectors of whole numbers from a Matlab file.

    Raises:
        _NO_MATLAB: it is damaged, or does not hold them.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(str(path))
    except MatReadError as error:
        raise ValueError(str(error)) from error
    if missing := [name for name in names.values() if name not in content]:
        raise ValueError(f"it does not hold {missing[0]}")
    return {key: [int(number) for number in np.ravel(content[name])] for key, name in names.items()}


def _class_lines(path: Path, faults: list[str]) -> Iterator[tuple[str, str]]:
    """Class and image of each line; names may hold spaces."""
    for number, line in enumerate(path.read_text("utf-8", "surrogateescape").splitlines(), 1):
        label, _, name = line.strip().partition("/")
        if label and name:
            yield label, name
        elif line.strip():
            faults.append(f"{path} is damaged: line {number} is not CLASS/IMAGE")


def _there(dataset: Dataset, config: DataConfig, paths: Sequence[Path]) -> Sources:
    """Nothing yet but which of these ``paths`` are missing, and what to do about them and later faults."""
    faults = [f"{path} is missing" for path in paths if not path.exists()]
    out = f"fetch {dataset.paper_name} anew from {dataset.source}, and put it in the place of what is there"
    if len(faults) == len(paths):
        out = way_out(config, False, None, dataset.source)
    elif faults:
        out = f"fetch what is missing from {dataset.source}"
    return Sources(faults=faults, way_out=out)


def _present(paths: Sequence[tuple[Path, int]], named_by: Path, faults: list[str]) -> list[Item]:
    """The images of these paths and classes that are there; each other joins ``faults``."""
    faults += [f"{path} is missing; {named_by} names it" for path, _ in paths if not path.is_file()]
    return [_image(str(path), label) for path, label in paths if path.is_file()]
