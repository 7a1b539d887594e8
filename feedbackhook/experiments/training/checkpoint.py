"""Save a run and restore it; :func:`commit` owns the order in which its files are written."""

from __future__ import annotations

import logging
from typing import Any

import torch

from feedbackhook.experiments.config import ConfigError, one_line
from feedbackhook.experiments.stored import store_errors
from feedbackhook.experiments.training.errors import config_errors
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.experiments.training.stopping import uninterrupted
from feedbackhook.store.recorder import Recorder, read
from feedbackhook.store.run_folder import RunFolder

logger = logging.getLogger(__name__)


def commit(state: TrainingState, folder: RunFolder, recorder: Recorder) -> None:
    """Save the epoch: first the rows, then weights and checkpoint, then the status.

    A run that resumes from the checkpoint drops the rows after it, so it needs all rows before it; and the
    status must not be ahead of the checkpoint.
    """
    result = state.result
    recorder.flush()
    model, optimizer = state.context.state_dicts(state.model, state.optimizer)
    keep = state.config.record.weights
    if result.best_epoch == state.epoch and keep != "none":
        folder.write_weights(model, "best")
    if keep == "all":
        folder.write_weights(model, "last")
    folder.write_checkpoint(_checkpoint(state, model, optimizer))
    result.epoch, result.step = state.epoch, state.step
    folder.write_result(result)


def commit_end(state: TrainingState, folder: RunFolder) -> None:
    """Save how the run ended, then remove its checkpoint if it is not to be kept."""
    with uninterrupted():
        folder.write_result(state.result)
        if state.result.ended and state.config.record.weights != "all":
            folder.remove_checkpoint()


def resume_from(
    checkpoint: dict[str, Any], state: TrainingState, folder: RunFolder, recorder: Recorder
) -> None:
    """Restore the checkpoint, and cut the table back to it.

    Raises:
        ConfigError: the checkpoint or the table is damaged.
    """
    with state.context.raise_together():
        try:
            _restore(state, checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot resume: {folder.path}/checkpoint.pt does not fit this run "
                f"({type(error).__name__}: {one_line(error)}): choose another output"
            ) from error
    state.context.broadcast_from_main(lambda: _cut_table(state, folder, recorder))
    logger.info("resuming %s after epoch %d", folder.path, state.epoch)


def _checkpoint(state: TrainingState, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    result = state.result
    cuda = state.device.type == "cuda"
    return {
        "epoch": state.epoch,
        "step": state.step,
        "model": model,
        "optimizer": optimizer,
        "lr_schedule": state.lr_schedule.state_dict(),
        "patch": state.patch.state_dict() if state.patch is not None else None,
        "order": state.order.get_state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(state.device) if cuda else None,
        "errors": (result.last_error, result.best_error, result.best_epoch),
    }


def _restore(state: TrainingState, checkpoint: dict[str, Any]) -> None:
    result = state.result
    result.epoch = state.epoch = checkpoint["epoch"]
    result.step = state.step = checkpoint["step"]
    result.last_error, result.best_error, result.best_epoch = checkpoint["errors"]
    state.context.load_state_dicts(state.model, state.optimizer, checkpoint["model"], checkpoint["optimizer"])
    state.lr_schedule.load_state_dict(checkpoint["lr_schedule"])
    if state.patch is not None:
        state.patch.load_state_dict(checkpoint["patch"])
    state.order.set_state(checkpoint["order"])
    torch.set_rng_state(checkpoint["random"])
    if checkpoint["random_cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["random_cuda"], state.device)


def _cut_table(state: TrainingState, folder: RunFolder, recorder: Recorder) -> None:
    """Drop the rows after the checkpoint, and check that those before it are there."""
    with config_errors(), store_errors():
        recorder.drop_after(state.step, state.epoch)
        last = int(read(folder.path)["step"].max())
    if last < state.step:
        raise ConfigError(
            f"cannot resume: the table in {folder.path}/metrics ends at step {last}, but the checkpoint is "
            f"of step {state.step}: choose another output"
        )
