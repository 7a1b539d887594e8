"""The images, decoded once into tensors that are held in memory.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from feedbackhook.experiments.config import ConfigError, DataConfig

_SPLIT_SEED = 0  # of the splits that are ours: the same for every run
_TEST_SHARE = 0.2  # of data that come without a split


class Split(NamedTuple):
    """Images (N, C, H, W) of uint8 and their classes (N,) of int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A training and a test set, perhaps a set held out of the former, and the mean and std of what is
    trained on, each (C, 1, 1), in units of 0 to 1."""

    train: Split
    test: Split
    held_out: Split | None
    classes: int
    mean: Tensor
    std: Tensor

    def batch(self, split: Split, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images at ``index`` as normalised float32 (N, C, H, W), and their classes (N,)."""
        images = split.images[index].to(device).float().div_(255)
        images.sub_(self.mean.to(device)).div_(self.std.to(device))
        return images, split.labels[index].to(device)


def minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch's mini-batches of ``size`` indices below ``count``, shuffled.

    What is left over, less than a mini-batch, is not drawn: each mini-batch counts the same in Batch
    Manhattan and in batch statistics, whatever its size.
    """
    order = torch.randperm(count, generator=generator)
    yield from order[: count // size * size].split(size)


def load(config: DataConfig) -> ImageData:
    """Load and decode a data set.

    Raises:
        ConfigError: no such data, no such folder, images of several sizes, or classes that differ.
    """
    size = config.size
    if size is not None and size < 1:
        raise ConfigError(f"data.size must be a positive number of pixels, not {size}")
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"data.held_out must be a share from 0 to less than 1, not {config.held_out}")
    kind, _, path = config.name.partition(":")
    if config.name == "digits":
        train, test = _digits(size)
    elif kind == "imagefolder":
        train, test = _image_folder(Path(path), size)
    else:
        train, test = _torchvision(config, size)
    channels = max(train.images.shape[1], test.images.shape[1])
    train, test = (Split(s.images.expand(-1, channels, -1, -1), s.labels) for s in (train, test))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ConfigError(f"training and test images of {config.name} differ in size: set data.size")
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    held_out = None
    if config.held_out:
        train, held_out = _stratified(train, config.held_out)
    mean, std = _statistics(train.images)
    return ImageData(train, test, held_out, classes, mean, std)


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


def _image_folder(path: Path, size: int | None) -> tuple[Split, Split]:
    from torchvision.datasets import ImageFolder

    folders = [path / name for name in ("train", "test", "val")]
    train, test = folders[0], next((f for f in folders[1:] if f.is_dir()), folders[1])
    if not (train.is_dir() and test.is_dir()):
        raise ConfigError(
            f"no images in {path.resolve()}: imagefolder:PATH needs PATH/train/CLASS/IMAGE and "
            "PATH/test/CLASS/IMAGE (or PATH/val/CLASS/IMAGE)"
        )
    try:
        sets = ImageFolder(str(train)), ImageFolder(str(test))
    except FileNotFoundError as error:
        raise ConfigError(f"no images in {path.resolve()}: {error}") from error
    if sets[0].classes != sets[1].classes:
        odd = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise ConfigError(
            f"{train} and {test} differ in their classes: {', '.join(odd[:5])} in only one of them"
        )
    return _decode(sets[0], size), _decode(sets[1], size)


# The classification classes of torchvision.datasets, and the arguments that make the training and the
# test set of each; None where the data have no such split and get ours.
_FLAG = ({"train": True}, {"train": False})
_NAMED = ({"split": "train"}, {"split": "test"})
_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_VAL = ({"split": "train"}, {"split": "val"})
_TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    **dict.fromkeys(["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"], _FLAG),
    **dict.fromkeys(["Country211", "DTD", "FER2013", "Flowers102", "Food101", "GTSRB", "PCAM"], _NAMED),
    **dict.fromkeys(["LFWPeople", "RenderedSST2", "STL10", "StanfordCars", "SVHN"], _NAMED),
    **dict.fromkeys(["FGVCAircraft", "OxfordIIITPet"], _TRAINVAL),
    **dict.fromkeys(["CLEVRClassification", "ImageNet", "Imagenette"], _VAL),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "INaturalist": ({"version": "2021_train"}, {"version": "2021_valid"}),
    "Places365": ({"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    **dict.fromkeys(["Caltech101", "Caltech256", "EuroSAT", "FakeData", "SEMEION", "SUN397"], None),
}


def _torchvision(config: DataConfig, size: int | None) -> tuple[Split, Split]:
    from torchvision import datasets

    if config.name not in _TORCHVISION:
        known = ", ".join(sorted(_TORCHVISION))
        what = "has no classes for training and test" if hasattr(datasets, config.name) else "is unknown"
        raise ConfigError(
            f"data.name {config.name!r} {what}: use digits, imagefolder:PATH, or one of {known}"
        )
    splits = _TORCHVISION[config.name]
    constructor = getattr(datasets, config.name)
    given = _accepted(constructor, {"root": config.root, "download": config.download})
    try:
        sets = [constructor(**given, **arguments) for arguments in splits or ({},)]
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:  # damaged files, too
        raise ConfigError(_not_found(config, "download" in given, error)) from error
    decoded = [_decode(images, size) for images in sets]
    return (decoded[0], decoded[1]) if splits else _stratified(decoded[0], _TEST_SHARE)


def _accepted(constructor: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that the constructor, or one that it hands its ``**kwargs`` to, names."""
    names: set[str] = set()
    for base in constructor.__mro__:
        parameters = inspect.signature(base).parameters
        names.update(parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return {name: value for name, value in arguments.items() if name in names}


def _not_found(config: DataConfig, can_download: bool, error: Exception) -> str:
    where = f"{config.name} could not be read from data.root = {Path(config.root).resolve()}"
    if config.download and can_download:
        return f"{where}, nor downloaded into it ({error})"
    way_out = (
        "fetch it with --data.download true, or " if can_download else "torchvision cannot download it; "
    )
    return f"{where} ({error}): {way_out}set --data.root to the folder that holds it"


def _decode(items: Any, size: int | None) -> Split:
    """PIL images and classes as one :class:`Split`; grey images become colour where both occur."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    images, labels = [], []
    for image, label in _each(items):
        mode = "L" if image.mode in ("1", "L") else "RGB"
        images.append(_resize(pil_to_tensor(image.convert(mode)), size))
        labels.append(int(label))
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        (h, w), (h2, w2) = sorted(sizes)[0], sorted(sizes)[-1]
        raise ConfigError(f"images differ in size (from {h}x{w} to {h2}x{w2} pixels): set data.size")
    channels = max(image.shape[0] for image in images)
    return Split(torch.stack([i.expand(channels, -1, -1) for i in images]), torch.tensor(labels))


def _each(items: Any) -> Iterator[tuple[Any, int]]:
    # most of torchvision's datasets have no end of iteration, only a length
    for i in range(len(items)):
        try:
            image, label = items[i]
            image.load()
        except OSError as error:
            name = items.samples[i][0] if hasattr(items, "samples") else f"image {i}"
            raise ConfigError(f"{name} cannot be decoded: {error}") from error
        yield image, label


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Images (..., C, H, W) of uint8 to size x size, bilinear with antialiasing; the aspect is not kept."""
    from torchvision.transforms.v2.functional import resize

    return images if size is None else resize(images, [size, size], antialias=True)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel over all images and pixels, (C, 1, 1), from counts of the 256 values."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1.0  # a channel of one value is left centred
    return mean.float()[:, None, None], std.float()[:, None, None]
