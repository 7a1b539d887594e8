"""Gradients are means over the mini-batch, or sums, as in the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from feedbackhook.experiments.config import ConfigError, RunConfig
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training.run import train
from feedbackhook.store.recorder import read


def run(folder: Path, **protocol: object) -> RunConfig:
    config = RunConfig(output=str(folder))
    config.feedback.mode, config.optimizer.name, config.model.name = "frSF", "sgd", "timm/test_resnet"
    config.data.size, config.data.train_images, config.record.figures = 16, 200, False
    config.optimizer.weight_decay = 0.0
    config.protocol.epochs, config.protocol.batch_size, config.protocol.device = 1, 64, "cpu"
    for name, value in protocol.items():
        setattr(config.protocol, name, value)
    return config


@pytest.mark.parametrize("steps", [1, 2], ids=["whole", "accumulated"])
def test_a_sum_at_a_64th_of_the_rate_is_the_mean(steps: int, tmp_path: Path) -> None:
    """Mini-batches of 64, a power of two, so that both round alike: the same weights to the last bit."""
    made = {}
    for reduction, lr in (("mean", 0.064), ("sum", 0.064 / 64)):
        config = run(tmp_path / reduction, reduction=reduction, gradient_accumulation_steps=steps)
        config.optimizer.lr = lr
        train(config)
        made[reduction] = load_file(tmp_path / reduction / "last.safetensors")
    for name, value in made["mean"].items():
        assert torch.equal(value, made["sum"][name]), name


def test_recorded_losses_are_means_in_either_case(tmp_path: Path) -> None:
    losses = []
    for reduction, lr in (("mean", 0.064), ("sum", 0.064 / 64)):
        config = run(tmp_path / reduction, reduction=reduction)
        config.optimizer.lr = lr
        train(config)
        rows = read(config.output)
        losses.append(rows[rows["metric"] == "train_loss"]["value"].tolist())
    assert losses[0] == losses[1]
    assert 0 < losses[0][0] < 10


def test_another_reduction_is_refused() -> None:
    config = RunConfig()
    config.protocol.reduction = "max"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"protocol\.reduction must be mean or sum, not 'max'"):
        resolve(config)
