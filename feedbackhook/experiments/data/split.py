"""Fixed, stratified splits and subsets of data: the same for every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from feedbackhook.experiments.config import ConfigError, DataConfig

TEST_FRACTION = 0.2  # of data that come without a split
_SEED = 0


class Split(NamedTuple):
    """Images (N, C, H, W) of uint8, or features (N, F, 1, 1) of float32, and their classes (N,) of int64."""

    images: Tensor
    labels: Tensor


def stratified(whole: Split, fraction: float) -> tuple[Split, Split]:
    """Split off ``fraction`` of each class; return the rest, and the part split off.

    Raises:
        ConfigError: that is less than one image of some class, or leaves none.
    """
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            np.arange(len(whole.labels)),
            test_size=fraction,
            stratify=whole.labels.numpy(),
            random_state=_SEED,
        )
    except ValueError as error:
        raise ConfigError(
            f"cannot split off {fraction:g} of the {len(whole.labels)} images: {error}"
        ) from error
    return Split(whole.images[rest], whole.labels[rest]), Split(whole.images[part], whole.labels[part])


def subsets(config: DataConfig, splits: dict[str, Split]) -> dict[str, Split]:
    """Return the subset of each split that `data.train_images` and `data.test_images` ask for."""
    wanted = {name: subset(config, name, split.labels) for name, split in splits.items()}
    return {
        name: split if len(wanted[name]) == len(split.labels) else Split(*(t[wanted[name]] for t in split))
        for name, split in splits.items()
    }


def subset(config: DataConfig, split: str, labels: Tensor) -> Sequence[int]:
    """Return the indices, in ascending order, of the images that `data.train_images` or `data.test_images`
    asks for: the same fraction of each class.

    Raises:
        ConfigError: there are fewer images, or that is less than one of each class.
    """
    from sklearn.model_selection import train_test_split

    wanted = {"train": config.train_images, "test": config.test_images}[split]
    if wanted is None or wanted == len(labels):
        return range(len(labels))
    if wanted > len(labels):
        raise ConfigError(f"data.{split}_images is {wanted}, but {config.name} has {len(labels)}")
    try:
        drawn, _ = train_test_split(
            np.arange(len(labels)), train_size=wanted, stratify=labels.numpy(), random_state=_SEED
        )
    except ValueError as error:
        raise ConfigError(f"data.{split}_images {wanted} of {len(labels)}: {error}") from error
    return sorted(int(i) for i in drawn)
