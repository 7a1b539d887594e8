"""Reads Flowers17: the first of its three published splits."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from feedbackhook.experiments.config import DataConfig, one_line
from feedbackhook.experiments.data.items import Sources, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.files import check_paths, existing_images

IMAGES_PER_CLASS = 80

# what scipy raises for a file that is damaged or not a Matlab file
_NOT_MATLAB = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
    EOFError,
    zlib.error,
)


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find jpg/image_0001.jpg to image_1360.jpg, of which each class has 80 in a row, by datasplits.mat: its
    trn1 and tst1. val1 is left out, like the validation set of Flowers102."""
    folder = root(config) / dataset.paths[0]
    jpg, splits = folder / "jpg", folder / "datasplits.mat"
    found = check_paths(dataset, config, [jpg, splits])
    if found.problems:
        return found
    try:
        numbers = _matlab_numbers(splits, {"train": "trn1", "test": "tst1"})
    except _NOT_MATLAB as error:
        found.problems.append(f"{splits} is damaged: {one_line(error)}")
        return found
    last = IMAGES_PER_CLASS * dataset.classes
    for split, chosen in numbers.items():
        if wrong := [number for number in chosen if not 1 <= number <= last]:
            found.problems.append(f"{splits} is damaged: it lists image {wrong[0]} of {last}")
            continue
        paths = [
            (jpg / f"image_{number:04d}.jpg", (number - 1) // IMAGES_PER_CLASS) for number in sorted(chosen)
        ]
        found.splits[split] = existing_images(paths, splits, found.problems)
    return found


def _matlab_numbers(path: Path, names: Mapping[str, str]) -> dict[str, list[int]]:
    """Vectors of whole numbers from a Matlab file.

    Raises:
        _NOT_MATLAB: the file is damaged or does not contain them.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(str(path))
    except MatReadError as error:
        raise ValueError(str(error)) from error
    if missing := [name for name in names.values() if name not in content]:
        raise ValueError(f"it does not contain {missing[0]}")
    return {key: [int(number) for number in np.ravel(content[name])] for key, name in names.items()}
