"""Train one epoch, one optimizer step after the other, and record it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor

import feedbackhook
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.training.check import check_if_due
from feedbackhook.experiments.training.compiled import average_learned, uncompiled
from feedbackhook.experiments.training.progress import Progress, check_finite
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.store.recorder import Recorder


def train_epoch(state: TrainingState, recorder: Recorder, progress: Callable[[Progress], None]) -> None:
    """Train the current epoch, then change the learning rate and the feedback as scheduled.

    Raises:
        Diverged: the loss is not finite.
    """
    config, count = state.config, len(state.data.train.labels)
    protocol = config.protocol
    size = state.batch_size()
    batches = count // size
    recorder.epoch = state.epoch
    learning_rate = float(state.lr_schedule.get_last_lr()[0])
    total, wrong = 0.0, 0.0
    state.train_mode()
    state.context.seed_forwards(protocol.seed, state.epoch)
    for batch, index in enumerate(data.minibatches(count, size, state.order), 1):
        last = state.epoch == protocol.epochs and batch == batches
        loss, missed = train_step(state, index, recorder, last)
        total += loss
        wrong += missed
        recorder.touch_if_due()
        progress(Progress(state.epoch, protocol.epochs, batch, batches, total / batch))
    state.lr_schedule.step()
    if state.patch is not None and state.epoch in config.feedback.schedule:
        state.patch.set(**config.feedback.schedule[state.epoch])
    state.train_loss = total / batches
    if state.patch is None:  # otherwise the watch records it
        recorder.add(state.step, state.epoch, "learning_rate", learning_rate)
    recorder.add(state.step, state.epoch, "train_loss", state.train_loss)
    recorder.add(state.step, state.epoch, "train_error", 100 * wrong / (batches * size))


def train_step(state: TrainingState, index: Tensor, recorder: Recorder, last: bool) -> tuple[float, float]:
    """Do one optimizer step, with gradient accumulation.

    Args:
        state: changed in place.
        index: of the training images of the mini-batch.
        recorder: for the gradient angle, if it is due.
        last: whether this is the last step of the run.

    Returns:
        The mean loss over the mini-batch, and the number of images classified wrong.

    Raises:
        Diverged: the loss is not finite.
    """
    context = state.context
    total, wrong = 0.0, 0.0
    state.optimizer.zero_grad()
    check_if_due(state, recorder, last)
    eager = _is_recorded(state, last)
    for number, (x, y) in enumerate(state.micro_batches(index), 1):
        if state.patch is not None and state.gives_targets:
            state.patch.targets(y)
        with context.micro_batch(last=number == context.accumulation_steps):
            with uncompiled(state) if eager else nullcontext():
                logits = context.forward(x)
            loss = F.cross_entropy(logits, y)
            summed, missed = context.all_reduce_sum(loss.item(), int((logits.argmax(1) != y).sum()))
            total += check_finite("train_loss", summed / context.count)
            wrong += missed
            _measure_gradient_angle(state, loss, recorder, last)
            context.backward(loss * len(index) if state.config.protocol.reduction == "sum" else loss)
    if not eager:
        average_learned(state)
    state.optimizer.step()
    state.step += 1
    return total / context.accumulation_steps, wrong


def _is_recorded(state: TrainingState, last: bool) -> bool:
    """Whether this step's error signals are recorded, which compiled code would not show."""
    if state.patch is None:
        return False
    return state.step % state.config.record.every == 0 or _gradient_angle_is_due(state, last)


def _gradient_angle_is_due(state: TrainingState, last: bool) -> bool:
    every = state.config.record.gradient_angle_every
    return state.patch is not None and bool(every) and (state.step % every == 0 or last)


def _measure_gradient_angle(state: TrainingState, loss: Tensor, recorder: Recorder, last: bool) -> None:
    """Record the angle between this step's gradients and backprop's, if it is due, and in the last step."""
    if state.patch is None or not _gradient_angle_is_due(state, last):
        return
    for row in feedbackhook.measure(state.patch, loss, group=state.context.group):
        if row.metric == "gradient_angle":
            recorder.add(state.step, state.epoch, row.metric, row.value, row.layer, row.depth)
