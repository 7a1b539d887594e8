"""Optimizers by name."""

from __future__ import annotations

import torch

from feedbackhook.experiments.config import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.training import optimizers


def test_timms_optimizer_leaves_biases_without_decay(config: RunConfig) -> None:
    model = build(ModelConfig(), 10, 1, (28, 28))
    optimizer = optimizers.build(
        OptimizerConfig("timm/adamw", weight_decay=0.1, options={"eps": 1e-6}), model
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {p.shape: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[model.get_parameter("fc1.weight").shape] == 0.1
    assert decay[model.get_parameter("fc1.bias").shape] == 0.0
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
