"""The five networks of Liao, Leibo and Poggio 2016, Table 1.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from feedbackhook.experiments.models.batch_norm import AveragedBatchNorm
from feedbackhook.experiments.models.registry import register_network

BatchNormName = Literal["none", "paper", "affine"]


@dataclass(frozen=True)
class Convolution:
    """A hidden convolution (maps, kernel, stride, padding) and the pool after it (3x3 or 2x2, stride 2).

    A 3x3 pool is padded by 1 on the right and bottom, which averages do not count.
    """

    maps: int
    kernel: int
    pool: Literal["max", "avg"]
    window: Literal[2, 3]
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Args:
        input: C, H, W; for a network without convolutions, the number of features.
        convolutions: its hidden convolutions.
        hidden: returns the widths of its hidden fully connected layers for a number of classes.
    """

    input: tuple[int, ...]
    convolutions: Sequence[Convolution]
    hidden: Callable[[int], Sequence[int]]


NETWORKS: dict[str, Network] = {
    "liao2016/mnist": Network(
        (1, 28, 28),
        (Convolution(20, 5, "max", 2), Convolution(50, 5, "max", 2)),
        lambda classes: (500,),
    ),
    "liao2016/cifar": Network(
        (3, 32, 32),
        (
            Convolution(32, 5, "max", 3, padding=2),
            Convolution(64, 5, "avg", 3, padding=2),
            Convolution(64, 5, "avg", 3, padding=2),
        ),
        lambda classes: (128,),
    ),
    "liao2016/svhn": Network(
        (3, 32, 32),
        (Convolution(20, 5, "max", 2), Convolution(512, 7, "max", 2)),
        lambda classes: (40,),
    ),
    "liao2016/timit": Network((1845,), (), lambda classes: (512, 256)),
    "liao2016/images": Network(
        (3, 119, 119),
        (Convolution(48, 9, "max", 2, stride=2), Convolution(128, 5, "max", 2)),
        lambda classes: (max(256, 3 * classes), 2 * classes),
    ),
}
"""By the names that `model.name` takes: for MNIST, CIFAR-10 and CIFAR-100, SVHN, TIMIT-80, and all other
datasets."""


def build_network(
    name: str, classes: int, channels: int, batch_norm: BatchNormName = "none"
) -> nn.Sequential:
    """Build a network of `NETWORKS`, which maps (N, C, H, W), or (N, features), to logits (N, K).

    Its layers are named conv1, conv2, ..., fc1, ...; the last is the classifier, and softmax is part of the
    loss. The paper does not state the following, chosen here: normalization comes between a layer and its
    ReLU, ReLU before the pool, layers keep their bias before normalization, and PyTorch initializes the
    weights.
    """
    network = NETWORKS[name]
    affine = partial(AveragedBatchNorm, affine=True)
    norm = {"none": None, "paper": AveragedBatchNorm, "affine": affine}[batch_norm]
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def hidden(name: str, layer: nn.Module, width: int) -> None:
        layers[name] = layer
        if norm is not None:
            layers[f"{name}_bn"] = norm(width)
        layers[f"{name}_relu"] = nn.ReLU()

    width = channels  # of features, their number
    rows = network.input[-1]  # images are square
    for number, of in enumerate(network.convolutions, 1):
        hidden(f"conv{number}", nn.Conv2d(width, of.maps, of.kernel, of.stride, of.padding), of.maps)
        pool: Callable[..., nn.Module] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[of.pool]
        layers[f"pool{number}"] = pool(of.window, 2, ceil_mode=of.window == 3)
        rows = (rows + 2 * of.padding - of.kernel) // of.stride + 1
        rows = -(-(rows - of.window) // 2) + 1 if of.window == 3 else rows // 2
        width = of.maps
    layers["flatten"] = nn.Flatten()
    width = width * rows**2 if network.convolutions else width
    for number, wanted in enumerate(network.hidden(classes), 1):
        hidden(f"fc{number}", nn.Linear(width, wanted), wanted)
        width = wanted
    layers[f"fc{len(network.hidden(classes)) + 1}"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


for name, network in NETWORKS.items():
    channels, height, width = (*network.input, 1, 1)[:3]
    register_network(name, (channels, height, width), fixed_size=True, has_batch_norm=True, classes=10)(
        partial(build_network, name)
    )
