"""Loads data: decoded once, into tensors that are kept in memory.

Shapes: N images, C channels, H x W pixels, K classes. Data with F features per sample are (N, F, 1, 1) of
float32 instead of (N, C, H, W) of uint8.
"""

from __future__ import annotations

import logging
import random
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.cache import cached
from feedbackhook.experiments.data.decode import decode_split
from feedbackhook.experiments.data.digits import DIGITS, read_digits
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.data.split import TEST_FRACTION, Split, stratified, subset, subsets

logger = logging.getLogger(__name__)

_DEVICE_FRACTION = 0.5  # of a GPU's free memory that images may take, which leaves the rest for training


@dataclass(frozen=True)
class ImageData:
    """Training, test and validation set, with the mean and standard deviation of the training set.

    All tensors are on the CPU until :meth:`to` moves them.

    Args:
        train: the training set, without the validation set.
        test: the test set.
        val: the validation set; None if `data.val_fraction` is 0.
        classes: K.
        mean: (C, 1, 1), in units of 0 to 1, or (F, 1, 1) in units of the features.
        std: likewise.
    """

    train: Split
    test: Split
    val: Split | None
    classes: int
    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> ImageData:
        """Return the data with all images on a CUDA ``device``, if they fit into half of its free memory.

        Otherwise the images stay on the CPU, and :meth:`batch` copies each mini-batch. For other devices,
        return the data as they are.
        """
        if device.type != "cuda":
            return self
        moved = replace(self, mean=self.mean.to(device), std=self.std.to(device))
        splits = [self.train, self.test, *([self.val] if self.val else [])]
        needed = sum(tensor.numel() * tensor.element_size() for split in splits for tensor in split)
        if needed > _DEVICE_FRACTION * torch.cuda.mem_get_info(device)[0]:
            return moved
        train, test, *val = (Split(s.images.to(device), s.labels.to(device)) for s in splits)
        return replace(moved, train=train, test=test, val=val[0] if val else None)

    def batch(self, split: Split, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the images at ``index`` as normalized float32 (N, C, H, W), and their classes (N,).

        Args:
            split: `train`, `test` or `val` of these data.
            index: a slice, or a tensor on the CPU or on the images' device.
            device: where the images and classes are wanted.
        """
        images = split.images[index].to(device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        images.sub_(self.mean.to(device)).div_(self.std.to(device))
        return images, split.labels[index].to(device)

    def augmentation(self, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Return timm's transform of training images: from (N, C, H, W) of uint8 to normalized float32 of the
        same shape, on the CPU. It draws from the generators of Python, NumPy and torch; see :func:`seeded`.

        Args:
            options: of `timm.data.create_transform`.

        Raises:
            ConfigError: timm has no such options, or they make it return something else.
        """
        from timm.data import create_transform
        from torchvision.transforms.v2.functional import to_pil_image

        if self.train.images.dtype != torch.uint8:
            raise ConfigError("data.augmentation needs images, but these data are features: remove it")
        channels, height, width = self.train.images.shape[1:]
        shape = (channels, height, width)
        mean, std = (tuple(values.flatten().tolist()) for values in (self.mean, self.std))
        try:
            transform = create_transform(shape, is_training=True, mean=mean, std=std, **options)
            with seeded(0):
                first = transform(to_pil_image(self.train.images[0].cpu()))
        except (TypeError, ValueError, KeyError, AssertionError) as error:
            raise ConfigError(f"data.augmentation {options} cannot be used: {error}") from error
        if not isinstance(first, Tensor) or first.dtype != torch.float32 or tuple(first.shape) != shape:
            raise ConfigError(
                f"data.augmentation {options} does not return one normalized image of size {shape}: remove "
                "the options that change this"
            )
        return lambda images: torch.stack([transform(to_pil_image(image)) for image in images.cpu()])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy with ``key`` inside the block, and restore them after
    it; torch's is left alone."""
    before, before_numpy = random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(key).generate_state(2)
    try:
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one epoch's shuffled mini-batches of ``size`` indices below ``count``.

    An incomplete last mini-batch is dropped, because Batch Manhattan and batch statistics give every
    mini-batch the same weight whatever its size.
    """
    order = torch.randperm(count, generator=generator)
    yield from order[: count // size * size].split(size)


def load(config: DataConfig) -> ImageData:
    """Load a dataset: decode and resize its images, or take them from the cache.

    Raises:
        ConfigError: there is no such dataset, files are missing or damaged, images differ in size, or the
            training and test classes differ.
    """
    if config.size is not None and config.size < 1:
        raise ConfigError(f"data.size must be a positive number of pixels, not {config.size}")
    if not 0 <= config.val_fraction < 1:
        raise ConfigError(
            f"data.val_fraction must be a fraction from 0 to less than 1, not {config.val_fraction}"
        )
    if config.name == DIGITS:
        train, test = subsets(config, read_digits(config.size)).values()
    else:
        tensors = cached(config, readers.locations(config), lambda: _decoded(config))
        train, test = (Split(tensors[f"{s}.images"], tensors[f"{s}.labels"]) for s in ("train", "test"))
        _warn_of_small_classes(config, len(train.labels), len(test.labels))
        if config.size is not None and train.images.dtype != torch.uint8:
            logger.warning(
                "data.size %d has no effect: %s has features, not images", config.size, config.name
            )
    channels = max(train.images.shape[1], test.images.shape[1])
    train, test = (Split(s.images.expand(-1, channels, -1, -1), s.labels) for s in (train, test))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ConfigError(f"training and test images of {config.name} differ in size: set data.size")
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    val = None
    if config.val_fraction:
        train, val = stratified(train, config.val_fraction)
    mean, std = _statistics(train.images)
    return ImageData(train, test, val, classes, mean, std)


def _decoded(config: DataConfig) -> dict[str, Tensor]:
    """The images and labels of the training and the test set."""
    sources = readers.find(config)
    if sources.problems:
        first, more = sources.problems[0], len(sources.problems) - 1
        root = "" if config.name.startswith("imagefolder:") else f" --root {shlex.quote(config.root)}"
        command = f"feedbackhook data check {shlex.quote(config.name)}{root}"
        others = f" (and {more} more; list all with: {command})" if more else ""
        raise ConfigError(f"{config.name} could not be read: {first}{others}; {sources.hint}")
    for difference in sources.differs:
        logger.warning("%s: %s", config.name, difference)
    known = "all" not in sources.splits and all(
        item.label is not None for items in sources.splits.values() for item in items
    )
    if known:  # decode only the images that are used
        for name, items in sources.splits.items():
            wanted = subset(config, name, torch.tensor([item.label for item in items]))
            sources.splits[name] = [items[i] for i in wanted]
    splits = {name: decode_split(items, config.size) for name, items in sources.splits.items()}
    if "all" in splits:
        splits["train"], splits["test"] = stratified(splits.pop("all"), TEST_FRACTION)
    if not known:
        splits = subsets(config, splits)
    return {f"{name}.{key}": t for name, split in splits.items() for key, t in split._asdict().items()}


def _warn_of_small_classes(config: DataConfig, train: int, test: int) -> None:
    """Warn if classes in a draw have fewer samples than are drawn, and are used with what they have."""
    dataset = DATASETS.get(config.name)
    if dataset is None or not dataset.train_at_most:
        return
    counts = (
        ("training", train, config.train_images or dataset.train),
        ("testing", test, config.test_images or dataset.test),
    )
    if short := [f"{count} instead of {all_} for {use}" for use, count, all_ in counts if count != all_]:
        logger.warning(
            "%s: some classes have fewer samples than are drawn: %s; list all with: %s",
            config.name,
            " and ".join(short),
            f"feedbackhook data check {config.name}",
        )


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all images and pixels, (C, 1, 1), from counts of the
    256 values of uint8; for features, of each over all samples, (F, 1, 1)."""
    if images.dtype != torch.uint8:
        std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
        std[std == 0] = 1.0
        return mean.float()[:, None, None], std.float()[:, None, None]
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1.0  # a channel with a single value is only centered
    return mean.float()[:, None, None], std.float()[:, None, None]
