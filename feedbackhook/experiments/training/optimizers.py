"""The optimizers by name, and the schedules of their learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from feedbackhook.experiments.config import ConfigError, OptimizerConfig, ProtocolConfig
from feedbackhook.names import nearest
from feedbackhook.optim import BatchManhattan


def check(config: OptimizerConfig) -> None:
    """Sees that the optimizer is there, and that every option is of it.

    Raises:
        ConfigError: it is unknown, or an option would have no effect.
    """
    name, default = config.name, OptimizerConfig()
    if name not in ("sgd", "batch_manhattan"):
        _timm_name(name)
    if name != "batch_manhattan" and config.setting != default.setting:
        raise ConfigError(f"optimizer.setting has no effect with {name}: it is of batch_manhattan")
    if not name.startswith("timm/") and config.options:
        raise ConfigError(f"optimizer.options have no effect with {name}: they are of timm's optimizers")


def build(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters of ``model`` that learn.

    Raises:
        ConfigError: it has no such options.
        ValueError: a number is out of its range.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    shared: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    if config.name == "sgd":
        return torch.optim.SGD(trained, **shared)
    if config.name == "batch_manhattan":
        return BatchManhattan(trained, setting=config.setting, **shared)
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
    """How the learning rate goes from epoch to epoch."""
    if config.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    assert config.milestones is not None
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.lr_factor)


def _timm_name(name: str) -> str:
    """NAME of timm/NAME, an optimizer that timm has."""
    from timm.optim import list_optimizers

    library, _, own = name.partition("/")
    known = list_optimizers()
    if library != "timm" or own not in known:
        wanted, names = name, ["sgd", "batch_manhattan", *(f"timm/{other}" for other in known)]
        if library != "timm" and name in known:
            wanted = f"timm/{name}"
        raise ConfigError(
            f"optimizer.name {name!r} is none of sgd, batch_manhattan and timm/NAME{nearest(wanted, names)}"
        )
    return own
