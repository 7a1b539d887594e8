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


def estimate(runs: Sequence[PlannedRun]) -> dict[str, Estimate]:
    """Return the cost of each run by name, from a few training steps for each dataset.

    The steps use random images and a temporary folder.

    Raises:
        ConfigError: a run cannot be built.
    """
    measured: dict[str, tuple[float, float, float]] = {}
    estimates = {}
    for run in runs:
        if run.dataset not in measured:
            patched = [r for r in runs if r.dataset == run.dataset and r.mode is not None]
            measured[run.dataset] = _measure((patched or [run])[0])
        train_images, test_images, _ = _counts(run)
        step, weights, table = measured[run.dataset]
        p = run.config.protocol
        steps = train_images / p.batch_size
        evaluation = test_images / p.batch_size / 3  # a forward alone is a third of a step
        estimates[run.name] = Estimate(p.epochs * step * (steps + evaluation), weights + p.epochs * table)
    return estimates


def _counts(run: PlannedRun) -> tuple[int, int, int]:
    """Number of training images, of images to evaluate on after each epoch, and of classes."""
    if run.dataset in DATASETS:
        known = DATASETS[run.dataset]
        held_out = round(known.train * run.config.data.val_fraction)
        return known.train - held_out, known.test + held_out, known.classes
    images = data.load(run.resolved.data)
    evaluated = len(images.test.labels) + (0 if images.val is None else len(images.val.labels))
    return len(images.train.labels), evaluated, images.classes


def _measure(run: PlannedRun) -> tuple[float, float, float]:
    """Seconds for each step, bytes of weights and checkpoint, and bytes of metrics for each epoch."""
    _, _, classes = _counts(run)
    config = run.resolved
    channels, height, _ = default_size(network_name(config.model))
    size = config.data.size or height
    p = config.protocol
    generator = torch.Generator().manual_seed(0)
    shape = (_STEPS * p.batch_size, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % classes
    half = torch.full((channels, 1, 1), 0.5)
    test = Split(images[: p.batch_size], labels[: p.batch_size])
    noise = ImageData(Split(images, labels), test, None, classes, half, half)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(
            config,
            optimizer=replace(config.optimizer, lr=1e-12),  # so that it does not diverge
            protocol=replace(p, epochs=1, batch_sizes={}),
            output=f"{folder}/run",
        )
        train(trial, images=noise, progress=lambda _: times.append(time.perf_counter()))
        files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    table = sum(size for path, size in files.items() if path.parent.name == "metrics")
    # the second event is the first step, which is slower than the rest; the last one is an evaluation
    steps = sorted(after - before for before, after in itertools.pairwise(times[1:-1]))
    return steps[len(steps) // 2], float(sum(files.values()) - table), float(table) / 2
