"""The dry run: what the whole run would cost on this device."""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from images import image_folders
from rich import box
from rich.console import Console
from rich.table import Table
from rules import build
from settings import Settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import evaluate, train_epoch

import feedbackhook

IMAGENET = {"train": 1_281_167, "val": 50_000, "classes": 1000}

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Speed:
    """Measured on random images in memory, over all processes."""

    step_seconds: float
    train_images_per_second: float
    test_images_per_second: float
    flops_per_image: float


def estimate(accelerator: Accelerator, settings: Settings) -> None:
    """Time some steps on random images, and print the time and disk space of the whole run."""
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    counts, reading = _count_images(settings)
    network, patch = build(settings, counts["classes"])
    network.to(accelerator.device)
    optimizer = torch.optim.SGD(
        network.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    model, stepper = accelerator.prepare(network, optimizer)
    share = settings.batch_size // accelerator.num_processes
    x = torch.randn(share, 3, settings.size, settings.size, device=accelerator.device)
    batch = x, torch.randint(counts["classes"], (share,), device=accelerator.device)
    speed = _measure_speed(accelerator, model, stepper, batch, settings)

    buffer = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    trained = counts["train"] // settings.batch_size * settings.batch_size * settings.epochs
    table_bytes = 0
    if patch:
        watched_steps = math.ceil(trained / settings.batch_size / settings.watch_every)
        table_bytes = watched_steps * _bytes_of_a_watched_step(accelerator, model, stepper, patch, batch)
    seconds = trained / speed.train_images_per_second
    seconds += counts["val"] * settings.epochs / speed.test_images_per_second
    disk = buffer.tell(), table_bytes
    console.print(_shown(accelerator, settings, counts, speed, seconds / 3600, disk))
    console.print(f"The time is extrapolated from the timed steps, on random images in memory. {reading}")
    console.print("Training waits for its readers unless together they read as fast as it trains.")


def _count_images(settings: Settings) -> tuple[dict[str, int], str]:
    """Return the number of images and classes, and a sentence on the speed of reading."""
    if not settings.root.exists():
        return IMAGENET, f"Reading files was not measured: there is no folder {settings.root}."
    train, test = image_folders(settings.root, settings.size)
    chosen = np.random.default_rng(0).integers(len(train), size=64).tolist()
    _, seconds = timed(lambda: [train[index] for index in chosen])
    reading = (
        f"One process reads and augments {len(chosen) / seconds:.0f} images/s of {settings.root}; "
        f"--workers {settings.workers}."
    )
    return {"train": len(train), "val": len(test), "classes": len(train.classes)}, reading


def _measure_speed(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batch: Batch, settings: Settings
) -> Speed:
    steps = settings.steps

    def train(count: int) -> object:
        return train_epoch(accelerator, model, optimizer, iter([batch] * count))

    def test(count: int) -> object:
        return evaluate(accelerator, model, iter([batch] * count))

    with FlopCounterMode(display=False) as counter:
        train(1)
    train(2)  # warm up
    _, train_seconds = timed(lambda: train(steps))
    test(1)
    _, test_seconds = timed(lambda: test(steps))
    images = steps * settings.batch_size
    flops = counter.get_total_flops() / len(batch[0])
    return Speed(train_seconds / steps, images / train_seconds, images / test_seconds, flops)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Call `work`, wait for the GPU if there is one, and return the result and the seconds."""
    began = time.perf_counter()
    result = work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result, time.perf_counter() - began


def _bytes_of_a_watched_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, patch: feedbackhook.Patch, batch: Batch
) -> int:
    """Return the size of the file that holds the rows of one watched step."""
    with tempfile.TemporaryDirectory() as folder:
        with feedbackhook.Recorder(folder) as recorder:
            watch = patch.watch(1, recorder)
            train_epoch(accelerator, model, optimizer, iter([batch]))
            watch.remove()
        return sum(part.stat().st_size for part in Path(folder).rglob("*.parquet"))


def _shown(
    accelerator: Accelerator,
    settings: Settings,
    counts: dict[str, int],
    speed: Speed,
    hours: float,
    disk: tuple[int, int],
) -> Table:
    processes, device = accelerator.num_processes, accelerator.device.type
    title = f"{settings.model} under {settings.rule}, {settings.size} pixels"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column(f"{processes} x {device}", justify="right", no_wrap=True)
    flops = speed.flops_per_image
    rows = [
        ("timed steps", f"{settings.steps} of {settings.batch_size} images"),
        ("training step", f"{1000 * speed.step_seconds:.0f} ms"),
        ("training", f"{speed.train_images_per_second:.1f} images/s"),
        ("testing", f"{speed.test_images_per_second:.1f} images/s"),
        ("operations", f"{flops / 1e9:.2f} GFLOP per image, forward and backward"),
        ("throughput", f"{flops * speed.train_images_per_second / processes / 1e12:.3f} TFLOP/s per device"),
        ("whole run", f"{settings.epochs} x ({counts['train']:,} + {counts['val']:,}) images"),
        ("time", f"{hours:,.1f} hours"),
        ("GPU hours" if device == "cuda" else "device hours", f"{hours * processes:,.1f}"),
        ("checkpoint", f"{disk[0] / 1e6:.1f} MB, twice that while it is written"),
        ("table", f"{disk[1] / 1e6:.1f} MB"),
    ]
    if device == "cuda":
        rows.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB per device"))
    for name, value in rows:
        table.add_row(name, value)
    return table
