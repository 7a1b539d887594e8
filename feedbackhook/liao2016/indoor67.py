"""Reads MIT-Indoor67 in its published split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.items import Sources, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.files import check_paths, existing_images


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find Images/CLASS/IMAGE by TrainImages.txt and TestImages.txt beside it, which have a line
    `CLASS/IMAGE` for each image."""
    folder = root(config) / dataset.paths[0]
    lists = {"train": folder / "TrainImages.txt", "test": folder / "TestImages.txt"}
    found = check_paths(dataset, config, [folder / "Images", *lists.values()])
    if found.problems:
        return found
    named = {split: list(_class_lines(path, found.problems)) for split, path in lists.items()}
    classes = sorted({label for lines in named.values() for label, _ in lines})
    for split, lines in named.items():
        paths = [(folder / "Images" / label / name, classes.index(label)) for label, name in sorted(lines)]
        found.splits[split] = existing_images(paths, lists[split], found.problems)
    return found


def _class_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Class and image of each line; names may contain spaces."""
    for number, line in enumerate(path.read_text("utf-8", "surrogateescape").splitlines(), 1):
        label, _, name = line.strip().partition("/")
        if label and name:
            yield label, name
        elif line.strip():
            problems.append(f"{path} is damaged: line {number} is not CLASS/IMAGE")
