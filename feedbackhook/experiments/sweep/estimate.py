"""What the runs of a sweep take, from a rehearsal of some steps."""

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
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.experiments.training.run import train

_REHEARSED_STEPS = 5


class Estimate(NamedTuple):
    """What a run takes: seconds, on this machine with nothing beside it, and bytes on disk."""

    seconds: float
    size: float


def estimate(runs: Sequence[PlannedRun]) -> dict[str, Estimate]:
    """What each run takes, by name: from a rehearsal of some steps for each dataset, with random images, in a
    folder that is then removed.

    Raises:
        ConfigError: a run cannot be built.
    """
    rehearsed: dict[str, tuple[float, float, float]] = {}
    estimates = {}
    for run in runs:
        if run.dataset not in rehearsed:
            patched = [r for r in runs if r.dataset == run.dataset and r.mode is not None]
            rehearsed[run.dataset] = _rehearse((patched or [run])[0])
        train_images, test_images, _ = _counts(run)
        step, weights, table = rehearsed[run.dataset]
        p = run.config.protocol
        steps = train_images / p.batch_size
        evaluation = test_images / p.batch_size / 3  # a forward alone is a third of a step
        estimates[run.name] = Estimate(p.epochs * step * (steps + evaluation), weights + p.epochs * table)
    return estimates


def _counts(run: PlannedRun) -> tuple[int, int, int]:
    """Images trained on, images evaluated on after each epoch, and classes."""
    if run.dataset in DATASETS:
        known = DATASETS[run.dataset]
        held_out = round(known.train * run.config.data.val_fraction)
        return known.train - held_out, known.test + held_out, known.classes
    images = data.load(resolve(run.config).data)
    evaluated = len(images.test.labels) + (0 if images.val is None else len(images.val.labels))
    return len(images.train.labels), evaluated, images.classes


def _rehearse(run: PlannedRun) -> tuple[float, float, float]:
    """Seconds a step, bytes of weights and checkpoint, and bytes of the table an epoch."""
    _, _, classes = _counts(run)
    config = resolve(run.config)
    channels, height, _ = default_size(network_name(config.model))
    size = config.data.size or height
    p = config.protocol
    generator = torch.Generator().manual_seed(0)
    shape = (_REHEARSED_STEPS * p.batch_size, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % classes
    half = torch.full((channels, 1, 1), 0.5)
    test = Split(images[: p.batch_size], labels[: p.batch_size])
    noise = ImageData(Split(images, labels), test, None, classes, half, half)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = replace(
            config,
            optimizer=replace(config.optimizer, lr=1e-12),  # so that nothing diverges
            protocol=replace(p, epochs=1, batch_sizes={}),
            output=f"{folder}/run",
        )
        train(rehearsal, images=noise, progress=lambda _: times.append(time.perf_counter()))
        files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    table = sum(size for path, size in files.items() if path.parent.name == "metrics")
    # the second event is that of the first step, which is slower than the rest; the last an evaluation's
    steps = sorted(after - before for before, after in itertools.pairwise(times[1:-1]))
    return steps[len(steps) // 2], float(sum(files.values()) - table), float(table) / 2
