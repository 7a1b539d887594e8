"""What the readers of datasets share: samples that are found but not decoded yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedbackhook.experiments.config import DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image


class Item(NamedTuple):
    """One sample, not decoded yet.

    Args:
        name: its file, or its position in a file that holds many.
        read: decodes it; returns a PIL image, or features (F,) of float32, and its class.
        label: its class, if known before the sample is read.
    """

    name: str
    read: Callable[[], tuple[Image | NDArray[np.float32], int]]
    label: int | None = None


@dataclass
class Sources:
    """What a reader found.

    Args:
        splits: the samples of `train` and `test`, or of `all` if the data come without a split. A split that
            could not be opened is missing here, and `problems` say why.
        folder: for a draw, all samples of the folder that it draws from.
        problems: what is missing or damaged, each with its path. The samples have not been decoded yet.
        short: classes in a draw that have fewer samples than are drawn, and are used with what they have.
        differs: how the folder of a draw differs from the published one, if the draw can be made anyway.
        hint: what to do about the problems.
    """

    splits: dict[str, list[Item]] = field(default_factory=dict)
    folder: list[Item] | None = None
    problems: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    hint: str = ""


def root(config: DataConfig) -> Path:
    """Return the folder `data.root`."""
    return Path(config.root).expanduser().resolve()


def hint_if_missing(
    config: DataConfig, downloadable: bool, failure: str | None = None, home_page: str = ""
) -> str:
    """Return what to do if a dataset is not in `data.root`.

    Args:
        config: the data.
        downloadable: whether torchvision can download it.
        failure: why the download failed.
        home_page: where to get it.
    """
    elsewhere = f"set --data.root to the folder that contains it ({root(config)} does not)"
    if not downloadable:
        get = f"get it from {home_page} and " if home_page else ""
        return f"torchvision cannot download it: {get}{elsewhere}"
    if config.download:
        return f"downloading it into {root(config)} did not help ({failure})"
    return f"download it with --data.download true, or {elsewhere}"
