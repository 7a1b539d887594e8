"""The product of conditions, datasets, learning rates and seeds: which runs, and running them."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import joblib
import torch
import yaml  # type: ignore[import-untyped]

from feedbackhook.experiments import data
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    SweepConfig,
    SweepProtocolConfig,
    one_line,
)
from feedbackhook.experiments.data import ImageData, Split
from feedbackhook.experiments.datasets import PAPER
from feedbackhook.experiments.folder import RunFolder, RunResult
from feedbackhook.experiments.models import default_size
from feedbackhook.experiments.train import resolve, train
from feedbackhook.recorder import written_aside

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger(__name__)

RATES = (100.0, 10.0, 1.0, 0.1, 0.01)  # Liao et al. 2016: factors of the schedule
_LARGE_BATCH, _LARGE_BATCH_AFTER = 500, 3  # the same: what uSF+BM may do after the third epoch
_SMALL_EPOCHS, _SMALL_RATES = 8, 3
_ATTEMPTS = 3
_REHEARSED_STEPS = 5
_POLL = 1.0  # seconds


class PlannedRun(NamedTuple):
    """One run of a sweep, and where in the product it stands.

    ``rate`` is the factor of the learning rate; ``large_batch`` is uSF+BM's other procedure.
    """

    dataset: str
    condition: str
    rate: float
    seed: int
    large_batch: bool
    config: RunConfig

    @property
    def name(self) -> str:
        return Path(str(self.config.output)).name

    @property
    def mode(self) -> str | dict[str, Any] | None:
        """The rule of its feedback weights, or a mapping of rules; None is backprop."""
        if self.config.condition is not None:
            return Condition.parse(self.config.condition).feedback
        return self.config.feedback.mode

    @property
    def folder(self) -> RunFolder:
        return RunFolder(str(self.config.output))


class Estimate(NamedTuple):
    """What a run takes: seconds, on this machine with nothing beside it, and bytes on disk."""

    seconds: float
    size: float


def plan(config: SweepConfig) -> list[PlannedRun]:
    """The runs of a sweep, in the order in which they are begun.

    Raises:
        ConfigError: a list is empty, a name is unknown or occurs twice, or a condition contradicts what is
            given.
    """
    config = shrink(config)
    if config.data.name != DataConfig().name:
        raise ConfigError("data.name has no effect in a sweep: name the data in datasets")
    rates, p = _rates(config.protocol.rates), config.protocol
    if p.seeds < 1:
        raise ConfigError(f"protocol.seeds must be 1 or more, not {p.seeds}")
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers must be 1 or more, not {config.workers}")
    runs = [
        PlannedRun(
            dataset, name, rate, seed, large_batch, _placed(config, run, name, rate, seed, large_batch)
        )
        for dataset in config.datasets
        for name, run in _conditioned(config, dataset)
        for large_batch in _procedures(run, p)
        for rate in rates
        for seed in range(p.seed, p.seed + p.seeds)
    ]
    if not runs:
        raise ConfigError("a sweep needs conditions, datasets and protocol.rates: one of them is empty")
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ConfigError(
                f"{count} runs of the sweep have the name {name}: a condition, a dataset or a rate is given "
                "twice, or two go by the same name"
            )
    return runs


def shrink(config: SweepConfig) -> SweepConfig:
    """What ``config.small`` makes of a sweep; the sweep itself where it is null."""
    if config.small is None:
        return config
    p, full = config.protocol, SweepProtocolConfig()
    return replace(
        config,
        datasets=[config.small],
        protocol=replace(
            p,
            epochs=_SMALL_EPOCHS if p.epochs == full.epochs else p.epochs,
            rates=_SMALL_RATES if p.rates == full.rates else p.rates,
        ),
        output=f"{config.output}-{_slug(config.small)}",
        small=None,
    )


def stored(folder: str | os.PathLike[str]) -> SweepConfig:
    """The configuration of the sweep in a folder.

    Raises:
        ConfigError: there is none, or its sweep.yaml is damaged.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    path = Path(folder) / "sweep.yaml"
    if not path.is_file():
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {folder}")
        if (path.parent.parent / "sweep.yaml").is_file():
            raise ConfigError(f"{folder} holds no sweep, but is a run of the one in {path.parent.parent}")
        raise ConfigError(f"{folder} holds no sweep: there is no {path}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepConfig)
    try:
        given = parser.instantiate(parser.parse_path(str(path)))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from error
    config = SweepConfig(**{field.name: given[field.name] for field in fields(SweepConfig)})
    return replace(config, output=str(folder))


def sweep(
    config: SweepConfig, progress: Callable[[dict[str, RunResult | None]], None] | None = None
) -> dict[str, RunResult]:
    """Run what has not ended in worker processes, and give the results by name, in the order of :func:`plan`.

    Finished and diverged runs are left as they are, all others go on from their checkpoints. A run that fails
    is kept as `failed` with its reason and stops no other; the next sweep tries it again. Where a process is
    killed, so is every run beside it: they go on from their checkpoints in new processes, and one whose
    process ends three times is kept as `failed`. If the sweep is itself interrupted or killed, its runs stop
    with it, and the next one goes on.

    Args:
        config: the sweep.
        progress: called every second with how each run stands, by name; None is one not yet begun.

    Raises:
        ConfigError: nothing was run: the sweep's configuration is wrong, a folder holds runs of another one,
            or data are not there.
    """
    runs = plan(config)
    config = shrink(config)
    with _alone(Path(config.output)):
        check(runs)
        pending = [run for run in runs if not ended(run)]
        for dataset in {run.dataset: run for run in pending}.values():
            with _named(dataset.dataset):
                data.load(resolve(dataset.config).data)  # decodes what is not in the cache yet
        _write(config)
        monitor = _Monitor(runs, progress)
        with monitor:
            _run_all(pending, workers(config, runs))
    return {name: result for name, result in monitor.states().items() if result is not None}


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


def _rates(rates: int | list[float]) -> Sequence[float]:
    if isinstance(rates, int):
        if rates not in (1, 3, 5):
            raise ConfigError(f"protocol.rates must be 1, 3 or 5, or a list of factors, not {rates}")
        first = (len(RATES) - rates) // 2
        return RATES[first : first + rates]
    if wrong := [rate for rate in rates if not 0 < rate < math.inf]:
        raise ConfigError(f"protocol.rates are factors of the learning rate, more than 0, not {wrong[0]}")
    return rates


def _procedures(run: RunConfig, protocol: SweepProtocolConfig) -> tuple[bool, ...]:
    """The paper lets uSF+BM, and no other condition, take larger mini-batches as well."""
    usf_bm = Condition("uSF", manhattan=1)
    alike = run.condition in (usf_bm.name, replace(usf_bm, spoken=True).name)
    two = alike and protocol.epochs > _LARGE_BATCH_AFTER
    return (False, True) if two and not protocol.batch_sizes else (False,)


def _conditioned(config: SweepConfig, dataset: str) -> Iterator[tuple[str, RunConfig]]:
    """The name of each condition and its runs' configuration, but for learning rate, seed and folder.

    Raises:
        ConfigError: a name is unknown, or a condition sets what a run has not, or contradicts what is given.
    """
    shared = {f.name: getattr(config.protocol, f.name) for f in fields(ProtocolConfig)}
    run = RunConfig(
        data=replace(config.data, name=dataset),
        model=ModelConfig(**vars(config.model) | {"name": config.model.name or ""}),
        feedback=config.feedback,
        optimizer=config.optimizer,
        protocol=ProtocolConfig(**shared | {"threads": config.protocol.threads or 1}),
        record=config.record,
    )
    for name in config.conditions:
        if isinstance(config.conditions, dict):
            configured = _overridden(run, name, config.conditions[name])
        else:
            name = Condition.parse(name).name
            configured = replace(run, condition=name)
        if not configured.model.name:
            configured = replace(configured, model=replace(configured.model, name=_papers_network(dataset)))
        if configured.condition is not None:
            Condition.parse(configured.condition).configure(configured)
        yield name, configured


def _overridden(run: RunConfig, name: str, settings: dict[str, Any]) -> RunConfig:
    """The run with what a condition of one's own sets."""
    from argparse import ArgumentError

    parser = _parser()
    try:
        given = parser.instantiate(parser.parse_object(_merged(asdict(run), settings, name)))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"condition {name!r}: {one_line(error)}") from error
    made = RunConfig(**{field.name: given[field.name] for field in fields(RunConfig)})
    for of_sweep in ("data.name", "protocol.seed", "label", "output"):
        section, _, key = of_sweep.rpartition(".")
        before, after = (getattr(getattr(r, section) if section else r, key) for r in (run, made))
        if before != after:
            raise ConfigError(f"condition {name!r} sets {of_sweep}, which is the sweep's to set")
    return replace(made, label=name)


@cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    return parser


def _merged(base: dict[str, Any], settings: Any, where: str) -> dict[str, Any]:
    """Two levels deep, as a run's configuration is: what is an option's value is not merged."""
    if not isinstance(settings, dict):
        raise ConfigError(f"condition {where!r} must map settings of a run to values, not be {settings!r}")
    merged = dict(base)
    for key, value in settings.items():
        section = key in base and isinstance(base[key], dict)
        merged[key] = base[key] | value if section and isinstance(value, dict) else value
    return merged


def _placed(
    config: SweepConfig, run: RunConfig, condition: str, rate: float, seed: int, large_batch: bool
) -> RunConfig:
    """The run at a learning rate and a seed, in its folder."""
    words = [_slug(run.data.name), _words(condition), f"rate{rate:.15g}", f"seed{seed}"]
    protocol = replace(run.protocol, seed=seed)
    if large_batch:
        words.append(f"batch{_LARGE_BATCH}")
        protocol = replace(protocol, batch_sizes={_LARGE_BATCH_AFTER: _LARGE_BATCH})
    return replace(
        run,
        optimizer=replace(run.optimizer, lr=run.optimizer.lr * rate),
        protocol=protocol,
        output=str(Path(config.output) / "-".join(words)),
    )


def _slug(name: str) -> str:
    return _words(name.rstrip("/").replace(":", "/").rpartition("/")[2])


