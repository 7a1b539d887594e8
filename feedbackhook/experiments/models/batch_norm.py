"""Batch normalization with averaged statistics for evaluation, and over several processes.

Shapes: N images, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from feedbackhook.experiments.config import ConfigError

# `std` already contains eps, but cuDNN refuses eps=0. Since std^2 is at least the eps of training, adding the
# smallest normal float32 to it changes no bit.
_NO_EPS = torch.finfo(torch.float32).tiny


class AveragedBatchNorm(nn.Module):
    """Normalize by batch statistics in training, and by averages of them in evaluation.

    As in Liao, Leibo and Poggio 2016: by default there is no learnable scale and shift, and the averages are
    those that :func:`estimate_statistics` took last (before that, mean 0 and std 1) instead of running ones.
    In training, x becomes (x - mean) / std with mean and std of each channel over the mini-batch and pixels.
    The paper does not say whether the variance is biased; here std = sqrt(biased variance + eps) in training
    and evaluation. The backward pass is PyTorch's, through mean and std.

    Args:
        channels: C of the input, of shape (N, C) or (N, C, H, W).
        affine: add a learnable scale and shift for each channel.
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
        """Map (N, C, ...) to the same shape."""
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return F.batch_norm(x, self.mean, self.std.square(), self.weight, self.bias, eps=_NO_EPS)

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of a mini-batch (N, C, ...), each of shape (C,)."""
        mean, unbiased = torch.zeros_like(self.mean), torch.zeros_like(self.std)
        # with momentum 1 the running statistics are the mini-batch's; much faster than torch.var_mean
        F.batch_norm(x, mean, unbiased, training=True, momentum=1.0)
        count = x.numel() // self.channels
        return mean, (unbiased * ((count - 1) / count) + self.eps).sqrt()

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.weight is not None}, eps={self.eps}"


def insert_batch_norm(model: nn.Module, affine: bool = False) -> None:
    """Insert a :class:`AveragedBatchNorm` after each `nn.Conv2d` of a model, in place.

    The convolution NAME becomes NAME.conv, followed by NAME.norm. Weights do not change.

    Raises:
        ConfigError: the model already has normalization, or has no convolutions.
    """
    if own := sorted({type(module).__name__ for module in model.modules() if _normalizes(module)}):
        raise ConfigError(f"model.batch_norm needs a model without normalization, but this one has {own[0]}")
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ConfigError("model.batch_norm needs a model with convolutions, but this one has none")
    for name, convolution in convolutions.items():
        parent, _, attribute = name.rpartition(".")
        norm = AveragedBatchNorm(convolution.out_channels, affine).train(convolution.training)
        both = OrderedDict(conv=convolution, norm=norm)
        setattr(model.get_submodule(parent), attribute, nn.Sequential(both))


def _normalizes(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor], alpha: float = 0.05) -> None:
    """Estimate the statistics for evaluation of every :class:`AveragedBatchNorm` in ``model``, in place.

    They are exponential moving averages of the mean and std of mini-batches: average <- (1 - alpha) average
    + alpha batch (Liao et al. 2016: alpha = 0.05, 20 mini-batches, after each epoch). The paper does not say
    where the average starts; here each call starts it again with its first mini-batch. All other layers run
    in evaluation mode, so dropout draws nothing. If the model has no AveragedBatchNorm, nothing happens and
    no batch is drawn.

    Args:
        model: the network; each module's training mode is restored.
        batches: inputs from the training set.
        alpha: weight of the newest mini-batch, 0 to 1.
    """
    norms = [m for m in model.modules() if isinstance(m, AveragedBatchNorm)]
    if not norms:
        return
    averages: dict[AveragedBatchNorm, tuple[Tensor, Tensor]] = {}

    def update(norm: AveragedBatchNorm, inputs: tuple[Tensor]) -> None:
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


class OfAllProcesses(TorchFunctionMode):
    """Compute batch statistics in training over the mini-batches of all processes, which have equal sizes.

    It replaces `F.batch_norm`, which every kind of batch normalization calls, including ours and timm's
    layers with activations. `nn.SyncBatchNorm` would replace modules, knows only torch's own, and needs a
    GPU. Mean and biased variance take two passes, in float32 or better; running averages use them too.

    Args:
        count: number of processes.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Map (N, C, ...) to the same shape."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        x = input if input.dtype == torch.float64 else input.float()
        dims, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
        mean = self._mean(x.mean(dims))
        centered = x - mean.view(shape)
        variance = self._mean(centered.square().mean(dims))
        if running_mean is not None and running_var is not None:
            entries = self._count * x.numel() // x.shape[1]
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
            unbiased = variance.detach() * (entries / (entries - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        output = centered * (variance + eps).rsqrt().view(shape)
        if weight is not None:
            output = output * weight.view(shape)
        if bias is not None:
            output = output + bias.view(shape)
        return output.to(input.dtype)

    def _mean(self, values: Tensor) -> Tensor:
        mean: Tensor = _MeanOfAll.apply(values, self._count)
        return mean


class _MeanOfAll(torch.autograd.Function):
    """The mean of a tensor over all processes. It is its own transpose, as the loss is the sum over them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, count: int) -> Tensor:
        ctx.count = count
        total = values.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total / ctx.count, None


def other_batch_statistics(model: nn.Module) -> str | None:
    """Return the class of a module that computes batch statistics without `F.batch_norm`, if there is one:
    timm's EvoNorm-B or torch's SyncBatchNorm."""
    kinds = (type(module).__name__ for module in model.modules())
    return next((kind for kind in kinds if kind.startswith(("EvoNorm2dB", "SyncBatchNorm"))), None)
