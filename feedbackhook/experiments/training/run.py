"""One run: train a network with feedback weights, evaluate and measure it each epoch, leave a run folder."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

import feedbackhook
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import (
    ConfigError,
    FolderInUse,
    ProtocolConfig,
    RunConfig,
    one_line,
    rule_name,
)
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.data.load import ImageData, Split
from feedbackhook.experiments.data.registry import papers_network
from feedbackhook.experiments.models import build as models
from feedbackhook.experiments.models.batch_norm import estimate_statistics
from feedbackhook.experiments.training import distributed as processes
from feedbackhook.experiments.training import optimizers
from feedbackhook.experiments.training.distributed import Processes
from feedbackhook.experiments.training.opening import opening
from feedbackhook.experiments.training.stopping import stoppable, uninterrupted
from feedbackhook.report import plots
from feedbackhook.store.recorder import Recorder, read
from feedbackhook.store.run_folder import RunFolder, RunResult, as_yaml

logger = logging.getLogger(__name__)

_STATISTICS_BATCHES = 20  # Liao et al. 2016
_EVALUATION_BATCH = 500
_PATIENCE = 5.0  # seconds


class Progress(NamedTuple):
    """Where a run is: after each step (``test_error`` is None) and after each evaluation.

    ``epoch`` is the one that runs, 0 before training; ``batch`` counts its mini-batches done, of
    ``batches``; ``train_loss`` is the mean over them; ``test_error`` is in percent.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    train_loss: float
    test_error: float | None = None


class Diverged(ArithmeticError):
    """A loss is not finite."""

    def __init__(self, metric: str, value: float) -> None:
        super().__init__(f"{metric.replace('_', ' ')} is {value}")
        self.metric, self.value = metric, value


def train(
    config: RunConfig,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    images: ImageData | None = None,
    tell: Callable[[str], None] = logger.info,
) -> RunResult:
    """Train as ``config`` says and leave a run folder; the global random state and thread count stay.

    ``images`` are trained on in the place of those that ``config.data`` names. ``tell`` is called once with
    what is trained: network, size and counts of the data, rule and device.

    With ``resume`` the run goes on from its folder's checkpoint, on the CPU bit-equal to never having
    stopped, or begins where there is none; a finished or diverged run is returned as it is. A run whose
    loss is no longer finite ends as `diverged`, its table written. ``KeyboardInterrupt`` passes through
    and leaves the run `interrupted`, its finished epochs kept; so does SIGTERM, unless the program handles
    it. Any other error leaves the run `failed`.

    Under torchrun all processes train this one run, and each of them returns its result; the first alone
    writes, and tells ``progress``. Their number may be another when the run is resumed.

    Raises:
        ConfigError: the run cannot start so: a bad option, data that are not there, a folder in use.
    """
    with stoppable(), processes.started(config.protocol) as team:
        config, ended = team.told(lambda: _begin(config, resume, team.count))
        if ended is not None:
            return ended
        folder = RunFolder(str(config.output), writes=team.first)
        with _threads(config.protocol.threads), _random_state(config.protocol.seed, config.protocol.device):
            run = team.in_turn(lambda: _built(config, images, team))
            try:
                if team.first:
                    tell(opening(config, run.data, run.model))
                run.distribute()
                with team.agreed(), _one_clear_error():
                    recorder = _recorder(folder, config)
                with recorder:
                    result = run.through(folder, recorder, (team.first and progress) or (lambda _: None))
            finally:
                run.close()
            if config.record.figures:
                team.told(lambda: _draw(folder))
    return result


def _begin(config: RunConfig, resume: bool, count: int) -> tuple[RunConfig, RunResult | None]:
    """The resolved configuration of a run on ``count`` processes, and its result if it has ended."""
    folder = RunFolder(config.output or default_output(config))
    before = folder.result()
    if before is not None and not resume:
        raise ConfigError(
            f"{folder.path} holds a run ({before.status}, epoch {before.epoch}): "
            "go on with it by --resume, or give another --output"
        )
    config = resolve(as_begun(config, folder), count)
    if before is not None and folder.trained():
        folder.check_same(config)
        if before.ended:
            if config.record.figures and not before.figures:
                _draw(folder)
            return config, before
    check_device(config)
    return config, None


def default_output(config: RunConfig) -> str:
    """runs/DATA-MODE-seedSEED, or the label or the condition in the place of the mode."""
    name = config.data.name.rstrip("/").replace(":", "/").rpartition("/")[2]
    what = config.label or config.condition or rule_name(config.feedback.mode) or "backprop"
    return f"runs/{name}-{what.replace(' ', '-')}-seed{config.protocol.seed}"


