"""Read a dataset from arrays in one file: `npz:PATH`.

The file holds `x_train`, `y_train`, `x_test` and `y_test`, as `numpy.savez` writes them, and may hold
`classes`, the names of the K classes. Of each split, x is either images, (N, H, W) or (N, H, W, C) of uint8
with C = 1 or 3, or features, (N, F) of any real type; y, (N,) of integers, are classes 0 to K - 1.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedbackhook.experiments.data.items import Item, Sources

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def npz(path: Path) -> Sources:
    """Find the samples in the file at ``path``. What is wrong with its arrays is among the problems."""
    found = Sources(
        hint="npz:PATH needs x_train, y_train, x_test and y_test: x is images (N, H, W) or "
        "(N, H, W, C) of uint8, or features (N, F); y is classes (N,), whole numbers from 0"
    )
    arrays = _arrays(path, found.problems)
    if arrays is None:
        return found
    if missing := [key for key in _KEYS if key not in arrays]:
        there = ", ".join(sorted(arrays)) or "nothing"
        found.problems.append(f"{path} has no {', '.join(missing)}; it has {there}")
        return found
    for split in ("train", "test"):
        _check(f"{path}: x_{split}", arrays[f"x_{split}"], f"y_{split}", arrays[f"y_{split}"], found.problems)
    _check_together(path, arrays, found.problems)
    if not found.problems:
        found.splits = {split: _items(path, split, arrays) for split in ("train", "test")}
    return found


def _arrays(path: Path, problems: list[str]) -> dict[str, NDArray[Any]] | None:
    if not path.is_file():
        problems.append(f"{path} is missing")
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        problems.append(f"{path} is not a file of arrays that numpy.savez wrote: {error}")
        return None


def _check(name: str, x: NDArray[Any], labels: str, y: NDArray[Any], problems: list[str]) -> None:
    """Collect what is wrong with the samples and classes of one split."""
    images = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3)))
    features = x.ndim == 2 and x.dtype.kind in "iuf"
    if not images and not features:
        hint = " (store floating-point images as uint8, from 0 to 255)" if x.ndim > 2 else ""
        problems.append(f"{name} is {x.dtype} of shape {x.shape}: neither images nor features{hint}")
    elif not len(x):
        problems.append(f"{name} is empty")
    elif features and not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        problems.append(f"{name}[{row}] has a value that is not finite")
    if y.ndim != 1 or y.dtype.kind not in "iu":
        problems.append(f"{name}: {labels} must be whole numbers of shape (N,), not {y.dtype} {y.shape}")
    elif len(y) != len(x):
        problems.append(f"{name} has {len(x)} samples, and {labels} has {len(y)} classes")


def _check_together(path: Path, arrays: dict[str, NDArray[Any]], problems: list[str]) -> None:
    """Collect what is wrong between the splits: kinds of samples, and the numbers of the classes."""
    if problems:
        return
    train, test = arrays["x_train"], arrays["x_test"]
    if (train.ndim == 2) != (test.ndim == 2) or (train.ndim == 2 and train.shape[1:] != test.shape[1:]):
        problems.append(f"{path}: x_train {train.shape} and x_test {test.shape} differ in kind")
    known = np.unique(arrays["y_train"])
    named = len(arrays["classes"]) if "classes" in arrays else len(known)
    if not np.array_equal(known, np.arange(named)):
        held = known.tolist()
        problems.append(f"{path}: y_train must hold each of the classes 0 to {named - 1}, and holds {held}")
    elif unknown := sorted(set(np.unique(arrays["y_test"]).tolist()) - set(known.tolist())):
        problems.append(f"{path}: y_test holds {unknown}, which y_train does not")


def _items(path: Path, split: str, arrays: dict[str, NDArray[Any]]) -> list[Item]:
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    return [Item(f"{path} x_{split}[{i}]", partial(_read, x[i], int(y[i])), int(y[i])) for i in range(len(x))]


def _read(sample: NDArray[Any], label: int) -> tuple[Any, int]:
    if sample.ndim == 1:
        return sample.astype(np.float32), label
    from PIL import Image

    return Image.fromarray(sample[..., 0] if sample.ndim == 3 and sample.shape[2] == 1 else sample), label
