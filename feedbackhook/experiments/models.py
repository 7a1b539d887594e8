"""The networks: the paper's for MNIST with its batch normalisation, and timm's by name.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackhook.experiments.config import ConfigError, ModelConfig

BatchNormName = Literal["none", "paper", "affine"]

LIAO_MNIST = "liao2016/mnist"
LIAO_MNIST_SIZE = 28


class PaperBatchNorm(nn.Module):
    """Batch normalisation as in Liao, Leibo and Poggio 2016: no learnable scale and shift unless asked for.

    In training, (x - mean) / std with the mini-batch's own mean and std, per channel over batch and pixels.
    In evaluation, with the averages that :func:`estimate_statistics` took last (before that, 0 and 1). The
    paper leaves open whether the variance is biased; here std = sqrt(biased variance + eps) in both, as
    training normalises by it. The backward pass is PyTorch's own, through mean and std.

    Args:
        channels: C of the input, shape (N, C) or (N, C, H, W).
        affine: a learnable scale and shift by channel (the paper's columns BN and BN+BM).
        eps: added to the variance.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return F.batch_norm(x, self.mean, self.std.square(), self.weight, self.bias, eps=0.0)

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of a mini-batch (N, C, ...), each of shape (C,)."""
        mean, unbiased = torch.zeros_like(self.mean), torch.zeros_like(self.std)
        # a momentum of 1 fills in the mini-batch's own; several times as fast as torch.var_mean
        F.batch_norm(x, mean, unbiased, training=True, momentum=1.0)
        count = x.numel() // self.channels
        return mean, (unbiased * ((count - 1) / count) + self.eps).sqrt()

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.weight is not None}, eps={self.eps}"


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor], alpha: float = 0.05) -> None:
    """Take the statistics for evaluation of every :class:`PaperBatchNorm` in ``model``, in place.

    Exponential moving average of each mini-batch's mean and std, average <- (1 - alpha) average +
    alpha batch (Liao et al. 2016: alpha = 0.05, 20 mini-batches, after each epoch). Where the average
    starts is not stated in the paper; here it starts anew at each call, with the first mini-batch.
    All other layers run as in evaluation, so dropout draws nothing. A model without PaperBatchNorm is
    left alone and the batches are not drawn.

    Args:
        model: left in the mode (training or evaluation) in which it came, module by module.
        batches: inputs of the training set.
        alpha: the weight of the newest mini-batch, 0 to 1.
    """
    norms = [m for m in model.modules() if isinstance(m, PaperBatchNorm)]
    if not norms:
        return
    averages: dict[PaperBatchNorm, tuple[Tensor, Tensor]] = {}

    def update(norm: PaperBatchNorm, inputs: tuple[Tensor]) -> None:
        batch = norm.batch_statistics(inputs[0])
        old = averages.get(norm, batch)
        averages[norm] = (old[0].lerp(batch[0], alpha), old[1].lerp(batch[1], alpha))

    modes = {module: module.training for module in model.modules()}
    handles = [norm.register_forward_pre_hook(update) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
        for x in batches:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    for norm, (mean, std) in averages.items():
        norm.mean.copy_(mean)
        norm.std.copy_(std)


def liao2016_mnist(classes: int = 10, channels: int = 1, batch_norm: BatchNormName = "none") -> nn.Sequential:
    """The network for MNIST of Liao et al. 2016, Table 1: (N, C, 28, 28) to logits (N, K).

    C5x5x20/1, max 2/2, C5x5x50/1, max 2/2, FC 500, FC K, unpadded, a ReLU after each hidden layer; the
    softmax is the loss's. 431,080 parameters for one channel and ten classes, without batch normalisation.
    Not stated in the paper, and chosen here: normalisation sits between a layer and its ReLU, ReLU before
    the pool, layers keep their bias before a normalisation, and weights start as PyTorch's do.
    """
    norm = {"none": None, "paper": PaperBatchNorm, "affine": partial(PaperBatchNorm, affine=True)}[batch_norm]
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def hidden(name: str, layer: nn.Module, width: int, *after: tuple[str, nn.Module]) -> None:
        layers[name] = layer
        if norm is not None:
            layers[f"{name}_bn"] = norm(width)
        layers[f"{name}_relu"] = nn.ReLU()
        layers.update(after)

    hidden("conv1", nn.Conv2d(channels, 20, 5), 20, ("pool1", nn.MaxPool2d(2)))
    hidden("conv2", nn.Conv2d(20, 50, 5), 50, ("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten()))
    hidden("fc1", nn.Linear(50 * 4 * 4, 500), 500)
    layers["fc2"] = nn.Linear(500, classes)
    return nn.Sequential(layers)


def natural_size(config: ModelConfig) -> int | None:
    """The image size that a model is made for, in pixels, or None where images come as they are."""
    return LIAO_MNIST_SIZE if config.name == LIAO_MNIST else None


def default_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images for which a model was made.

    Raises:
        ConfigError: no such model.
    """
    if name == LIAO_MNIST:
        return 1, LIAO_MNIST_SIZE, LIAO_MNIST_SIZE
    import timm

    timm_name = _timm_name(name)
    config = timm.get_pretrained_cfg(timm_name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    return channels, height, width


def build(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """The model for K ``classes`` and images of C ``channels`` and H x W = ``size``, on the CPU.

    Raises:
        ConfigError: no such model, options that it does not have, or images that it cannot take.
    """
    if config.name == LIAO_MNIST:
        if size != (LIAO_MNIST_SIZE, LIAO_MNIST_SIZE):
            raise ConfigError(
                f"{LIAO_MNIST} takes images of 28x28, not {size[0]}x{size[1]}: set data.size to 28"
            )
        if config.options:
            raise ConfigError(f"{LIAO_MNIST} has no model.options; it was given {sorted(config.options)}")
        return liao2016_mnist(classes, channels, config.batch_norm)
    return _timm_model(_timm_name(config.name), config, classes, channels, size)


def _timm_name(model: str) -> str:
    """NAME of timm/NAME, a model that timm has."""
    import timm

    library, _, name = model.partition("/")
    if library != "timm" or not name:
        raise ConfigError(f"no model is named {model!r}: it is {LIAO_MNIST}, or timm/NAME for a timm model")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models(f"*{name}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model named {name!r}{hint}")
    return name


def _timm_model(
    name: str, config: ModelConfig, classes: int, channels: int, size: tuple[int, int]
) -> nn.Module:
    import timm

    if config.batch_norm != "none":
        raise ConfigError("model.batch_norm is for the paper's networks; a timm model brings its own")
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **config.options)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"timm/{name} with model.options {config.options}: {error}") from error
    _try_images(model, name, channels, size)
    return model


@torch.no_grad()
def _try_images(model: nn.Module, name: str, channels: int, size: tuple[int, int]) -> None:
    training = model.training
    try:
        model.eval()(torch.zeros(2, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"timm/{name} cannot take images of {size[0]}x{size[1]} with {channels} channels ({error}): "
            "set data.size, or the model's own size in model.options"
        ) from error
    finally:
        model.train(training)
