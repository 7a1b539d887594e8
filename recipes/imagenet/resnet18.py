"""Does sign-symmetry train a ResNet-18 on ImageNet nearly as well as backprop, and feedback alignment not?

Xiao, Chen, Liao and Poggio (ICLR 2019, arXiv 1811.03567) send the error signals of a ResNet-18 through
V = s sign(W), with a scale s for each layer and an exact last layer. This recipe trains it with the settings
of their public code, on a folder of images, under that rule, backprop, feedback alignment or any rule of
feedbackhook, on one device or on several with torchrun. After each epoch it records the top-1 and top-5 error
and saves a checkpoint; rerun the same command to resume. The README beside this file has the protocol, its
sources, published results and the cost. ROOT holds train/CLASS/IMAGE and val/CLASS/IMAGE.

    python recipes/imagenet/resnet18.py --root ROOT
    python recipes/imagenet/resnet18.py --root ROOT --rule backprop
    torchrun --nproc-per-node 4 recipes/imagenet/resnet18.py --root ROOT --bf16 true
    python recipes/imagenet/resnet18.py --dry_run true    # time and disk space of the full run
    python recipes/imagenet/resnet18.py --smoke true      # two epochs on generated images: seconds
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cost
import rules
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from checkpoint import load, save
from images import image_folders, make_images
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from settings import Settings, fixed_options, run_folder, saved_options
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from training import evaluate, seed_of, train_epoch

import feedbackhook

Metrics = dict[str, float]


@dataclass(frozen=True)
class Parts:
    """What is trained. Accelerate wraps `network` as `model`, and `optimizer` as `stepper`."""

    network: nn.Module
    patch: feedbackhook.Patch | None
    optimizer: torch.optim.Optimizer
    model: nn.Module
    stepper: Any
    train_batches: Any
    test_batches: Any


def main(settings: Settings) -> None:
    """Train, or estimate what training would cost."""
    accelerator = Accelerator(
        # without a GPU, Accelerate needs cpu=True to connect the processes
        cpu=settings.cpu or not torch.accelerator.is_available(),
        mixed_precision="bf16" if settings.bf16 else "no",
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=seed_of(settings.seed, 0, 0)
        ),
    )
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}"
        )
    if settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch_size {settings.batch_size} is not divisible by the number of processes, "
            f"{accelerator.num_processes}"
        )
    if settings.dry_run:
        cost.estimate(accelerator, settings)
    elif settings.smoke:
        with _generated_images(accelerator) as folder:
            small = {"epochs": 2, "batch_size": 8, "size": 32, "lr": 0.01, "watch_every": 1, "workers": 0}
            run(accelerator, replace(settings, **small, root=folder, output=folder / "run"))
    else:
        run(accelerator, settings)
    accelerator.end_training()


@contextmanager
def _generated_images(accelerator: Accelerator) -> Iterator[Path]:
    """Yield a temporary folder with generated images, which all processes share."""
    with tempfile.TemporaryDirectory() as folder:
        shared = broadcast_object_list([folder])
        if accelerator.is_main_process:
            make_images(Path(folder))
        accelerator.wait_for_everyone()
        yield Path(shared[0])
        accelerator.wait_for_everyone()


def run(accelerator: Accelerator, settings: Settings) -> None:
    """Train from the checkpoint in the run folder, or from the start, to the last epoch."""
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    output, epochs = run_folder(settings), settings.epochs
    train, test = image_folders(settings.root, settings.size)
    if len(train) < settings.batch_size:
        raise ValueError(
            f"a batch of {settings.batch_size} is larger than the {len(train)} images in {train.root}"
        )
    fixed = {**fixed_options(settings), "images": len(train), "classes": train.classes}
    checkpoint = load(output / "checkpoint.pt", fixed)
    done = checkpoint["epoch"] if checkpoint else 0
    if checkpoint and done >= epochs:
        console.print(f"{output} is finished: {_shown(checkpoint['metrics'])} after epoch {done}")
        return
    parts = _build(accelerator, settings, train, test, checkpoint)
    patch, steps = parts.patch, len(parts.train_batches)
    with feedbackhook.Recorder(output, append=True) as recorder:
        recorder.drop_after(done * steps if checkpoint else -1, done)
        if accelerator.is_main_process:
            (output / "settings.yaml").write_text(yaml.safe_dump(saved_options(settings), sort_keys=False))
        if patch:
            patch.watch(settings.watch_every, recorder, step=done * steps)
        console.print(
            f"{output}: {settings.rule}, {len(train):,} training and {len(test):,} test images of "
            f"{len(train.classes)} classes, {accelerator.num_processes} x {accelerator.device.type}"
            + (f", resuming after epoch {done}" if checkpoint else "")
        )
        for epoch in range(done + 1, epochs + 1):
            recorder.epoch = epoch
            metrics = _train_and_test(accelerator, settings, parts, epoch, console)
            for name, value in metrics.items():
                recorder.add(epoch * steps, epoch, name, value)
            recorder.flush()  # before the checkpoint: resuming drops the rows after it
            _check_finite(metrics, epoch)
            if accelerator.is_main_process:
                state = {"settings": fixed, "epoch": epoch, "metrics": metrics}
                save(output / "checkpoint.pt", {**state, **_state(parts)})
            console.print(
                f"epoch {epoch}/{epochs}: train loss {metrics['train_loss']:.3f}, {_shown(metrics)}, "
                f"{metrics['images_per_second']:.0f} images/s"
            )
    if patch:
        console.print(str(patch), highlight=False)
        patch.remove()


def _build(
    accelerator: Accelerator,
    settings: Settings,
    train: ImageFolder,
    test: ImageFolder,
    checkpoint: Mapping[str, Any] | None,
) -> Parts:
    """Build network, patch, optimizer and batches, in the state of the checkpoint if there is one."""
    network, patch = rules.build(settings, len(train.classes))
    network.to(accelerator.device)
    optimizer = torch.optim.SGD(
        network.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if patch:
            patch.load_state_dict(checkpoint["patch"])
    reading = {"num_workers": settings.workers, "pin_memory": accelerator.device.type == "cuda"}
    prepared = accelerator.prepare(
        network,
        optimizer,
        DataLoader(train, settings.batch_size, shuffle=True, drop_last=True, **reading),
        DataLoader(test, settings.batch_size, **reading),
    )
    return Parts(network, patch, optimizer, *prepared)


def _train_and_test(
    accelerator: Accelerator, settings: Settings, parts: Parts, epoch: int, console: Console
) -> Metrics:
    """Train for one epoch and evaluate, unless the loss is not finite; return the metrics."""
    lr = settings.lr * 0.1 ** ((epoch - 1) // settings.lr_step)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    parts.train_batches.set_epoch(epoch)
    torch.manual_seed(seed_of(settings.seed, epoch, accelerator.process_index))
    began = time.perf_counter()
    batches = _progress(console, parts.train_batches, f"epoch {epoch}")
    metrics: Metrics = train_epoch(accelerator, parts.model, parts.stepper, batches)
    images = len(parts.train_batches) * settings.batch_size
    images_per_second = images / (time.perf_counter() - began)
    if math.isfinite(metrics["train_loss"]):
        metrics |= evaluate(accelerator, parts.model, _progress(console, parts.test_batches, "test"))
    metrics["images_per_second"] = images_per_second
    if parts.patch is None:  # with a patch, the watch records it
        metrics["learning_rate"] = lr
    return metrics


def _check_finite(metrics: Metrics, epoch: int) -> None:
    for name in ("train_loss", "test_loss"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{name} is {metrics[name]} in epoch {epoch}: this run diverges; try a smaller --lr"
            )


def _state(parts: Parts) -> dict[str, Any]:
    return {
        "model": parts.network.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "patch": parts.patch.state_dict() if parts.patch else None,
    }


def _progress(console: Console, batches: DataLoader, words: str) -> Iterator[Any]:
    return track(
        batches,
        words,
        total=len(batches),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )


def _shown(metrics: Mapping[str, float]) -> str:
    return f"test error {metrics['test_error']:.2f} % (top 5: {metrics['test_error_top5']:.2f} %)"


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # all inputs have the same size
    config = str(Path(__file__).with_suffix(".yaml"))
    settings = auto_cli(Settings, as_positional=False, default_config_files=[config])
    try:
        main(settings)
    except FileNotFoundError as missing:  # the folder of the images, or one in it
        sys.exit(f"resnet18.py: error: {missing}")
