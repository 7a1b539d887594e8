"""Check during training whether gradients and angles can be trusted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import feedbackhook
from feedbackhook.experiments.training.compiled import uncompiled
from feedbackhook.experiments.training.evaluate import training_batches
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.store.recorder import Recorder

_BATCHES = 4


def check_if_due(state: TrainingState, recorder: Recorder, last: bool) -> None:
    """Record `feedbackhook.diagnose` before a step at which it is due.

    The mini-batches are the same each time, so that values can be compared over time. Training goes on as if
    nothing had happened. Each process checks its own copy of the network.

    Args:
        state: nothing of it changes.
        recorder: receives the rows.
        last: whether this is the last step of the run.
    """
    every = state.config.record.check_every
    if state.patch is None or not every or (state.step % every and not last):
        return

    def forward(x: Tensor) -> Tensor:
        with state.context.autocast():
            logits: Tensor = state.model(x)
        return logits.float()

    batches = training_batches(state, _BATCHES)
    with uncompiled(state):
        found = feedbackhook.diagnose(state.patch, batches, F.cross_entropy, forward=forward)
    for row in found.rows():
        recorder.add(state.step, state.epoch, row.metric, row.value, row.layer, row.depth)
