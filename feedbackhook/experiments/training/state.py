"""What a configuration builds, and how far its training is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import feedbackhook
from feedbackhook.experiments.config import ConfigError, FeedbackConfig, RunConfig
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.models import build as models
from feedbackhook.experiments.training import optimizers
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.rules import is_direct
from feedbackhook.store.run_folder import RunResult


class TrainingState:
    """Everything that training changes, and what it needs.

    Args:
        config: the configuration of the run, resolved.
        images: its data.
        context: the processes that train it.

    Attributes:
        data: the images, on the device, with the mean and standard deviation that the network expects.
        model: the network, patched if the configuration has a rule.
        frozen_modules: modules that stay in evaluation mode.
        augment: the augmentation of training images; None for none.
        order: the generator of the order of the training images.
        patch: the patch of the network; None for backprop.
        learned: what the feedback learns.
        gives_targets: whether the patch takes the targets of each forward, as direct rules do.
        epoch: the current epoch; 0: before training.
        step: number of optimizer steps done.
        train_loss: mean training loss of the last epoch.
        result: how the run stands, as far as it is saved.

    Raises:
        ConfigError: the configuration does not fit the data.
        ValueError: the network, the optimizer or the patch cannot be built.
    """

    def __init__(self, config: RunConfig, images: ImageData, context: DistributedContext) -> None:
        self.config, self.context = config, context
        protocol = config.protocol
        self.device = context.device(protocol.device)
        self.data = images.to(self.device)
        _check_batch_sizes(config, len(images.train.labels))
        self.model = self._build_model()
        self.frozen_modules = models.frozen_batch_norms(self.model, config.model)
        self.augment: Callable[[Tensor], Tensor] | None = None
        if config.data.augmentation is not None:
            self.augment = self.data.augmentation(config.data.augmentation)
        self.patch = _patched(self.model, config.feedback)
        if self.patch is not None and self.patch.awaits_forward:
            self._run_once()
        self.learned = [] if self.patch is None else [p for p in self.patch.parameters() if p.requires_grad]
        if config.feedback.lr is not None and not self.learned:
            raise ConfigError("feedback.lr has no effect: no optimizer steps what this feedback learns")
        self.optimizer = optimizers.build(config.optimizer, self.model, self.learned, config.feedback.lr)
        self.lr_schedule = optimizers.lr_schedule(protocol, self.optimizer)
        self.order = torch.Generator().manual_seed(protocol.seed)
        self.epoch = self.step = 0
        self.train_loss = math.nan
        self.result = RunResult(Path(str(config.output)))
        self.gives_targets = self.patch is not None and any(
            is_direct(patched.feedback.rule) for patched in self.patch.state.patched
        )

    def batch_size(self) -> int:
        """Return the number of images per mini-batch in the current epoch."""
        protocol = self.config.protocol
        changed = [epoch for epoch in protocol.batch_sizes if epoch < self.epoch]
        return protocol.batch_sizes[max(changed)] if changed else protocol.batch_size

    def train_mode(self) -> None:
        """Put the network into training mode, except for modules that are frozen."""
        self.model.train()
        for module in self.frozen_modules:
            module.eval()

    def micro_batches(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's images and labels of a mini-batch, for each backward pass.

        Args:
            index: of the training images of the mini-batch.
        """
        train_set = self.data.train
        # Each process augments the whole mini-batch, so that the images are the same as in one process.
        augmented = None if self.augment is None else self.augment(train_set.images[index])
        for share in self.context.micro_batches(len(index)):
            if augmented is None:
                yield self.data.batch(train_set, index[share], self.device)
            else:
                yield augmented[share].to(self.device), train_set.labels[index[share]].to(self.device)

    def close(self) -> None:
        """Remove the patch."""
        if self.patch is not None:
            self.patch.remove()

    def _run_once(self) -> None:
        """Run a forward that changes nothing, which tells the patch the shape of the output."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            x, _ = self.data.batch(self.data.train, torch.arange(2), self.device)
            self.model.eval()(x)
            self.model.train()

    def _build_model(self) -> nn.Module:
        config = self.config.model
        _, channels, height, width = self.data.train.images.shape
        model = models.build(config, self.data.classes, channels, (height, width))
        if (statistics := models.statistics(config, channels)) is not None:
            self.data = replace(self.data, mean=statistics[0], std=statistics[1])
        # Channels last gives the same numbers up to rounding, and is twice as fast on a CPU.
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model


def _check_batch_sizes(config: RunConfig, count: int) -> None:
    largest = max(config.protocol.batch_size, *config.protocol.batch_sizes.values(), 0)
    if largest > count:
        raise ConfigError(f"a mini-batch of {largest} is more than the {count} training images")


def _patched(model: nn.Module, config: FeedbackConfig) -> feedbackhook.Patch | None:
    if config.mode is None:
        return None
    assert config.seed is not None
    patch = feedbackhook.patch(
        model,
        config.mode,
        include=config.include,
        exclude=config.exclude,
        seed=config.seed,
        recompute=config.recompute,
        fused=config.fused,
        **config.options,
    )
    before = copy.deepcopy(patch.state_dict())
    for options in config.schedule.values():  # so that a wrong option shows now, not epochs later
        patch.set(**options)
    patch.load_state_dict(before)
    if config.mirror:
        patch.mirror(config.mirror)
    return patch
