"""The images, decoded once into tensors that are held in memory.

Shapes: N images, C channels, H x W pixels, K classes. Data of F features a sample, such as TIMIT-80's, are
(N, F, 1, 1) of float32 in the place of (N, C, H, W) of uint8.
"""

from __future__ import annotations

import logging
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import cache as data_cache
from feedbackhook.experiments.data import sources as data_sources
from feedbackhook.experiments.data.registry import PAPER

logger = logging.getLogger(__name__)

_SPLIT_SEED = 0  # of the splits that are ours: the same for every run
_TEST_SHARE = 0.2  # of data that come without a split
_DEVICE_SHARE = 0.5  # of a GPU's free memory that images may take; the rest is the training's


class Split(NamedTuple):
    """Images (N, C, H, W) of uint8, or features (N, F, 1, 1) of float32, and their classes (N,) of int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A training and a test set, perhaps a set held out of the former, and the mean and std of what is
    trained on, each (C, 1, 1), in units of 0 to 1, or (F, 1, 1) in those of the features. All are on the CPU
    until :meth:`to` moves them."""

    train: Split
    test: Split
    val: Split | None
    classes: int
    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> ImageData:
        """The same, held on a CUDA ``device`` where all images fit into half of its free memory.

        Where they do not, the images stay on the CPU, and :meth:`batch` copies each mini-batch. On other
        devices this is the identity.
        """
        if device.type != "cuda":
            return self
        moved = replace(self, mean=self.mean.to(device), std=self.std.to(device))
        splits = [self.train, self.test, *([self.val] if self.val else [])]
        needed = sum(tensor.numel() * tensor.element_size() for split in splits for tensor in split)
        if needed > _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return moved
        train, test, *val = (Split(s.images.to(device), s.labels.to(device)) for s in splits)
        return replace(moved, train=train, test=test, val=val[0] if val else None)

    def batch(self, split: Split, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images at ``index`` (a slice, or a tensor on the CPU or with the images) as normalised float32
        (N, C, H, W), and their classes (N,)."""
        images = split.images[index].to(device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        images.sub_(self.mean.to(device)).div_(self.std.to(device))
        return images, split.labels[index].to(device)

    def augmentation(self, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """timm's transform of training images: from (N, C, H, W) of uint8, on the CPU, to normalised float32
        of the same shape. It draws from the generators of Python, numpy and torch; see :func:`seeded`.

        Args:
            options: of `timm.data.create_transform`.

        Raises:
            ConfigError: it has no such options, or with them makes other things than such a tensor.
        """
        from timm.data import create_transform
        from torchvision.transforms.v2.functional import to_pil_image

        if self.train.images.dtype != torch.uint8:
            raise ConfigError("data.augmentation is of images, and these data are features: leave it out")
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
                f"data.augmentation {options} makes something else than one normalised image of the size "
                f"{shape}: leave out what changes that"
            )
        return lambda images: torch.stack([transform(to_pil_image(image)) for image in images.cpu()])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's and numpy's global generators, seeded by ``key`` within the block, and as they were after it;
    torch's goes on."""
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
    """One epoch's mini-batches of ``size`` indices below ``count``, shuffled.

    What is left over, less than a mini-batch, is not drawn: each mini-batch counts the same in Batch
    Manhattan and in batch statistics, whatever its size.
    """
    order = torch.randperm(count, generator=generator)
    yield from order[: count // size * size].split(size)


def load(config: DataConfig) -> ImageData:
    """Load a data set: decoded and resized, or as the cache of an earlier time holds it.

    Raises:
        ConfigError: no such data, files that are missing or damaged, images of several sizes, or classes
            that differ.
    """
    if config.size is not None and config.size < 1:
        raise ConfigError(f"data.size must be a positive number of pixels, not {config.size}")
    if not 0 <= config.val_fraction < 1:
        raise ConfigError(
            f"data.val_fraction must be a share from 0 to less than 1, not {config.val_fraction}"
        )
    if config.name == "digits":
        train, test = _few(config, dict(zip(("train", "test"), _digits(config.size), strict=True))).values()
    else:
        tensors = data_cache.cached(config, data_sources.locations(config), lambda: _decoded(config))
        train, test = (Split(tensors[f"{s}.images"], tensors[f"{s}.labels"]) for s in ("train", "test"))
        _tell_what_is_short(config, len(train.labels), len(test.labels))
        if config.size is not None and train.images.dtype != torch.uint8:
            logger.warning("data.size %d has no effect: %s is features, not images", config.size, config.name)
    channels = max(train.images.shape[1], test.images.shape[1])
    train, test = (Split(s.images.expand(-1, channels, -1, -1), s.labels) for s in (train, test))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ConfigError(f"training and test images of {config.name} differ in size: set data.size")
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    val = None
    if config.val_fraction:
        train, val = _stratified(train, config.val_fraction)
    mean, std = _statistics(train.images)
    return ImageData(train, test, val, classes, mean, std)


def _decoded(config: DataConfig) -> dict[str, Tensor]:
    """The images and labels of the training and the test set."""
    sources = data_sources.find(config)
    if sources.faults:
        first, more = sources.faults[0], len(sources.faults) - 1
        root = "" if config.name.startswith("imagefolder:") else f" --root {shlex.quote(config.root)}"
        command = f"feedbackhook data check {shlex.quote(config.name)}{root}"
        others = f" (and {more} more, which {command} lists)" if more else ""
        raise ConfigError(f"{config.name} could not be read: {first}{others}; {sources.way_out}")
    for difference in sources.differs:
        logger.warning("%s: %s", config.name, difference)
    known = "all" not in sources.splits and all(
        item.label is not None for items in sources.splits.values() for item in items
    )
    if known:  # only those that are wanted are decoded
        for name, items in sources.splits.items():
            wanted = _wanted(config, name, torch.tensor([item.label for item in items]))
            sources.splits[name] = [items[i] for i in wanted]
    splits = {name: _decode(items, config.size) for name, items in sources.splits.items()}
    if "all" in splits:
        splits["train"], splits["test"] = _stratified(splits.pop("all"), _TEST_SHARE)
    if not known:
        splits = _few(config, splits)
    return {f"{name}.{key}": t for name, split in splits.items() for key, t in split._asdict().items()}


def _tell_what_is_short(config: DataConfig, train: int, test: int) -> None:
    """A warning where classes of a draw, used with what they have, have fewer images than are drawn."""
    dataset = PAPER.get(config.name)
    if dataset is None or dataset.draw is None or dataset.draw.least_train is None:
        return
    wanted = (config.train_images or dataset.train, config.test_images or dataset.test)
    if (train, test) != wanted:
        logger.warning(
            "%s: some classes have fewer samples than are drawn: %d of %d to train on, %d of %d to test on; "
            "feedbackhook data check %s lists them",
            config.name,
            *(train, wanted[0], test, wanted[1]),
            config.name,
        )


def _few(config: DataConfig, splits: dict[str, Split]) -> dict[str, Split]:
    """Of each split as many images as are wanted."""
    wanted = {name: _wanted(config, name, split.labels) for name, split in splits.items()}
    return {
        name: split if len(wanted[name]) == len(split.labels) else Split(*(t[wanted[name]] for t in split))
        for name, split in splits.items()
    }


def _wanted(config: DataConfig, split: str, labels: Tensor) -> Sequence[int]:
    """The places of the images of a split that are wanted, of each class by its share, in their order.

    Raises:
        ConfigError: there are fewer, or less than one of each class is wanted.
    """
    from sklearn.model_selection import train_test_split

    wanted = {"train": config.train_images, "test": config.test_images}[split]
    if wanted is None or wanted == len(labels):
        return range(len(labels))
    if wanted > len(labels):
        raise ConfigError(f"data.{split}_images is {wanted}: {config.name} has {len(labels)}")
    try:
        drawn, _ = train_test_split(
            np.arange(len(labels)), train_size=wanted, stratify=labels.numpy(), random_state=_SPLIT_SEED
        )
    except ValueError as error:
        raise ConfigError(f"data.{split}_images {wanted} of {len(labels)}: {error}") from error
    return sorted(int(i) for i in drawn)


def _digits(size: int | None) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return _stratified(Split(_resize(images, size), torch.from_numpy(digits.target).long()), _TEST_SHARE)


def _stratified(whole: Split, share: float) -> tuple[Split, Split]:
    """A fixed split: all but ``share`` of each class, and that.

    Raises:
        ConfigError: the share of some class is less than one image, or leaves none.
    """
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            np.arange(len(whole.labels)),
            test_size=share,
            stratify=whole.labels.numpy(),
            random_state=_SPLIT_SEED,
        )
    except ValueError as error:
        raise ConfigError(f"cannot set {share:g} of the {len(whole.labels)} images apart: {error}") from error
    return Split(whole.images[rest], whole.labels[rest]), Split(whole.images[part], whole.labels[part])


def _decode(items: Sequence[data_sources.Item], size: int | None) -> Split:
    """The images of one split; grey ones become colour where both occur."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    images, labels = [], []
    for image, label in map(data_sources.decode, items):
        labels.append(label)
        if isinstance(image, np.ndarray):
            images.append(torch.from_numpy(image)[:, None, None])
            continue
        mode = "L" if image.mode in ("1", "L") else "RGB"
        images.append(_resize(pil_to_tensor(image.convert(mode)), size))
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        (h, w), (h2, w2) = sorted(sizes)[0], sorted(sizes)[-1]
        raise ConfigError(f"images differ in size (from {h}x{w} to {h2}x{w2} pixels): set data.size")
    channels = max(image.shape[0] for image in images)
    return Split(torch.stack([i.expand(channels, -1, -1) for i in images]), torch.tensor(labels))


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Images (..., C, H, W) of uint8 to size x size, bilinear with antialiasing; the aspect is not kept."""
    from torchvision.transforms.v2.functional import resize

    return images if size is None else resize(images, [size, size], antialias=True)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel over all images and pixels, (C, 1, 1), of uint8 from counts of the 256
    values; of each feature over all samples, (F, 1, 1)."""
    if images.dtype != torch.uint8:
        std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
        std[std == 0] = 1.0
        return mean.float()[:, None, None], std.float()[:, None, None]
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1.0  # a channel of one value is left centred
    return mean.float()[:, None, None], std.float()[:, None, None]
