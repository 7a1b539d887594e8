"""Resolve a configuration: fill in every default that depends on the rest of it, and check the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import ConfigError, ProtocolConfig, RunConfig, one_line, rule_name
from feedbackhook.experiments.data.registry import network_for
from feedbackhook.experiments.models.build import natural_size
from feedbackhook.experiments.models.registry import network_name
from feedbackhook.experiments.stored import as_mapping
from feedbackhook.experiments.training import optimizers
from feedbackhook.rules import RULES, is_direct

_BATCH_SIZES = 8
"""How many batch sizes torch.compile makes code for, `torch._dynamo.config.recompile_limit`."""


def resolve(config: RunConfig, count: int = 1) -> RunConfig:
    """Return a copy of `config` in which nothing is left to a default, checked as a whole.

    Call it once, then pass on what it returns. To resolve a resolved configuration changes nothing.

    Args:
        config: the configuration as given.
        count: number of processes that train the run.

    Raises:
        ConfigError: a value is out of range, contradicts another one, or cannot be stored.
    """
    config = _checked_again(config)
    if config.condition is not None:
        config = Condition.parse(config.condition).configure(config)
    check_epochs(config)
    _check_mini_batches(config, count)
    _check_gradient_angle(config)
    _check_check_every(config)
    _check_compile(config)
    optimizers.check(config.optimizer)
    model, protocol = config.model, config.protocol
    if model.name is None:
        model = replace(model, name=network_for(config.data.name) or network_name(model))
    size, seed = config.data.size, config.feedback.seed
    resolved = replace(
        config,
        data=replace(config.data, size=natural_size(model) if size is None else size),
        model=model,
        feedback=replace(config.feedback, seed=protocol.seed if seed is None else seed),
        protocol=replace(
            protocol,
            milestones=_milestones(protocol),
            threads=torch.get_num_threads() if protocol.threads is None else protocol.threads,
            device=_device(protocol.device),
        ),
        output=config.output or default_output(config),
        provenance={},
    )
    as_mapping(resolved)
    return resolved


def _checked_again(config: RunConfig) -> RunConfig:
    """Make each section again, so that it checks the values that were assigned after it was made."""
    return replace(
        config,
        data=replace(config.data),
        feedback=replace(config.feedback),
        protocol=replace(config.protocol),
        record=replace(config.record),
    )


def default_output(config: RunConfig) -> str:
    """Return runs/DATA-MODE-seedSEED, with the label or the condition instead of the mode if there is one."""
    name = config.data.name.rstrip("/").replace(":", "/").rpartition("/")[2]
    what = config.label or config.condition or rule_name(config.feedback.mode) or "backprop"
    return f"runs/{name}-{what.replace(' ', '-')}-seed{config.protocol.seed}"


def check_device(config: RunConfig) -> None:
    """Check that this machine has the device of a resolved configuration.

    Raises:
        ConfigError: it does not.
    """
    device = config.protocol.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"protocol.device {device!r} cannot be used on this machine: {error}") from error


def check_epochs(config: RunConfig) -> None:
    """Check that the run is long enough for what is to change when an epoch ends.

    Raises:
        ConfigError: it is not.
    """
    epochs = config.protocol.epochs
    for name, changes in (
        ("feedback.schedule", config.feedback.schedule),
        ("protocol.milestones", config.protocol.milestones or ()),
    ):
        if changes and (last := max(changes)) > epochs:
            raise ConfigError(
                f"{name}: epoch {last} never comes, since protocol.epochs is {epochs}: change one of them"
            )


def _check_mini_batches(config: RunConfig, count: int) -> None:
    """Check that each mini-batch can be split into equal parts."""
    protocol = config.protocol
    parts = count * protocol.gradient_accumulation_steps
    for size in (protocol.batch_size, *protocol.batch_sizes.values()):
        if size % parts:
            near = max(parts, size // parts * parts)
            raise ConfigError(
                f"a mini-batch of {size} images cannot be split evenly over {count} processes with "
                f"{protocol.gradient_accumulation_steps} gradient accumulation steps: use a multiple of "
                f"{parts}, such as {near}"
            )


def _check_gradient_angle(config: RunConfig) -> None:
    """Check that the gradient of the whole mini-batch is there to be measured, if it is to be."""
    if not config.record.gradient_angle_every:
        return
    if config.protocol.strategy == "fsdp2":
        why = "protocol.strategy fsdp2, which leaves no process with whole gradients"
    elif config.protocol.gradient_accumulation_steps > 1:
        why = "protocol.gradient_accumulation_steps, since it is the angle of the whole mini-batch"
    else:
        return
    raise ConfigError(f"record.gradient_angle_every cannot be measured with {why}: set it to 0")


def _check_check_every(config: RunConfig) -> None:
    """Check that every process has whole gradients, and that there is a patch, if checks are asked for."""
    if config.record.check_every and config.protocol.strategy == "fsdp2":
        raise ConfigError(
            "record.check_every needs whole gradients, which protocol.strategy fsdp2 leaves to no process: "
            "set it to 0, or use ddp"
        )


def _check_compile(config: RunConfig) -> None:
    """Check that the compiled network would be trained, and could be, if that is asked for."""
    protocol = config.protocol
    if not protocol.compile:
        return
    for name in _modes(config.feedback.mode):
        if name in RULES and is_direct(RULES[name]):
            raise ConfigError(
                f"protocol.compile cannot be used with {name}: direct feedback needs the output's gradient, "
                "which compiled code does not show. Set it to false"
            )
    if protocol.strategy == "fsdp2":
        raise ConfigError(
            "protocol.compile needs the network in one graph, which protocol.strategy fsdp2 breaks where it "
            "gathers the weights: set it to false, or use ddp"
        )
    if config.feedback.mode is not None and config.record.every == 1:
        raise ConfigError(
            "protocol.compile has no effect with record.every 1, since recorded steps run uncompiled: record "
            "fewer steps, or set it to false"
        )
    if (sizes := len({protocol.batch_size, *protocol.batch_sizes.values()})) > _BATCH_SIZES:
        raise ConfigError(
            f"protocol.compile makes code for each batch size, at most {_BATCH_SIZES}, and there are {sizes} "
            "in protocol.batch_sizes: set it to false, or use fewer"
        )


def _modes(mode: str | Mapping[str, Any] | None) -> list[str]:
    """Return the names of the rules in `feedback.mode`; a mistake in it shows when the network is patched."""
    entries = mode.values() if isinstance(mode, Mapping) else [mode]
    names = (entry.get("mode") if isinstance(entry, Mapping) else entry for entry in entries)
    return [name for name in names if isinstance(name, str)]


def _milestones(protocol: ProtocolConfig) -> list[int] | None:
    if protocol.milestones is not None or protocol.lr_schedule != "steps":
        return protocol.milestones
    return [round(protocol.epochs * m / 65) for m in (50, 60)]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"protocol.device {name!r} is not a torch device: {one_line(error)}") from error
    return name
