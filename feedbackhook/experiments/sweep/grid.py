"""The runs of a sweep: the product of conditions, datasets, learning rates and seeds."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedbackhook.experiments.conditions import Condition, Procedure, procedures
from feedbackhook.experiments.config import (
    ClusterConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    SweepConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.data.registry import network_for
from feedbackhook.experiments.parser_messages import plain_words
from feedbackhook.experiments.resolve import check_epochs, resolve
from feedbackhook.experiments.stored import check_same, store_errors, with_stored_machine
from feedbackhook.experiments.sweep.controls import REFERENCE, controls
from feedbackhook.names import nearest
from feedbackhook.store.manifest import sweep_file
from feedbackhook.store.run_folder import RunFolder, RunResult

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LR_FACTORS = (100.0, 10.0, 1.0, 0.1, 0.01)
_SMALL_EPOCHS, _SMALL_LR_FACTORS = 8, 3


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, and its place in the product.

    Args:
        dataset: name of its data.
        condition: name of its condition.
        lr_factor: factor of the learning rate.
        seed: seed of the run.
        procedure: how it is trained; sweeps train some conditions in more than one way.
        config: its configuration.
        until: the epoch after which it pauses, to be compared with other learning rates; None: it trains to
            the end.
    """

    dataset: str
    condition: str
    lr_factor: float
    seed: int
    procedure: Procedure
    config: RunConfig
    until: int | None = None

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return os.path.basename(str(self.config.output))

    @property
    def mode(self) -> str | dict[str, Any] | None:
        """The rule of its feedback weights, or a mapping of rules; None is backprop."""
        if self.config.condition is not None:
            return Condition.parse(self.config.condition).feedback
        return self.config.feedback.mode

    @cached_property
    def resolved(self) -> RunConfig:
        """The configuration with every default filled in, as this machine would run it."""
        return resolve(self.config)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(str(self.config.output))

    def done(self, result: RunResult) -> bool:
        """Whether a run with this result has ended, or has come as far as it is to train for now."""
        return result.ended or (
            self.until is not None and result.status == "paused" and result.epoch >= self.until
        )


def plan(config: SweepConfig) -> list[PlannedRun]:
    """Return the runs of a sweep in the order in which they start.

    Raises:
        ConfigError: a list is empty, a name is unknown or occurs twice, or a condition contradicts the
            configuration.
    """
    config = shrink(config)
    _check_conditions(config.conditions)
    if config.data.name != DataConfig().name:
        raise ConfigError("data.name has no effect in a sweep: name the data in `datasets` instead")
    p, lr_factors = config.protocol, _lr_factors(config.protocol.lr_factors)
    if p.seeds < 1:
        raise ConfigError(f"protocol.seeds must be 1 or more, not {p.seeds}")
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers must be 1 or more, not {config.workers}")
    _check_cluster(config)
    _check_pruning(config)
    runs = [
        _placed(config.output, run, name, lr_factor, seed, procedure)
        for dataset in config.datasets
        for name, run in _conditioned(config, dataset)
        for procedure in procedures(run.condition, p)
        for lr_factor in lr_factors
        for seed in range(p.seed, p.seed + p.seeds)
    ]
    if not runs:
        raise ConfigError("a sweep needs conditions, datasets and protocol.lr_factors: one of them is empty")
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ConfigError(
                f"{count} runs of the sweep have the name {name}: remove the condition, dataset or factor "
                "that is given twice, or rename one of two that have similar names"
            )
    return runs


def shrink(config: SweepConfig) -> SweepConfig:
    """Return the sweep that ``config.small`` asks for; ``config`` itself if that is null."""
    if config.small is None:
        return config
    p, full = config.protocol, SweepProtocolConfig()
    return replace(
        config,
        datasets=[config.small],
        protocol=replace(
            p,
            epochs=_SMALL_EPOCHS if p.epochs == full.epochs else p.epochs,
            lr_factors=_SMALL_LR_FACTORS if p.lr_factors == full.lr_factors else p.lr_factors,
        ),
        output=f"{config.output}-{_slug(config.small)}",
        small=None,
    )


