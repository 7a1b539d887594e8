"""What tests/experiments/training/test_many_processes.py hands its worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from feedbackhook.experiments.config import RunConfig
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.training import run
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.state import TrainingState


@dataclass
class Job:
    """A run to train.

    Args:
        config: its configuration.
        resume: whether to resume it.
        stop: the epoch before which it is interrupted.
        wrong_shares: whether every process takes the same share of each mini-batch: a mistake.
    """

    config: RunConfig
    resume: bool = False
    stop: int | None = None
    wrong_shares: bool = False


@contextmanager
def stopped_before(epoch: int | None) -> Iterator[None]:
    """Runs are interrupted before an epoch, in every process."""
    train_epoch = run.train_epoch

    def stop(state: TrainingState, *args: Any) -> None:
        if state.epoch == epoch:
            raise KeyboardInterrupt
        train_epoch(state, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "train_epoch", stop)
        yield


def precisely(config: RunConfig) -> AbstractContextManager[None]:
    """In it the run trains in float64, so that rounding in another order stays far below any mistake. Runs
    in bf16 stay as they are: autocast does not touch float64."""
    return nullcontext() if config.protocol.precision == "bf16" else in_float64()


@contextmanager
def in_float64() -> Iterator[None]:
    """Runs train in float64 wherever they would in float32. Only timm's transforms stay as they are."""
    forward, augmentation = DistributedContext.forward, ImageData.augmentation

    def of_doubles(context: DistributedContext, x: Tensor) -> Tensor:
        return forward(context, x.double())

    def in_float32(data: ImageData, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        transform = default_dtype(torch.float32)(augmentation)(data, options)
        return default_dtype(torch.float32)(transform)

    with pytest.MonkeyPatch.context() as patched, default_dtype(torch.float64):
        patched.setattr(DistributedContext, "forward", of_doubles)
        patched.setattr(ImageData, "augmentation", in_float32)
        patched.setattr(Tensor, "float", Tensor.double)
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
