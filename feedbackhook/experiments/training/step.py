"""Train one epoch, one optimizer step after the other, and record it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

import feedbackhook
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.training.check import check_if_due
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
    state.model.train()
    for module in state.frozen_modules:
        module.eval()
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
    context, train_set = state.context, state.data.train
    shares = context.micro_batches(len(index))
    # Each process augments the whole mini-batch, so that the images are the same as in one process.
    augmented = None if state.augment is None else state.augment(train_set.images[index])
    total, wrong = 0.0, 0.0
    state.optimizer.zero_grad()
    check_if_due(state, recorder, last)
    for share in shares:
        if augmented is None:
            x, y = state.data.batch(train_set, index[share], state.device)
        else:
            x, y = augmented[share].to(state.device), train_set.labels[index[share]].to(state.device)
        if state.patch is not None and state.gives_targets:
            state.patch.targets(y)
        with context.micro_batch(last=share is shares[-1]):
            logits = context.forward(x)
            loss = F.cross_entropy(logits, y)
            summed, missed = context.all_reduce_sum(loss.item(), int((logits.argmax(1) != y).sum()))
            total += check_finite("train_loss", summed / context.count)
            wrong += missed
            _measure_gradient_angle(state, loss, recorder, last)
            context.backward(loss * len(index) if state.config.protocol.reduction == "sum" else loss)
    state.optimizer.step()
    state.step += 1
    return total / len(shares), wrong


def _measure_gradient_angle(state: TrainingState, loss: Tensor, recorder: Recorder, last: bool) -> None:
    """Record the angle between this step's gradients and backprop's, if it is due, and in the last step."""
    every = state.config.record.gradient_angle_every
    if state.patch is None or not every or (state.step % every and not last):
        return
    for row in feedbackhook.measure(state.patch, loss, group=state.context.group):
        if row.metric == "gradient_angle":
            recorder.add(state.step, state.epoch, row.metric, row.value, row.layer, row.depth)