def stored(folder: str | os.PathLike[str]) -> SweepConfig:
    """Return the configuration of the sweep in a folder.

    Raises:
        ConfigError: the folder holds no sweep, or its sweep.yaml is damaged.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    path = sweep_file(folder, "sweep.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepConfig)
    try:
        given = parser.instantiate(parser.parse_path(str(path)))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {plain_words(error)}") from error
    config = SweepConfig(**{field.name: given[field.name] for field in fields(SweepConfig)})
    return replace(config, output=str(folder))


_EXAMPLE = "{half: {feedback: {mode: sign, options: {concordance: 0.5}}}}"


def _check_conditions(conditions: Any) -> None:
    """Raise a ConfigError that says what to write if these are not conditions."""
    if not isinstance(conditions, (list, dict)):
        raise ConfigError(
            "conditions must be a list of names, such as [SGD, BN+BM], or a mapping, such as "
            f"{_EXAMPLE}, not {conditions!r}"
        )
    for name in conditions:
        if isinstance(name, dict):
            raise ConfigError(
                f"conditions are a list, so {name!r} must be a name; to give conditions settings, write all "
                f"of them as a mapping (without the dashes), such as {_EXAMPLE}"
            )
        if not isinstance(name, str):
            raise ConfigError(f"the name of a condition must be text, not {name!r}: put it in quotes")
    if isinstance(conditions, dict):
        for name, settings in conditions.items():
            _check_settings(name, settings)


def _check_settings(name: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        wanted = "such as {feedback: {mode: sign, options: {concordance: 0.5}}}"
        if isinstance(settings, str):
            wanted = f"such as {{condition: {settings}}}, or {wanted.removeprefix('such as ')}"
        raise ConfigError(
            f"condition {name!r} must map settings of a run to values, {wanted}, but is {settings!r}"
        )
    known = vars(RunConfig())
    for key, value in settings.items():
        if key not in known:
            near = nearest(str(key), known)
            raise ConfigError(f"condition {name!r} sets {key}, which is not a setting of a run{near}")
        if not is_dataclass(known[key]):
            continue
        options = list(vars(known[key]))
        if not isinstance(value, dict):
            raise ConfigError(
                f"condition {name!r} must map settings of {key} to values, such as "
                f"{{{key}: {{{options[0]}: VALUE}}}}, but is {value!r}"
            )
        if unknown := [option for option in value if option not in options]:
            near = nearest(str(unknown[0]), options) or "."
            raise ConfigError(
                f"condition {name!r} sets {key}.{unknown[0]}, which is not a setting of a run{near} "
                f"{key} has {', '.join(options)}"
            )


def _check_cluster(config: SweepConfig) -> None:
    cluster = config.cluster
    if config.backend != "dask":
        if cluster != ClusterConfig():
            raise ConfigError(f"cluster has no effect with backend {config.backend}: set backend to dask")
        return
    if config.workers is not None:
        raise ConfigError(
            "workers has no effect with backend dask: the number of runs at a time is the number of threads "
            "of the cluster's workers, or follows from cluster.jobs with SLURM"
        )
    if (cluster.address is None) == (cluster.slurm is None):
        raise ConfigError(
            "backend dask needs either cluster.address (of a running scheduler) or cluster.slurm: set one "
            "of them"
        )
    for name in ("jobs", "runs_per_gpu"):
        if (value := getattr(cluster, name)) < 1:
            raise ConfigError(f"cluster.{name} must be 1 or more, not {value}")
    if cluster.gpus < 0:
        raise ConfigError(f"cluster.gpus must be 0 or more, not {cluster.gpus}")


def _check_pruning(config: SweepConfig) -> None:
    p, key = config.protocol, "protocol.lr_pruning"
    if not p.lr_pruning:
        return
    if sorted(set(p.lr_pruning)) != p.lr_pruning or not 1 <= p.lr_pruning[0] <= p.lr_pruning[-1] < p.epochs:
        raise ConfigError(
            f"{key} must be epochs before the last of {p.epochs}, in ascending order, not {p.lr_pruning}"
        )
    if not config.data.val_fraction:
        raise ConfigError(f"{key} compares validation errors: set data.val_fraction to more than 0")


def _lr_factors(given: int | list[float]) -> Sequence[float]:
    if isinstance(given, int):
        if given not in (1, 3, 5):
            raise ConfigError(f"protocol.lr_factors must be 1, 3 or 5, or a list of factors, not {given}")
        first = (len(LR_FACTORS) - given) // 2
        return LR_FACTORS[first : first + given]
    if wrong := [factor for factor in given if not 0 < factor < math.inf]:
        raise ConfigError(f"protocol.lr_factors must be finite and more than 0, not {wrong[0]}")
    return given


def _conditioned(config: SweepConfig, dataset: str) -> Iterator[tuple[str, RunConfig]]:
    """Yield each condition's name and the configuration of its runs without learning rate, seed and folder.

    Raises:
        ConfigError: a name is unknown, a condition sets something that a run does not have, or contradicts
            the configuration.
    """
    shared = {f.name: getattr(config.protocol, f.name) for f in fields(ProtocolConfig)}
    run = RunConfig(
        data=replace(config.data, name=dataset),
        model=ModelConfig(**vars(config.model)),
        feedback=config.feedback,
        optimizer=config.optimizer,
        protocol=ProtocolConfig(**shared | {"threads": config.protocol.threads or 1}),
        record=config.record,
    )
    first: RunConfig | None = None
    for name in config.conditions:
        if isinstance(config.conditions, dict):
            configured = _overridden(run, name, config.conditions[name])
        else:
            name = Condition.parse(name).name
            configured = replace(run, condition=name)
        if configured.model.name is None:
            if (network := network_for(dataset)) is None:
                raise ConfigError(f"no network is registered for {dataset}: set model.name")
            configured = replace(configured, model=replace(configured.model, name=network))
        if configured.condition is not None:
            Condition.parse(configured.condition).configure(configured)
        try:
            check_epochs(configured)
        except ConfigError as error:
            raise ConfigError(f"condition {name!r}: {error}") from error
        named = not isinstance(config.conditions, dict)
        first = first or (replace(configured, condition=REFERENCE) if named else configured)
        yield name, configured
    if config.controls and first is not None:
        yield from controls(first).items()


def _overridden(run: RunConfig, name: str, settings: dict[str, Any]) -> RunConfig:
    """The run with the settings that a condition of the sweep's own gives."""
    from argparse import ArgumentError

    parser = _parser()
    try:
        given = parser.instantiate(parser.parse_object(_merged(asdict(run), settings)))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"condition {name!r}: {plain_words(error)}") from error
    made = RunConfig(**{field.name: given[field.name] for field in fields(RunConfig)})
    for of_sweep in ("data.name", "protocol.seed", "label", "output"):
        section, _, key = of_sweep.rpartition(".")
        before, after = (getattr(getattr(r, section) if section else r, key) for r in (run, made))
        if before != after:
            raise ConfigError(f"condition {name!r} sets {of_sweep}, which only the sweep may set: remove it")
    return replace(made, label=name)


@cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    return parser


def _merged(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Merge two levels deep, as a run's configuration is; a mapping within an option is replaced."""
    merged = dict(base)
    for key, value in settings.items():
        section = key in base and isinstance(base[key], dict)
        merged[key] = base[key] | value if section and isinstance(value, dict) else value
    return merged


def _placed(
    output: str, run: RunConfig, condition: str, lr_factor: float, seed: int, procedure: Procedure
) -> PlannedRun:
    """The run at a learning rate and a seed, in its folder."""
    words = [_slug(run.data.name), _words(condition), f"rate{lr_factor:.15g}", f"seed{seed}"]
    if procedure.name:
        words.append(procedure.name)
    protocol = procedure.configure(replace(run.protocol, seed=seed))
    config = replace(
        run,
        optimizer=replace(run.optimizer, lr=run.optimizer.lr * lr_factor),
        protocol=protocol,
        output=str(Path(output) / "-".join(words)),
    )
    return PlannedRun(run.data.name, condition, lr_factor, seed, procedure, config)


def _slug(name: str) -> str:
    return _words(name.rstrip("/").replace(":", "/").rpartition("/")[2])


def _words(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^\w.+=-]+", "-", name)


def check(runs: Sequence[PlannedRun]) -> None:
    """Refuse to mix runs of two configurations.

    Raises:
        ConfigError: a run in the folder was trained with another configuration; the message names the file
            with the old one.
    """
    for run in runs:
        with store_errors():
            trained = run.folder.trained()
        if trained:
            given = resolve(with_stored_machine(run.config, run.folder))
            of_sweep = run.folder.path.parent / "sweep.yaml"
            check_same(run.folder, given, of_sweep if of_sweep.is_file() else None)


def done(run: PlannedRun) -> bool:
    """Whether there is nothing left to do for now: see :meth:`PlannedRun.done`."""
    with store_errors():
        result = run.folder.result()
    return result is not None and run.done(result)
