"""`feedbackhook profile`: a network and a dataset by name, profiled before any training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from feedbackhook.diagnosis.grid import CONCORDANCES, MODES
from feedbackhook.diagnosis.profile import profile as profile_model
from feedbackhook.diagnosis.profiled import Profile
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    check_at_least,
)
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.resolve import check_device, resolve
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.errors import config_errors
from feedbackhook.experiments.training.state import TrainingState


@dataclass
class ProfileConfig:
    """What to profile.

    Args:
        model: a name as in `model.name`; `NAME` alone is `timm/NAME`.
        data: the images, as in a run.
        weights: initial weights, as in `model.weights`.
        options: as in `model.options`, such as `{zero_init_last: false}` for timm's ResNets, whose residual
            branches otherwise have no gradient before the first update.
        batch_norm: as in `model.batch_norm`.
        trainable: as in `model.trainable`.
        modes: names of rules; those with an option `concordance` are profiled at each of `concordances`.
        concordances: shares of agreeing signs, 0 to 1.
        include: layers to patch: a regular expression for the full name, or a list of names or suffixes.
        exclude: layers to leave exact, in the same form.
        seeds: number of draws of each rule.
        batches: number of training mini-batches.
        batch_size: images of each.
        seed: seed of the network's initial weights and of the mini-batches.
        device: a torch device, or `auto`.
        threads: CPU threads; null: torch's default.
        output: folder for profile.csv and profile.png; null: write nothing.
    """

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_norm: str = "none"
    trainable: str | None = None
    modes: list[str] = field(default_factory=lambda: list(MODES))
    concordances: list[float] = field(default_factory=lambda: list(CONCORDANCES))
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    seeds: int = 3
    batches: int = 2
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "batches", "batch_size"):
            check_at_least(name, getattr(self, name), 1)


def profile(config: ProfileConfig, images: ImageData | None = None) -> Profile:
    """Build the network, draw training mini-batches, and profile the rules.

    Args:
        config: what to profile.
        images: the data, instead of those that `config.data` names.

    Raises:
        ConfigError: there is no such model, dataset, rule, option or layer, or the data do not suffice.
    """
    run = resolve(_run(config))
    check_device(run)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(run.protocol.threads or threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _profile(config, run, images)
    finally:
        torch.set_num_threads(threads)


def _profile(config: ProfileConfig, run: RunConfig, images: ImageData | None) -> Profile:
    with config_errors():
        loaded = data.load(run.data) if images is None else images
        state = TrainingState(run, loaded, DistributedContext(run.protocol))
        for module in state.model.train().modules():
            if module in state.frozen_modules:
                module.eval()
        passes = (
            data.minibatches(len(state.data.train.labels), config.batch_size, state.order)
            for _ in itertools.count()
        )
        indices = itertools.islice(itertools.chain.from_iterable(passes), config.batches)
        batches = [state.data.batch(state.data.train, index, state.device) for index in indices]
        return profile_model(
            state.model,
            batches,
            F.cross_entropy,
            modes=config.modes,
            concordances=config.concordances,
            seeds=config.seeds,
            include=config.include,
            exclude=config.exclude,
        )


def _run(config: ProfileConfig) -> RunConfig:
    """Return the run whose network and data are profiled."""
    name = config.model if "/" in config.model else f"timm/{config.model}"
    if config.batch_norm not in ("none", "paper", "affine"):
        raise ConfigError(f"batch_norm must be none, paper or affine, not {config.batch_norm!r}")
    model = ModelConfig(name, weights=config.weights, options=config.options, trainable=config.trainable)
    return RunConfig(
        data=replace(config.data, augmentation=None),
        model=replace(model, batch_norm=config.batch_norm),  # type: ignore[arg-type]
        feedback=FeedbackConfig(mode=None),
        protocol=ProtocolConfig(
            batch_size=config.batch_size, seed=config.seed, device=config.device, threads=config.threads
        ),
    )
