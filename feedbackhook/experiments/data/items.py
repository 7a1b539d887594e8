"""What the readers of datasets share: samples that are found and not decoded yet."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedbackhook.experiments.config import ConfigError, DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image


class Item(NamedTuple):
    """One sample, not decoded yet.

    Args:
        name: its file, or its place where a file holds many.
        read: opens it; gives a PIL image, or features (F,) of float32, and its class.
        label: the class, where it is known before the sample is read.
    """

    name: str
    read: Callable[[], tuple[Image | NDArray[np.float32], int]]
    label: int | None = None


@dataclass
class Sources:
    """What a reader found.

    Args:
        splits: the samples of `train` and `test`, or of `all` where the data come without a split. One that
            could not be opened is not there, and a fault says why.
        folder: of a draw, all samples of the folder that it is from.
        faults: what is missing or damaged, each by its path. Whether samples can be decoded is not among it.
        short: classes of a draw that have fewer samples than are drawn, and are used with what they have.
        differs: how a folder from which a draw can be made differs from the published one.
        way_out: what to do about the faults.
    """

    splits: dict[str, list[Item]] = field(default_factory=dict)
    folder: list[Item] | None = None
    faults: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    way_out: str = ""


def decode(item: Item) -> tuple[Image | NDArray[np.float32], int]:
    """The image or the features, and the class.

    Raises:
        ConfigError: it is damaged, or nothing of the kind; the message names it.
    """
    from PIL.Image import DecompressionBombError

    try:
        sample, label = item.read()
        if not isinstance(sample, np.ndarray):
            sample.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise ConfigError(f"{item.name} cannot be decoded: {error}") from error
    return sample, label


def root(config: DataConfig) -> Path:
    """The folder `data.root`."""
    return Path(config.root).expanduser().resolve()


def way_out(config: DataConfig, can_download: bool, failure: str | None, source: str = "") -> str:
    """What to do where a dataset is not in `data.root`; ``failure`` is what its download ended with."""
    there = f"set --data.root to the folder that holds it, which is not {root(config)}"
    if not can_download:
        return f"torchvision cannot download it; {f'fetch it from {source} and ' if source else ''}{there}"
    if config.download:
        return f"the download into {root(config)} did not help ({failure})"
    return f"fetch it with --data.download true, or {there}"