def as_begun(config: RunConfig, folder: RunFolder) -> RunConfig:
    """``config``, and where it leaves threads or the device to the machine those of the run in the folder.

    Raises:
        ConfigError: config.yaml is damaged.
    """
    p = config.protocol
    if not folder.trained() or (p.threads is not None and p.device != "auto"):
        return config
    try:
        stored = folder.stored_config()["protocol"]
        threads = stored["threads"] if p.threads is None else p.threads
        device = stored["device"] if p.device == "auto" else p.device
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder.path}/config.yaml is damaged: give another output") from error
    return replace(config, protocol=replace(p, threads=threads, device=device))


def resolve(config: RunConfig, count: int = 1) -> RunConfig:
    """``config`` with every null that stands for a default filled in, and its numbers checked, for a run on
    ``count`` processes.

    Raises:
        ConfigError: a number is out of its range, or the device is none that torch knows.
    """
    if config.condition is not None:
        config = Condition.parse(config.condition).configure(config)
    if config.model.name is None:
        network = papers_network(config.data.name) or config.model.network
        config = replace(config, model=replace(config.model, name=network))
    p = config.protocol
    for name, value, least in (
        ("protocol.epochs", p.epochs, 1),
        ("protocol.batch_size", p.batch_size, 1),
        ("protocol.threads", p.threads, 1),
        ("protocol.gradient_accumulation_steps", p.gradient_accumulation_steps, 1),
        ("protocol.seed", p.seed, 0),
        ("record.every", config.record.every, 1),
        ("record.gradient_angle_every", config.record.gradient_angle_every, 0),
        ("data.train_images", config.data.train_images, 1),
        ("data.test_images", config.data.test_images, 1),
        *(("an epoch in feedback.schedule", epoch, 1) for epoch in config.feedback.schedule),
        *(("protocol.milestones", milestone, 1) for milestone in p.milestones or ()),
        *(("an epoch in protocol.batch_sizes", epoch, 1) for epoch in p.batch_sizes),
        *(("a size in protocol.batch_sizes", size, 1) for size in p.batch_sizes.values()),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be {least} or more, not {value}")
    if p.seed >= 2**63:
        raise ConfigError(f"protocol.seed must be less than 2**63, not {p.seed}")
    _check_parts(config, count)
    optimizers.check(config.optimizer)
    if config.feedback.schedule and config.feedback.mode is None:
        raise ConfigError("feedback.schedule has no effect without feedback.mode")
    if p.lr_schedule == "cosine" and p.milestones is not None:
        raise ConfigError(
            "protocol.milestones have no effect with protocol.lr_schedule cosine: they are of steps"
        )
    if not 0 < p.lr_factor < math.inf:
        raise ConfigError(f"protocol.lr_factor must be positive, not {p.lr_factor}")
    device = p.device if p.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"protocol.device {device!r} is none of torch's: {one_line(error)}") from error
    size, seed = config.data.size, config.feedback.seed
    resolved = replace(
        config,
        data=replace(config.data, size=models.natural_size(config.model) if size is None else size),
        feedback=replace(config.feedback, seed=p.seed if seed is None else seed),
        protocol=replace(
            p,
            milestones=_milestones(p),
            threads=torch.get_num_threads() if p.threads is None else p.threads,
            device=device,
        ),
        output=config.output or default_output(config),
        provenance={},
    )
    as_yaml(resolved)
    return resolved


def check_device(config: RunConfig) -> None:
    """See that this machine has the device of a resolved configuration.

    Raises:
        ConfigError: it has not.
    """
    device = config.protocol.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"protocol.device {device!r} cannot be used: {error}") from error


