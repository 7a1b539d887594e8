"""What tests/test_experiments_processes.py hands its worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from feedbackhook.experiments import train
from feedbackhook.experiments.config import RunConfig


@dataclass
class Job:
    """A run to train.

    Args:
        config: its configuration.
        resume: whether to go on with it.
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
    train_epoch = train._Run._train_epoch

    def stop(run: train._Run, *args: Any) -> None:
        if run.epoch == epoch:
            raise KeyboardInterrupt
        train_epoch(run, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train._Run, "_train_epoch", stop)
        yield
