"""Runs of a few steps that one process and two processes train alike, each with one setting changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from feedbackhook.experiments.config import (
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)

CHANGES: dict[str, Callable[[RunConfig], Any]] = {}


def case(change: Callable[[RunConfig], Any]) -> Callable[[RunConfig], Any]:
    CHANGES[change.__name__] = change
    return change


@case
def plain(config: RunConfig) -> None:
    config.record.gradient_angle_every = 6


@case
def sharded(config: RunConfig) -> None:
    config.protocol.strategy = "fsdp2"


@case
def accumulated(config: RunConfig) -> None:
    config.protocol.gradient_accumulation_steps = 2


@case
def accumulated_sharded(config: RunConfig) -> None:
    config.protocol.gradient_accumulation_steps, config.protocol.strategy = 2, "fsdp2"


@case
def bf16(config: RunConfig) -> None:
    config.protocol.precision = "bf16"


@case
def bf16_sharded(config: RunConfig) -> None:
    config.protocol.precision, config.protocol.strategy = "bf16", "fsdp2"


@case
def paper_norm(config: RunConfig) -> None:
    config.model.batch_norm = "affine"


@case
def timm_norm(config: RunConfig) -> None:
    config.model, config.data.size = ModelConfig("timm/test_efficientnet"), 32


@case
def augmented(config: RunConfig) -> None:
    config.data.augmentation = {"scale": [0.7, 1.0], "hflip": 0.5}


@case
def adamw_sharded(config: RunConfig) -> None:
    config.protocol.strategy = "fsdp2"
    config.optimizer = OptimizerConfig("timm/adamw", lr=1e-3)


@case
def manhattan_sharded(config: RunConfig) -> None:
    config.protocol.strategy = "fsdp2"
    config.optimizer = OptimizerConfig("batch_manhattan", lr=1e-4)


@case
def learned_sharded(config: RunConfig) -> None:
    config.protocol.strategy, config.feedback = "fsdp2", FeedbackConfig("KP")
    config.optimizer = OptimizerConfig("sgd", lr=0.01, weight_decay=0.1)


@case
def compiled(config: RunConfig) -> None:
    config.protocol.compile, config.protocol.gradient_accumulation_steps = True, 2


@case
def compiled_norm(config: RunConfig) -> None:
    config.protocol.compile, config.model.batch_norm = True, "affine"


@case
def compiled_learning(config: RunConfig) -> None:
    config.protocol.compile, config.feedback = True, FeedbackConfig("KP")


def made(folder: Path, change: str, name: str) -> RunConfig:
    """24 steps on the digits: enough for feedback to tell, few enough for rounding not to grow."""
    config = RunConfig(
        data=DataConfig(train_images=240, test_images=101),
        feedback=FeedbackConfig("sign", {"concordance": 0.8, "redraw": "update"}),
        optimizer=OptimizerConfig("sgd", lr=0.01),
        protocol=ProtocolConfig(epochs=2, batch_size=20, threads=1),
        record=RecordConfig(every=4, per_sample=True, figures=False),
        output=str(folder / name),
    )
    CHANGES[change](config)
    return config
