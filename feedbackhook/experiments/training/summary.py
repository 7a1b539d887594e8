"""Describe in a line what is trained, on what, before a run or a sweep starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from feedbackhook.experiments.config import ConfigError, RunConfig, rule_name
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.models import build as models


def describe_run(config: RunConfig, images: ImageData, model: nn.Module) -> str:
    """Return the line that describes a run: network, data, rule and device.

    Args:
        config: the configuration of the run, resolved.
        images: its data.
        model: its network.
    """
    threads = config.protocol.threads
    cpu = f" ({threads} thread{'' if threads == 1 else 's'})" if config.protocol.device == "cpu" else ""
    compiled = ", compiled" if config.protocol.compile else ""
    rule = "".join([_rule(config), *(f" {name}={value}" for name, value in config.feedback.options.items())])
    if config.condition is not None:
        rule += f" ({config.condition})"
    return f"{_describe(config, images, model)}; {rule}; {config.protocol.device}{cpu}{compiled}"


def describe_runs(configs: Iterable[RunConfig], first: ImageData) -> list[str]:
    """Return the lines that describe a sweep's runs on one dataset: one per network, with its rules.

    For a network that cannot be built, the line says why; its runs will fail for the same reason.

    Args:
        configs: the configurations of the runs, resolved.
        first: the data of the first run.
    """
    loaded: dict[str, ImageData] = {}
    lines: dict[str, str] = {}
    rules: dict[str, list[str]] = {}
    for config in configs:
        key = f"{config.data} {config.model}"
        if key not in lines:
            try:
                if (of_data := str(config.data)) not in loaded:
                    loaded[of_data] = data.load(config.data) if loaded else first
                lines[key] = _describe_built(config, loaded[of_data])
            except ConfigError as error:
                lines[key] = f"{config.data.name}: {config.model.name} cannot be trained ({error})"
        rules.setdefault(lines[key], []).append(_rule(config))
    return [f"{line}; {', '.join(dict.fromkeys(of_line))}" for line, of_line in rules.items()]


def _describe_built(config: RunConfig, images: ImageData) -> str:
    _, channels, height, width = images.train.images.shape
    drawn = replace(config.model, weights=None)  # the same number of parameters, and no download
    with torch.random.fork_rng(devices=[]):
        model = models.build(drawn, images.classes, channels, (height, width))
    return _describe(config, images, model)


def _describe(config: RunConfig, images: ImageData, model: nn.Module) -> str:
    """Describe network and data, with their sizes."""
    _, channels, height, width = images.train.images.shape
    size = f"{channels}x{height}x{width} pixels" if (height, width) != (1, 1) else f"{channels} features"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    val = "" if images.val is None else f"{len(images.val.labels):,} validation, "
    return (
        f"{config.model.name} on {size}, {parameters:,} parameters; {config.data.name}: "
        f"{len(images.train.labels):,} training, {val}{len(images.test.labels):,} test, "
        f"{images.classes} classes"
    )


def _rule(config: RunConfig) -> str:
    return rule_name(config.feedback.mode) or "backprop"
