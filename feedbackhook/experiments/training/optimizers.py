"""Optimizers by name, and schedules of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from feedbackhook.experiments.config import ConfigError, OptimizerConfig, ProtocolConfig
from feedbackhook.names import nearest
from feedbackhook.optim import BatchManhattan

_OWN: dict[str, Callable[[list[nn.Parameter], OptimizerConfig, dict[str, Any]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, config, shared: torch.optim.SGD(parameters, **shared),
    "batch_manhattan": lambda parameters, config, shared: BatchManhattan(
        parameters, setting=config.setting, **shared
    ),
}
"""The optimizers that are not timm's: each makes one from the parameters to train, the configuration, and the
keyword arguments `lr`, `momentum` and `weight_decay`."""


def check(config: OptimizerConfig) -> None:
    """Check that the optimizer exists and has every option that is set.

    Raises:
        ConfigError: the optimizer is unknown, or an option would have no effect.
    """
    name, default = config.name, OptimizerConfig()
    if name not in _OWN:
        _timm_name(name)
    if name != "batch_manhattan" and config.setting != default.setting:
        raise ConfigError(f"optimizer.setting has no effect with {name}, only with batch_manhattan")
    if not name.startswith("timm/") and config.options:
        raise ConfigError(f"optimizer.options have no effect with {name}, only with timm's optimizers")


def build(
    config: OptimizerConfig,
    model: nn.Module,
    learned: Sequence[nn.Parameter] = (),
    lr: float | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require a gradient.

    Args:
        config: which optimizer, and its options.
        model: the network.
        learned: what its feedback learns, which gets the same options and the whole weight decay.
        lr: the learning rate for that; None is that of the weights.

    Raises:
        ConfigError: the optimizer does not accept an option.
        ValueError: a number is out of range.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    shared: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    made = _made(config, model, trainable, shared)
    if learned:
        own = {"lr": config.lr if lr is None else lr, "weight_decay": config.weight_decay}
        made.add_param_group({"params": list(learned), **own})
    return made


def _made(
    config: OptimizerConfig, model: nn.Module, trainable: list[nn.Parameter], shared: dict[str, Any]
) -> torch.optim.Optimizer:
    if config.name in _OWN:
        return _OWN[config.name](trainable, config, shared)
    from timm.optim import create_optimizer_v2

    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            model, _timm_name(config.name), **shared, **config.options
        )
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"{config.name} with optimizer.options {config.options}: {error}") from error
    return made


def lr_schedule(
    config: ProtocolConfig, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate, by epoch."""
    if config.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    assert config.milestones is not None
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.lr_factor)


def _timm_name(name: str) -> str:
    """Return NAME of timm/NAME; raise a `ConfigError` if timm does not have it."""
    from timm.optim import list_optimizers

    library, _, own = name.partition("/")
    known = list_optimizers()
    if library != "timm" or own not in known:
        wanted, names = name, [*_OWN, *(f"timm/{other}" for other in known)]
        if library != "timm" and name in known:
            wanted = f"timm/{name}"
        raise ConfigError(
            f"optimizer.name {name!r} is not {', '.join(_OWN)} or timm/NAME{nearest(wanted, names)}"
        )
    return own
