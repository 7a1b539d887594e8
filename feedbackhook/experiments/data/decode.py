"""Decodes samples that readers have found."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedbackhook.experiments.config import ConfigError
from feedbackhook.experiments.data.items import Item
from feedbackhook.experiments.data.split import Split

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(item: Item) -> tuple[Image | NDArray[np.float32], int]:
    """Return the image or the features of a sample, and its class.

    Raises:
        ConfigError: the file is damaged or has another format; the message names it.
    """
    from PIL.Image import DecompressionBombError

    try:
        sample, label = item.read()
        if not isinstance(sample, np.ndarray):
            sample.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError) as error:
        raise ConfigError(f"{item.name} cannot be decoded: {error}") from error
    return sample, label


def decode_split(items: Sequence[Item], size: int | None) -> Split:
    """Return the samples of one split; if it has both gray and color images, gray ones become color.

    Raises:
        ConfigError: a sample cannot be decoded, or the images differ in size and ``size`` is None.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    images, labels = [], []
    for image, label in map(decode, items):
        labels.append(label)
        if isinstance(image, np.ndarray):
            images.append(torch.from_numpy(image)[:, None, None])
            continue
        mode = "L" if image.mode in ("1", "L") else "RGB"
        images.append(resize(pil_to_tensor(image.convert(mode)), size))
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        (h, w), (h2, w2) = sorted(sizes)[0], sorted(sizes)[-1]
        raise ConfigError(f"images differ in size (from {h}x{w} to {h2}x{w2} pixels): set data.size")
    channels = max(image.shape[0] for image in images)
    return Split(torch.stack([i.expand(channels, -1, -1) for i in images]), torch.tensor(labels))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize images (..., C, H, W) of uint8 to size x size, bilinear with antialiasing, without keeping the
    aspect ratio."""
    from torchvision.transforms.v2.functional import resize

    return images if size is None else resize(images, [size, size], antialias=True)