def _words(name: str) -> str:
    """The name as a part of a file's."""
    return re.sub(r"[^\w.+=-]+", "-", name)


def _papers_network(dataset: str) -> str:
    if dataset == "digits":
        return PAPER["MNIST"].network
    if dataset not in PAPER:
        raise ConfigError(f"the paper has no network for {dataset}: set model.name")
    return PAPER[dataset].network


def check(runs: Sequence[PlannedRun]) -> None:
    """Refuse to mix runs of two configurations.

    Raises:
        ConfigError: a run that has been trained was configured otherwise.
    """
    for run in runs:
        if run.folder.trained():
            run.folder.check_same(resolve(run.config))


def ended(run: PlannedRun) -> bool:
    """Whether there is nothing left to do: it is finished, or has diverged."""
    result = run.folder.result()
    return result is not None and result.ended


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other sweep is at work in the folder; the lock ends with the process."""
    from filelock import FileLock, Timeout

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ConfigError(
            f"another sweep is at work in {folder}: wait for it, or give another output"
        ) from error
    finally:
        if made and {path.name for path in folder.iterdir()} <= {".lock"}:  # nothing was run
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def _named(dataset: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} (nothing was run; or leave {dataset} out of datasets)") from error


def _write(config: SweepConfig) -> None:
    path = Path(config.output) / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def workers(config: SweepConfig, runs: Sequence[PlannedRun]) -> int:
    """How many runs of a sweep are at work at a time."""
    if config.workers is not None:
        return config.workers
    device = resolve(runs[0].config).protocol.device
    return 1 if device != "cpu" else max(1, joblib.cpu_count() // (runs[0].config.protocol.threads or 1))


def _run_all(pending: list[PlannedRun], count: int) -> None:
    """Run them in worker processes, ``count`` at a time, until each has ended or failed.

    The pool begins runs in the order in which it gets them, so when it breaks those that ran are the first
    that have not ended. Nothing tells which of them broke it: each has an attempt less, and one that has a
    single attempt left has it alone.
    """
    attempts: Counter[str] = Counter()
    done: set[str] = set()
    while left := [run for run in pending if run.name not in done]:
        last = [run for run in left if attempts[run.name] == _ATTEMPTS - 1][:1]
        at_once = 1 if last else count
        # joblib's pool of one would be this process itself, which no run may take down
        pool = joblib.Parallel(
            max(2, at_once), pre_dispatch=at_once, batch_size=1, return_as="generator_unordered"
        )
        try:
            for name in pool(joblib.delayed(_run_one)(run.config, os.getpid()) for run in last or left):
                done.add(name)
        except BrokenProcessPool:
            done.update(run.name for run in left if ended(run))
            for run in [run for run in last or left if run.name not in done][:at_once]:
                attempts[run.name] += 1
                logger.warning("the process of %s ended (attempt %d)", run.name, attempts[run.name])
                if attempts[run.name] == _ATTEMPTS:
                    reason = f"its process ended {_ATTEMPTS} times: killed, or out of memory?"
                    _fail(run.config, reason)
                    done.add(run.name)


def _run_one(config: RunConfig, sweeper: int) -> str:
    """One run, in a worker; how it went is in its folder."""
    try:
        with _bound_to(sweeper):
            train(config, resume=True)
    except Exception as error:  # whatever ends a run is kept with it, and ends no other
        try:
            _fail(config, f"{type(error).__name__}: {error}", traceback.format_exc())
        except OSError as full:  # the disk, perhaps
            logger.error("%s failed (%s), and that could not be kept: %s", config.output, error, full)
    return Path(str(config.output)).name


@contextmanager
def _bound_to(sweeper: int) -> Iterator[None]:
    """Within the block a worker ends when its sweeping process does, however that ends: the next sweep must
    find nobody at work in the folders."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL / 4):
            if sweeper not in (os.getpid(), os.getppid()):
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _fail(config: RunConfig, reason: str, details: str | None = None) -> None:
    """Keep that a run failed. One that had ended before, and whose figures could not be drawn, did not."""
    folder = RunFolder(str(config.output))
    result = folder.result()
    if result is not None and result.ended:
        logger.warning("%s has %s, and then: %s", config.output, result.status, reason)
        return
    if result is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        result = RunResult(folder.path)
        folder.write_result(result)  # a folder without a status is none of a run, whenever this is killed
    if not folder.trained():
        folder.write_config(resolve(config))
    if details is not None:
        folder.write_traceback(details)
    result.status, result.reason = "failed", reason
    folder.write_result(result)


