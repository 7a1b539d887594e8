"""What a run reports while it trains, and the error of a loss that is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a run is: after each step (`test_error` is None) and after each evaluation.

    Args:
        epoch: the current epoch; 0: before training.
        epochs: number of epochs of the run.
        batch: number of mini-batches done in this epoch.
        batches: number of mini-batches of an epoch.
        train_loss: mean loss over the mini-batches done.
        test_error: test error in percent, after an evaluation.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    train_loss: float
    test_error: float | None = None


class Diverged(ArithmeticError):
    """A loss is not finite."""

    def __init__(self, metric: str, value: float) -> None:
        super().__init__(f"{metric.replace('_', ' ')} is {value}")
        self.metric, self.value = metric, value


def check_finite(metric: str, value: float) -> float:
    """Return `value`, or raise `Diverged` if it is not finite."""
    if not math.isfinite(value):
        raise Diverged(metric, value)
    return value