def _check_parts(config: RunConfig, count: int) -> None:
    """Sees that each mini-batch can be shared out, and that what is recorded can be measured then."""
    p = config.protocol
    for section, name in ((p, "precision"), (p, "strategy"), (p, "reduction"), (config.record, "weights")):
        value, known = getattr(section, name), get_args(get_type_hints(type(section))[name])
        if value not in known:
            where = "record" if section is config.record else "protocol"
            raise ConfigError(f"{where}.{name} must be {' or '.join(known)}, not {value!r}")
    parts = count * p.gradient_accumulation_steps
    for size in (p.batch_size, *p.batch_sizes.values()):
        if size % parts:
            near = max(parts, size // parts * parts)
            raise ConfigError(
                f"a mini-batch of {size} images cannot be split evenly over {count} processes with "
                f"{p.gradient_accumulation_steps} gradient accumulation steps: use a multiple of {parts}, "
                f"such as {near}"
            )
    whole = p.strategy != "fsdp2" and p.gradient_accumulation_steps == 1
    if config.record.gradient_angle_every and not whole:
        why = (
            "protocol.strategy fsdp2, whose gradients only the backward puts together"
            if p.strategy == "fsdp2"
            else "protocol.gradient_accumulation_steps, since it is of the whole mini-batch"
        )
        raise ConfigError(f"record.gradient_angle_every cannot be measured with {why}: give 0 for none")


def _built(config: RunConfig, images: ImageData | None, team: Processes) -> _Run:
    with _one_clear_error():
        return _Run(config, data.load(config.data) if images is None else images, team)


def _milestones(p: ProtocolConfig) -> list[int] | None:
    if p.milestones is not None or p.lr_schedule != "steps":
        return p.milestones
    return [round(p.epochs * m / 65) for m in (50, 60)]


class _Run:
    """What a configuration builds, and how far its training is."""

    def __init__(self, config: RunConfig, images: ImageData, team: Processes) -> None:
        self.config, p, f = config, config.protocol, config.feedback
        self.team, self.device = team, team.device(p.device)
        self.data = images.to(self.device)
        count, channels, height, width = images.train.images.shape
        if (largest := max(p.batch_size, *p.batch_sizes.values(), 0)) > count:
            raise ConfigError(f"a mini-batch of {largest} is more than the {count} training images")
        model = models.build(config.model, self.data.classes, channels, (height, width))
        if (statistics := models.statistics(config.model, channels)) is not None:
            self.data = replace(self.data, mean=statistics[0], std=statistics[1])
        # channels last: the same numbers but for rounding, and twice as fast on a CPU
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.still = models.still(self.model, config.model)
        augmentation = config.data.augmentation
        self.augment = None if augmentation is None else self.data.augmentation(augmentation)
        self.optimizer = optimizers.build(config.optimizer, self.model)
        self.lr_schedule = optimizers.lr_schedule(p, self.optimizer)
        self.order = torch.Generator().manual_seed(p.seed)
        self.epoch = self.step = 0
        self.train_loss = math.nan
        self.patch: feedbackhook.Patch | None = None
        if f.mode is not None:
            assert f.seed is not None
            self.patch = feedbackhook.patch(
                self.model,
                f.mode,
                include=f.include,
                exclude=f.exclude,
                seed=f.seed,
                recompute=f.recompute,
                fused=f.fused,
                **f.options,
            )
            before = self.patch.state_dict()
            for options in f.schedule.values():  # whatever is wrong with them shows at the start
                self.patch.set(**options)
            self.patch.load_state_dict(before)

    def distribute(self) -> None:
        """Makes it that of all processes, which follows the patch: sharded weights come after it."""
        self.team.distribute(self.model, self.optimizer)

    def close(self) -> None:
        if self.patch is not None:
            self.patch.remove()

    def through(
        self, folder: RunFolder, recorder: Recorder, progress: Callable[[Progress], None]
    ) -> RunResult:
        """Train from the folder's checkpoint, or from the start, to the end."""
        folder.tidy()
        checkpoint = self.team.told(folder.load_checkpoint)
        result = self.result = RunResult(folder.path)
        self.touch = recorder.touch_if_due
        try:
            if checkpoint is None:
                recorder.drop_after(-1)
                folder.write_result(result)
                folder.write_config(self.config, self.team.count)
                self._evaluate(recorder, progress)
                self._save(folder, recorder)
            else:
                self._go_on(checkpoint, folder, recorder)
                folder.write_result(result)
            if self.patch is not None:
                record = self.config.record
                self.patch.watch(
                    record.every,
                    recorder,
                    step=self.step,
                    per_sample=record.per_sample,
                    group=self.team.group,
                )
            while self.epoch < self.config.protocol.epochs:
                self.epoch += 1
                with data.seeded(self.config.protocol.seed, self.epoch):  # for augmentation
                    self._train_epoch(recorder, progress)
                self._evaluate(recorder, progress)
                self._save(folder, recorder)
            result.status = "finished"
        except Diverged as stop:
            result.status = "diverged"
            result.reason = f"{stop} in epoch {self.epoch}, after {self.step} steps"
            recorder.add(self.step, self.epoch, stop.metric, stop.value)
            recorder.flush()  # a diverged run is not touched again
        except BaseException as error:
            result.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            result.reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise
        finally:
            with uninterrupted():
                folder.write_result(result)
                if result.ended and self.config.record.weights != "all":
                    folder.remove_checkpoint()
        return result

    def _go_on(self, checkpoint: dict[str, Any], folder: RunFolder, recorder: Recorder) -> None:
        """Restore the checkpoint and see that the table reaches as far.

        Raises:
            ConfigError: one of them is damaged.
        """
        with self.team.agreed():
            try:
                self._restore(checkpoint)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"cannot go on: {folder.path}/checkpoint.pt does not fit this run "
                    f"({type(error).__name__}: {one_line(error)}): give another output"
                ) from error
        self.team.told(lambda: self._cut(folder, recorder))

    def _cut(self, folder: RunFolder, recorder: Recorder) -> None:
        """Drops the rows that follow the checkpoint, and sees that those before it are there."""
        with _one_clear_error():
            recorder.drop_after(self.step, self.epoch)
            last = int(read(folder.path)["step"].max())
        if last < self.step:
            raise ConfigError(
                f"cannot go on: the table in {folder.path}/metrics ends at step {last}, the checkpoint is of "
                f"step {self.step}: give another output"
            )

    def _train_epoch(self, recorder: Recorder, progress: Callable[[Progress], None]) -> None:
        p, train_set = self.config.protocol, self.data.train
        size = self._batch_size()
        batches = len(train_set.labels) // size
        recorder.epoch = self.epoch
        rate = float(self.lr_schedule.get_last_lr()[0])
        total, wrong = 0.0, 0.0
        self.model.train()
        for module in self.still:
            module.eval()
        self.team.seed(p.seed, self.epoch)
        for batch, index in enumerate(data.minibatches(len(train_set.labels), size, self.order), 1):
            loss, missed = self._train_step(index, recorder, last=self.epoch == p.epochs and batch == batches)
            total += loss
            wrong += missed
            self.touch()
            progress(Progress(self.epoch, p.epochs, batch, batches, total / batch))
        self.lr_schedule.step()
        if self.patch is not None and self.epoch in self.config.feedback.schedule:
            self.patch.set(**self.config.feedback.schedule[self.epoch])
        self.train_loss = total / batches
        if self.patch is None:  # else the watch records it
            recorder.add(self.step, self.epoch, "learning_rate", rate)
        recorder.add(self.step, self.epoch, "train_loss", self.train_loss)
        recorder.add(self.step, self.epoch, "train_error", 100 * wrong / (batches * size))

    def _train_step(self, index: Tensor, recorder: Recorder, last: bool) -> tuple[float, float]:
        """One update: the mean loss over the mini-batch, and how many images were classified wrong."""
        team, train_set, shares = self.team, self.data.train, self.team.shares(len(index))
        # Every process augments the whole mini-batch, so that all images are those of one process.
        augmented = None if self.augment is None else self.augment(train_set.images[index])
        total, wrong = 0.0, 0.0
        self.optimizer.zero_grad()
        for share in shares:
            if augmented is None:
                x, y = self.data.batch(train_set, index[share], self.device)
            else:
                x, y = augmented[share].to(self.device), train_set.labels[index[share]].to(self.device)
            with team.part(last=share is shares[-1]):
                logits = team.forward(x)
                loss = F.cross_entropy(logits, y)
                summed, missed = team.total(loss.item(), int((logits.argmax(1) != y).sum()))
                total += _finite("train_loss", summed / team.count)
                wrong += missed
                self._measure_gradients(loss, recorder, last)
                team.backward(loss * len(index) if self.config.protocol.reduction == "sum" else loss)
        self.optimizer.step()
        self.step += 1
        return total / len(shares), wrong

    def _measure_gradients(self, loss: Tensor, recorder: Recorder, last: bool) -> None:
        """The angle between the gradients of this step and backprop's, where it is due, and in the last."""
        every = self.config.record.gradient_angle_every
        if self.patch is None or not every or (self.step % every and not last):
            return
        for row in feedbackhook.measure(self.patch, loss, group=self.team.group):
            if row.metric == "gradient_angle":
                recorder.add(self.step, self.epoch, row.metric, row.value, row.layer, row.depth)

    def _evaluate(self, recorder: Recorder, progress: Callable[[Progress], None]) -> None:
        """Loss and error on what is held out and on the test set, and after the last epoch how V compares
        with W in each layer."""
        p, result = self.config.protocol, self.result
        with self.team.autocast():
            estimate_statistics(self.model, self._statistics_batches())
        if self.data.val is not None:
            loss, error = self._loss_and_error(self.data.val)
            recorder.add(self.step, self.epoch, "val_loss", _finite("val_loss", loss))
            recorder.add(self.step, self.epoch, "val_error", error)
        loss, error = self._loss_and_error(self.data.test)
        recorder.add(self.step, self.epoch, "test_loss", _finite("test_loss", loss))
        recorder.add(self.step, self.epoch, "test_error", error)
        recorder.add(self.step, self.epoch, "test_accuracy", 100 - error)
        result.last_error = error
        if result.best_error is None or self.epoch == 1 or error < result.best_error:
            result.best_error, result.best_epoch = error, self.epoch
        if self.patch is not None and self.epoch == p.epochs:
            for row in feedbackhook.measure(self.patch):
                recorder.add(self.step, self.epoch, row.metric, row.value, row.layer, row.depth)
        batches = len(self.data.train.labels) // self._batch_size()
        progress(Progress(self.epoch, p.epochs, batches, batches, self.train_loss, error))

    def _batch_size(self) -> int:
        """Images a mini-batch in the epoch that runs."""
        p = self.config.protocol
        changed = [epoch for epoch in p.batch_sizes if epoch < self.epoch]
        return p.batch_sizes[max(changed)] if changed else p.batch_size

    def _statistics_batches(self) -> Iterator[Tensor]:
        """The same mini-batches of the training set each time, whatever the state of the data's order."""
        size, count = self._batch_size(), len(self.data.train.labels)
        generator = torch.Generator().manual_seed(self.config.protocol.seed)
        passes = (data.minibatches(count, size, generator) for _ in itertools.count())
        for index in itertools.islice(itertools.chain.from_iterable(passes), _STATISTICS_BATCHES):
            yield self.data.batch(self.data.train, index, self.device)[0]

    @torch.no_grad()
    def _loss_and_error(self, split: Split) -> tuple[float, float]:
        """Mean loss and error in percent."""
        self.model.eval()
        count = len(split.labels)
        loss, wrong = 0.0, 0.0
        for start in range(0, count, _EVALUATION_BATCH):
            share, counted = self.team.portion(start, min(start + _EVALUATION_BATCH, count))
            x, y = self.data.batch(split, share, self.device)
            logits, y = self.team.forward(x)[:counted], y[:counted]
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            wrong += int((logits.argmax(1) != y).sum())
            self.touch()
        loss, wrong = self.team.total(loss, wrong)
        return loss / count, 100 * wrong / count

    def _save(self, folder: RunFolder, recorder: Recorder) -> None:
        """Keep the epoch: rows before the checkpoint, since a resumed run drops the rows that follow it."""
        result = self.result
        recorder.flush()
        model, optimizer = self.team.states(self.model, self.optimizer)
        keep = self.config.record.weights
        if result.best_epoch == self.epoch and keep != "none":
            folder.write_weights(model, "best")
        if keep == "all":
            folder.write_weights(model, "last")
        cuda = self.device.type == "cuda"
        folder.write_checkpoint(
            {
                "epoch": self.epoch,
                "step": self.step,
                "model": model,
                "optimizer": optimizer,
                "lr_schedule": self.lr_schedule.state_dict(),
                "patch": self.patch.state_dict() if self.patch is not None else None,
                "order": self.order.get_state(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
                "errors": (result.last_error, result.best_error, result.best_epoch),
            }
        )
        result.epoch, result.step = self.epoch, self.step  # the status does not run ahead of the checkpoint
        folder.write_result(result)

    def _restore(self, state: dict[str, Any]) -> None:
        result = self.result
        result.epoch = self.epoch = state["epoch"]
        result.step = self.step = state["step"]
        result.last_error, result.best_error, result.best_epoch = state["errors"]
        self.team.restore(self.model, self.optimizer, state["model"], state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.patch is not None:
            self.patch.load_state_dict(state["patch"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        logger.info("going on with %s after epoch %d", result.folder, self.epoch)


def _recorder(folder: RunFolder, config: RunConfig) -> Recorder:
    """The folder's recorder; a process that is just ending may keep it for a moment longer."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return Recorder(folder.path, tensorboard=config.record.tensorboard)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise FolderInUse(str(error)) from error
            time.sleep(0.1)


def _finite(metric: str, value: float) -> float:
    if not math.isfinite(value):
        raise Diverged(metric, value)
    return value


@contextmanager
def _one_clear_error() -> Iterator[None]:
    """What cannot be built as configured, whoever finds it out, is the configuration's error."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _random_state(seed: int, device: str) -> Iterator[None]:
    """Torch's global generators seeded within the block, and as they were after it."""
    cuda = torch.device(device)
    with torch.random.fork_rng(devices=[cuda] if cuda.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _draw(folder: RunFolder) -> None:
    """The figures of a run, from its table alone: those for which it has a finite value."""
    plots.draw_all(read(folder.path), folder.path / "figures")