class _Monitor:
    """Tells each second how the runs stand, from their folders."""

    def __init__(
        self, runs: Sequence[PlannedRun], progress: Callable[[dict[str, RunResult | None]], None] | None
    ) -> None:
        self._runs, self._progress = runs, progress
        self._known: dict[str, RunResult | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def states(self) -> dict[str, RunResult | None]:
        for run in self._runs:
            known = self._known.get(run.name)
            if known is None or not known.ended:
                self._known[run.name] = run.folder.result()
        return dict(self._known)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.states())

    def __enter__(self) -> None:
        self._tell()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tell()


def _counts(run: PlannedRun) -> tuple[int, int, int]:
    """Images trained on, images evaluated on after each epoch, and classes."""
    if run.dataset in PAPER:
        known = PAPER[run.dataset]
        held_out = round(known.train * run.config.data.held_out)
        return known.train - held_out, known.test + held_out, known.classes
    images = data.load(resolve(run.config).data)
    evaluated = len(images.test.labels) + (0 if images.held_out is None else len(images.held_out.labels))
    return len(images.train.labels), evaluated, images.classes


def _rehearse(run: PlannedRun) -> tuple[float, float, float]:
    """Seconds a step, bytes of weights and checkpoint, and bytes of the table an epoch."""
    _, _, classes = _counts(run)
    config = resolve(run.config)
    channels, height, _ = default_size(config.model.name)
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
