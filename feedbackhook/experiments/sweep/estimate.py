"""Estimate how long the runs of a sweep take, by training a few steps. Only a dry run does so."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from feedbackhook.experiments.config import RunConfig
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.models.build import default_size
from feedbackhook.experiments.models.registry import network_name
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.experiments.training.run import train

_STEPS = 5


class Estimate(NamedTuple):
    """Cost of a run: seconds on this machine with no other run beside it, and bytes on disk."""

    seconds: float
    size: float


class _Measured(NamedTuple):
    """What a run's parts take: seconds of a step, of a step that is not compiled and of compiling; bytes of
    weights and checkpoint, and of metrics for each epoch."""

    step: float
    uncompiled: float
    compiling: float
    weights: float
    table: float


def estimate(runs: Sequence[PlannedRun]) -> dict[str, Estimate]:
    """Return the cost of each run by name, from a few training steps for each dataset.

    The steps use random images and a temporary folder.

    Raises:
        ConfigError: a run cannot be built.
    """
    measured: dict[str, _Measured] = {}
    estimates = {}
    for run in runs:
        if run.dataset not in measured:
            patched = [r for r in runs if r.dataset == run.dataset and r.mode is not None]
            measured[run.dataset] = _measure((patched or [run])[0])
        found, p = measured[run.dataset], run.config.protocol
        estimates[run.name] = Estimate(_seconds(run, found), found.weights + p.epochs * found.table)
    return estimates


def _seconds(run: PlannedRun, measured: _Measured) -> float:
    """Seconds that a run takes."""
    train_images, test_images, _ = _counts(run)
    p = run.config.protocol
    steps = train_images / p.batch_size
    recorded = steps / run.config.record.every if run.mode is not None else 0
    evaluation = test_images / p.batch_size / 3  # a forward alone is a third of a step
    slower = measured.uncompiled - measured.step
    epoch = measured.step * steps + slower * recorded + measured.uncompiled * evaluation
    sizes = {p.batch_size, *p.batch_sizes.values()}  # each has its own code
    return p.epochs * epoch + measured.compiling * len(sizes)


def _counts(run: PlannedRun) -> tuple[int, int, int]:
    """Number of training images, of images to evaluate on after each epoch, and of classes."""
    if run.dataset in DATASETS:
        known = DATASETS[run.dataset]
        held_out = round(known.train * run.config.data.val_fraction)
        return known.train - held_out, known.test + held_out, known.classes
    images = data.load(run.resolved.data)
    evaluated = len(images.test.labels) + (0 if images.val is None else len(images.val.labels))
    return len(images.train.labels), evaluated, images.classes


def _measure(run: PlannedRun) -> _Measured:
    """Train a few steps, uncompiled, and compiled too if that is asked for."""
    config, images = run.resolved, _noise(run)
    config = replace(config, feedback=replace(config.feedback, schedule={}))  # nothing changes in one epoch
    protocol = replace(config.protocol, epochs=1, milestones=[], batch_sizes={}, compile=False)
    begin, step, weights, table = _train(replace(config, protocol=protocol), images)
    if not config.protocol.compile:
        return _Measured(step, step, 0.0, weights, table)
    compiled = replace(
        config,
        protocol=replace(protocol, compile=config.protocol.compile),
        record=replace(config.record, every=_STEPS, gradient_angle_every=0, check_every=0),
    )
    late, fast, *_ = _train(compiled, images)
    return _Measured(fast, step, max(0.0, late - begin), weights, table)


def _noise(run: PlannedRun) -> ImageData:
    """Random images for a few steps."""
    _, _, classes = _counts(run)
    config = run.resolved
    channels, height, _ = default_size(network_name(config.model))
    size, batch = config.data.size or height, config.protocol.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (_STEPS * batch, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % classes
    half = torch.full((channels, 1, 1), 0.5)
    return ImageData(Split(images, labels), Split(images[:batch], labels[:batch]), None, classes, half, half)


def _train(config: RunConfig, images: ImageData) -> tuple[float, float, float, float]:
    """Seconds until the first evaluation is done, and of a step; bytes of weights and checkpoint, and of
    metrics for each epoch."""
    times = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(
            config,
            optimizer=replace(config.optimizer, lr=1e-12),  # so that it does not diverge
            output=f"{folder}/run",
        )
        train(trial, images=images, progress=lambda _: times.append(time.perf_counter()))
        files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    table = sum(size for path, size in files.items() if path.parent.name == "metrics")
    begun, first, *steps, _ = times
    # the first of the steps is slower than the rest
    taken = sorted(after - before for before, after in itertools.pairwise(steps))
    return first - begun, taken[len(taken) // 2], float(sum(files.values()) - table), float(table) / 2
