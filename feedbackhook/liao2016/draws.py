"""Random draws of classes and images from a larger set.

A draw ranks names by a hash of them, so it depends on nothing else: not on the order in which a file system
lists them, nor on the version of a random number generator.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from feedbackhook.experiments.data.image_folder import label_images
from feedbackhook.experiments.data.items import Item, Sources
from feedbackhook.experiments.data.registry import Dataset, Draw

SEED = 0  # the same for every run

SAME = "the draw is the same as from the complete set"
_SAME_CLASSES = (
    "the draw has the same classes as from the complete set, but other images of the classes that lack some"
)


def ranked(names: Iterable[str], prefix: str) -> list[str]:
    """Return names in a random but fixed order, which does not depend on the ``prefix`` that they share."""

    def key(name: str) -> bytes:
        text = name.removeprefix(prefix).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(f"{SEED}/{text}")).digest()

    return sorted(names, key=key)


def draw_images(
    images: Mapping[str, list[str]],
    place: Callable[[str], object],
    dataset: Dataset,
    folder: Path,
    found: Sources,
) -> None:
    """Draw a training and a test set from the images of each class.

    Args:
        images: the files of each class.
        place: returns where a class is, for messages.
        dataset: with the draw.
        folder: contains the files.
        found: receives the splits, or what is wrong.
    """
    draw = dataset.draw
    assert draw is not None
    found.folder = label_images(images, list(images))
    count = sum(map(len, images.values()))
    incomplete = len(images) < draw.folder_classes or (
        draw.folder_images is not None and count < draw.folder_images
    )
    chosen = sorted(_draw_classes(images, place, dataset, draw, folder, incomplete, found.problems))
    for name in chosen:
        _report_size(len(images[name]), place(name), draw, found)
    if found.problems:
        return
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name in chosen:
        paths = ranked(images[name], f"{folder}{os.sep}")
        end = draw.train_count(len(paths))
        parts["train"][name] = sorted(paths[:end])
        parts["test"][name] = sorted(paths[end : end + draw.test])
    found.splits = {split: label_images(part, chosen) for split, part in parts.items()}
    if incomplete:
        same = draw.digest == digest(found.splits, folder)
        found.differs.append(_difference(folder, len(images), count, draw, SAME if same else _SAME_CLASSES))


def _draw_classes(
    images: Mapping[str, list[str]],
    place: Callable[[str], object],
    dataset: Dataset,
    draw: Draw,
    folder: Path,
    incomplete: bool,
    problems: list[str],
) -> list[str]:
    """Return the classes of the draw in the order in which they are drawn; add what is wrong to
    ``problems``."""
    classes = list(images)
    problems += [f"{place(name)} contains no images" for name in classes if not images[name]]
    contains = f"{folder} contains {len(classes)} classes instead of {draw.folder_classes}"
    too_few = len(classes) < draw.folder_classes
    if len(classes) > draw.folder_classes or (too_few and not draw.last_class):
        problems.append(contains)
    if draw.large_enough:
        classes = [name for name in classes if len(images[name]) >= draw.min_images]
    lack = dataset.classes - len(classes)
    if lack > 0 and (draw.large_enough or draw.last_class):
        enough = f" of {draw.min_images} images or more" if draw.large_enough else ""
        problems.append(f"{folder} contains {len(classes)} classes{enough}, {lack} too few for the draw")
    rank = ranked(classes, "")
    if draw.large_enough:  # classes that have fewer images than are drawn come last
        rank.sort(key=lambda name: len(images[name]) < draw.train + draw.test)
    rank = rank[: dataset.classes]
    if incomplete and draw.last_class and rank[-1:] != [draw.last_class] and lack <= 0:
        problems.append(
            f"{contains}, and lacks some that are drawn from the complete set: {rank[-1]} would be drawn "
            "instead of a class that is missing or has too few images"
        )
    return rank


def _difference(folder: Path, classes: int, images: int, draw: Draw, result: str) -> str:
    """How a folder differs from the published one, and the ``result`` for the draw."""
    parts = []
    if classes < draw.folder_classes:
        parts.append(f"{classes:,} of the {draw.folder_classes:,} published classes")
    if draw.folder_images is not None:
        parts.append(f"{images:,} of the {draw.folder_images:,} published images")
    return f"{folder} contains {' and '.join(parts)}; {result}"


def _report_size(count: int, place: object, draw: Draw, found: Sources) -> None:
    """Report a class in the draw that has too few images, or fewer than are drawn."""
    if 0 < count < draw.min_images:
        what = f"{count} images, {draw.min_images - count} too few for the draw"
        found.problems.append(f"{place} contains {what}")
    elif draw.min_images <= count < draw.train + draw.test:
        train = draw.train_count(count)
        found.short.append(
            f"{place} contains {count} images: {train} for training instead of {draw.train}, "
            f"{count - train} for testing instead of {draw.test}"
        )


def digest(splits: Mapping[str, Sequence[Item]], folder: Path) -> str:
    """Return a hash of which images are drawn into which split and class, wherever the folder is."""
    names = (
        f"{split}/{item.label}/{Path(item.name).relative_to(folder).as_posix()}"
        for split, items in splits.items()
        for item in items
    )
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]
