"""Train one run from its configuration to a finished run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from feedbackhook.experiments.config import ConfigError, FolderInUse, RunConfig
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.resolve import check_device, default_output, resolve
from feedbackhook.experiments.stored import (
    as_mapping,
    check_same,
    store_errors,
    with_stored_machine,
    write_config,
)
from feedbackhook.experiments.training.checkpoint import commit, commit_end, resume_from
from feedbackhook.experiments.training.compiled import compile_network
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.errors import config_errors
from feedbackhook.experiments.training.evaluate import evaluate
from feedbackhook.experiments.training.progress import Diverged, Progress
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.experiments.training.step import train_epoch
from feedbackhook.experiments.training.stopping import stoppable
from feedbackhook.experiments.training.summary import describe_run
from feedbackhook.experiments.training.torchrun import join_processes
from feedbackhook.store.recorder import Recorder
from feedbackhook.store.run_folder import RunFolder, RunResult

logger = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds


def train(
    config: RunConfig,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    images: ImageData | None = None,
    tell: Callable[[str], None] = logger.info,
    draw: Callable[[Path], None] | None = None,
    until: int | None = None,
) -> RunResult:
    """Train as `config` says and leave a run folder.

    The run ends as `finished`; as `diverged` if a loss is not finite; as `interrupted` if it is stopped by
    `KeyboardInterrupt` or SIGTERM (unless the program handles SIGTERM itself); or as `failed` after any other
    error. Exceptions are raised again after the status is written. Torch's global random state and number of
    threads are restored.

    Under torchrun all processes train this one run, and each returns its result. Only the main process
    writes and reports progress. A run may be resumed with another number of processes.

    Args:
        config: the configuration of the run.
        resume: continue from the checkpoint in the run folder, if there is one; on the CPU the result is bit
            for bit that of a run without interruption. A run that has ended is returned as it is.
        progress: called after each step and each evaluation.
        images: the data to train on, instead of those that `config.data` names.
        tell: called once with a line that says what is trained, on what.
        draw: called with the run folder to draw its figures, when the run has ended and `record.figures` is
            set, for example :func:`feedbackhook.report.plots.draw_run`.
        until: stop as `paused` after this epoch, to be resumed later; None: train to the end.

    Returns:
        How the run ended.

    Raises:
        ConfigError: the run cannot start: an option is wrong, data are missing, or the folder is in use.
    """
    with stoppable(), join_processes(config.protocol) as context:
        config, ended = context.broadcast_from_main(lambda: _prepare(config, resume, context.count, draw))
        if ended is not None:
            return ended
        folder = RunFolder(str(config.output), writes=context.is_main)
        with _threads(config.protocol.threads), _random_state(config.protocol.seed, config.protocol.device):
            state = context.local_main_first(lambda: _build(config, images, context))
            try:
                if context.is_main:
                    tell(describe_run(config, state.data, state.model))
                compile_network(state)
                context.distribute(state.model, state.optimizer)
                with context.raise_together(), config_errors():
                    recorder = _open_recorder(folder, config)
                with recorder:
                    _run(state, folder, recorder, (context.is_main and progress) or (lambda _: None), until)
            finally:
                state.close()
            if state.result.ended and config.record.figures and draw is not None:
                context.broadcast_from_main(lambda: draw(folder.path))
    return state.result


def _prepare(
    config: RunConfig, resume: bool, count: int, draw: Callable[[Path], None] | None
) -> tuple[RunConfig, RunResult | None]:
    """Return the resolved configuration of a run on `count` processes, and its result if it has ended."""
    folder = RunFolder(config.output or default_output(config))
    with store_errors():
        before = folder.result()
        trained = folder.trained()
    if before is not None and not resume:
        raise ConfigError(
            f"{folder.path} holds a run ({before.status}, epoch {before.epoch}): resume it with --resume, or "
            "choose another --output"
        )
    config = resolve(with_stored_machine(config, folder), count)
    if before is not None and trained:
        check_same(folder, config)
        if before.ended:
            if config.record.figures and draw is not None and not before.figures:
                draw(folder.path)
            return config, before
    check_device(config)
    return config, None


def _build(config: RunConfig, images: ImageData | None, context: DistributedContext) -> TrainingState:
    with config_errors():
        return TrainingState(config, data.load(config.data) if images is None else images, context)


def _run(
    state: TrainingState,
    folder: RunFolder,
    recorder: Recorder,
    progress: Callable[[Progress], None],
    until: int | None,
) -> None:
    """Train to the end, or to the epoch `until`, and save how it ended."""
    result, epochs = state.result, state.config.protocol.epochs
    folder.tidy()
    checkpoint = state.context.broadcast_from_main(lambda: _load_checkpoint(folder))
    try:
        if checkpoint is None:
            recorder.drop_after(-1)
            folder.write_result(result)
            write_config(folder, state.config, state.context.count)
            evaluate(state, recorder, progress)
            commit(state, folder, recorder)
        else:
            resume_from(checkpoint, state, folder, recorder)
            folder.write_result(result)
        _watch(state, recorder)
        while state.epoch < (epochs if until is None else min(until, epochs)):
            state.epoch += 1
            with data.seeded(state.config.protocol.seed, state.epoch):  # for augmentation
                train_epoch(state, recorder, progress)
            evaluate(state, recorder, progress)
            commit(state, folder, recorder)
        result.status = "finished" if state.epoch == epochs else "paused"
    except Diverged as stop:
        result.status = "diverged"
        result.reason = f"{stop} in epoch {state.epoch}, after {state.step} steps"
        recorder.add(state.step, state.epoch, stop.metric, stop.value)
        recorder.flush()  # since a diverged run is not resumed
    except BaseException as error:
        result.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        result.reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise
    finally:
        commit_end(state, folder)


def _load_checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    with store_errors():
        return folder.load_checkpoint()


def _watch(state: TrainingState, recorder: Recorder) -> None:
    """Record angles and norms from the current step on."""
    record = state.config.record
    if state.patch is not None:
        state.patch.watch(
            record.every,
            recorder,
            step=state.step,
            per_sample=record.per_sample,
            group=state.context.group,
        )


def _open_recorder(folder: RunFolder, config: RunConfig) -> Recorder:
    """Open the folder's recorder; a process that is about to end may hold it a moment longer."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return Recorder(
                folder.path,
                append=True,  # resuming cuts the table to the checkpoint
                tensorboard=config.record.tensorboard,
                tracking=config.record.tracking,
                settings=as_mapping(config),
            )
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise FolderInUse(str(error)) from error
            time.sleep(0.1)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _random_state(seed: int, device: str) -> Iterator[None]:
    """Seed torch's global generators in the block, and restore them afterwards."""
    cuda = torch.device(device)
    with torch.random.fork_rng(devices=[cuda] if cuda.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
