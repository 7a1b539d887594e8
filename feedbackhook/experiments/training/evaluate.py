"""Evaluate the network after an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import feedbackhook
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.models.batch_norm import estimate_statistics
from feedbackhook.experiments.training.compiled import uncompiled
from feedbackhook.experiments.training.progress import Progress, check_finite
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.store.recorder import Recorder

_STATISTICS_BATCHES = 20
_BATCH_SIZE = 500


def evaluate(state: TrainingState, recorder: Recorder, progress: Callable[[Progress], None]) -> None:
    """Record loss and error on the validation and test sets, and after the last epoch how V compares with W.

    Raises:
        Diverged: a loss is not finite.
    """
    epochs, result = state.config.protocol.epochs, state.result
    with uncompiled(state):
        _record(state, recorder)
    batches = len(state.data.train.labels) // state.batch_size()
    progress(Progress(state.epoch, epochs, batches, batches, state.train_loss, result.last_error))


def _record(state: TrainingState, recorder: Recorder) -> None:
    result = state.result
    with state.context.autocast():
        estimate_statistics(state.model, _statistics_batches(state))
    if state.data.val is not None:
        loss, error = loss_and_error(state, state.data.val, recorder)
        recorder.add(state.step, state.epoch, "val_loss", check_finite("val_loss", loss))
        recorder.add(state.step, state.epoch, "val_error", error)
    loss, error = loss_and_error(state, state.data.test, recorder)
    recorder.add(state.step, state.epoch, "test_loss", check_finite("test_loss", loss))
    recorder.add(state.step, state.epoch, "test_error", error)
    recorder.add(state.step, state.epoch, "test_accuracy", 100 - error)
    result.last_error = error
    if result.best_error is None or state.epoch == 1 or error < result.best_error:
        result.best_error, result.best_epoch = error, state.epoch
    if state.patch is not None and state.epoch == state.config.protocol.epochs:
        for row in feedbackhook.measure(state.patch):
            recorder.add(state.step, state.epoch, row.metric, row.value, row.layer, row.depth)


@torch.no_grad()
def loss_and_error(state: TrainingState, split: Split, recorder: Recorder) -> tuple[float, float]:
    """Return the mean loss, and the error in percent."""
    state.model.eval()
    count = len(split.labels)
    loss, wrong = 0.0, 0.0
    for start in range(0, count, _BATCH_SIZE):
        share, counted = state.context.evaluation_share(start, min(start + _BATCH_SIZE, count))
        x, y = state.data.batch(split, share, state.device)
        logits, y = state.context.forward(x)[:counted], y[:counted]
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        wrong += int((logits.argmax(1) != y).sum())
        recorder.touch_if_due()
    loss, wrong = state.context.all_reduce_sum(loss, wrong)
    return loss / count, 100 * wrong / count


def _statistics_batches(state: TrainingState) -> Iterator[Tensor]:
    return (x for x, _ in training_batches(state, _STATISTICS_BATCHES))


def training_batches(state: TrainingState, count_of: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same training mini-batches each time, whatever the state of `state.order`.

    Args:
        state: nothing of it changes.
        count_of: number of mini-batches.
    """
    size, count = state.batch_size(), len(state.data.train.labels)
    generator = torch.Generator().manual_seed(state.config.protocol.seed)
    passes = (data.minibatches(count, size, generator) for _ in itertools.count())
    for index in itertools.islice(itertools.chain.from_iterable(passes), count_of):
        yield state.data.batch(state.data.train, index, state.device)
