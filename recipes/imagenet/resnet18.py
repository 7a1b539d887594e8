"""Does sign-symmetry train a ResNet-18 on ImageNet as far as backprop does, and feedback alignment not?

Xiao, Chen, Liao and Poggio (ICLR 2019, arXiv 1811.03567) send the error signals of a ResNet-18 through
V = s sign(W), with a scale s for each layer and the last layer exact. This trains it by the settings of
their public code, from an ordinary folder of images, under that rule, backprop, feedback alignment or any
rule of feedbackhook, on one device or on several under torchrun. After each epoch it records top-1 and top-5
error and keeps a checkpoint; after an interruption the same command goes on. The README beside it has the
protocol, its sources, published figures and the cost. ROOT holds train/CLASS/IMAGE and val/CLASS/IMAGE.

    python recipes/imagenet/resnet18.py --root ROOT
    python recipes/imagenet/resnet18.py --root ROOT --rule backprop
    torchrun --nproc-per-node 4 recipes/imagenet/resnet18.py --root ROOT --bf16 true
    python recipes/imagenet/resnet18.py --dry_run true    # hours and disk of the full run, on this device
    python recipes/imagenet/resnet18.py --smoke true      # two epochs on made images: seconds
"""

from __future__ import annotations

import io
import math
import os
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from jsonargparse import auto_cli
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

import feedbackhook
from feedbackhook.store.atomic import atomic_write

IMAGENET = {"train": 1_281_167, "val": 50_000, "classes": 1000}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, as torchvision has them


# --- the rules --------------------------------------------------------------------------------------------


def scale_of(shape: Sequence[int]) -> float:
    """s of a weight of this shape, which is [out, in] (linear) or [out, in / groups, *k] (convolution).

    sqrt(2 / (prod(k) out)) for a convolution, 1 / sqrt(in) for a linear layer: the first is the standard
    deviation, the second the bound, of what torchvision's ResNet and PyTorch's linear layer start from.
    """
    if len(shape) == 2:
        return 1 / math.sqrt(shape[1])
    return math.sqrt(2 / (math.prod(shape[2:]) * shape[0]))


class _Scaled:
    """What the two rules share."""

    def check(self, layers: Sequence[feedbackhook.LayerInfo]) -> None:
        """Raises ValueError for a layer to which the paper gives no scale."""
        for layer in layers:
            if layer.kind.startswith("ConvTranspose"):
                raise ValueError(
                    f"{layer.name!r} is a {layer.kind}, to which the paper gives no scale: exclude it"
                )


@feedbackhook.register_rule("sign-symmetry")
@dataclass(frozen=True)
class SignSymmetry(_Scaled):
    """V = s sign(W), the sign that of today's W (Xiao et al. 2019)."""

    def draw(self, weight: Tensor, rng: feedbackhook.CounterRNG) -> dict[str, Tensor]:
        return {}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.sign(weight).mul_(scale_of(weight.shape))


@feedbackhook.register_rule("feedback-alignment")
@dataclass(frozen=True)
class FeedbackAlignment(_Scaled):
    """V random, independent of W and fixed: from N(0, s^2) for convolutions, from U[-s, s] for linear layers
    (Lillicrap et al. 2016, on the scales that the code of Xiao et al. gives it)."""

    def draw(self, weight: Tensor, rng: feedbackhook.CounterRNG) -> dict[str, Tensor]:
        v = rng.uniform(weight).mul_(2).sub_(1) if weight.dim() == 2 else rng.normal(weight)
        return {"V": v.mul_(scale_of(weight.shape)).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["V"]


def build(
    model: str, classes: int, rule: str, options: Mapping[str, Any], last_layer_exact: bool, seed: int
) -> tuple[nn.Module, feedbackhook.Patch | None]:
    """One of torchvision's networks, and the patch on it; none for the rule "backprop"."""
    if rule == "backprop" and options:
        raise ValueError(f"backprop has no options, and there are: {', '.join(options)}")
    torch.manual_seed(seed)
    network = torchvision.models.get_model(model, weights=None, num_classes=classes)
    if rule == "backprop":
        return network, None
    exclude = feedbackhook.classifier(network) if last_layer_exact else None
    return network, feedbackhook.patch(network, rule, exclude=exclude, seed=seed, **options)


# --- the images -------------------------------------------------------------------------------------------


def image_folders(root: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """`root`/train, augmented, and `root`/val as the protocol prepares them; files are read when needed.

    Raises:
        FileNotFoundError: a folder is missing, or a class has no image.
        ValueError: images that lie in no class folder, or classes of train and val that differ.
    """
    augment = (transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip())
    centre = (transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size))
    folders = []
    for split, crop in (("train", augment), ("val", centre)):
        _check_folder(root / split)
        prepare = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        try:
            folders.append(ImageFolder(str(root / split), prepare, loader=load_image))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root / split}: {error}") from error
    train, test = folders
    for there, here in ((train, test), (test, train)):
        if missing := sorted({*there.classes} - {*here.classes}):
            raise ValueError(
                f"the classes of train and val differ: {here.root} lacks the folders of {len(missing)} "
                f"classes that {there.root} has: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
            )
    return train, test


def _check_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError unless `folder` holds class folders and no image beside them."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: --root names the folder that holds train/CLASS/IMAGE and "
            "val/CLASS/IMAGE"
        )
    entries = list(folder.iterdir())
    loose = sum(entry.suffix.lower() in IMG_EXTENSIONS for entry in entries)
    archives = sum(entry.suffix.lower() == ".tar" for entry in entries)
    if loose and folder.name == "val":
        sort = f"import torchvision; torchvision.datasets.ImageNet('{folder.parent}', 'val')"
        raise ValueError(
            f"{loose} images lie in {folder} itself, and each must lie in the folder of its class, as in "
            f"{folder}/n01440764. The archive has them flat, and torchvision sorts them: move this folder "
            f"away, put ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into {folder.parent}, "
            f'and run python -c "{sort}"'
        )
    if loose:
        raise ValueError(f"{loose} images lie in {folder} itself; each must lie in the folder of its class")
    if archives:
        raise ValueError(f"{archives} archives (.tar) lie in {folder}: unpack each into a folder of its name")
    if not any(entry.is_dir() for entry in entries):
        raise FileNotFoundError(f"{folder} holds no class folders")


def load_image(path: str) -> Image.Image:
    """An image in RGB.

    Raises:
        OSError: it cannot be read; the error names the file.
    """
    try:
        return default_loader(path)
    except OSError as error:
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def make_images(root: Path, classes: int = 3, train: int = 16, test: int = 8) -> None:
    """Noise on a colour for each class, 64 x 80 pixels, in the shape of an ImageNet folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 128, (64, 80, 3)) + 127 * (np.arange(3) == label % 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.JPEG")


# --- training ---------------------------------------------------------------------------------------------


def seed_of(seed: int, epoch: int, process: int) -> int:
    """The seed of an epoch's augmentation in one process: a checkpoint need hold no random state."""
    return int(np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)[0] >> 1)


def train_epoch(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Iterator[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """One pass; the mean loss and the top-1 error in percent over it, of all processes."""
    model.train()
    total = torch.zeros(
        3, device=accelerator.device
    )  # loss, wrong, images: whole numbers up to 2^24 are exact
    for x, y in batches:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        wrong = (logits.detach().argmax(1) != y).sum()
        total += torch.stack([loss.detach() * len(y), wrong, torch.ones_like(wrong) * len(y)])
    loss_sum, wrong_sum, images = accelerator.reduce(total, "sum").tolist()
    return {"train_loss": loss_sum / images, "train_error": 100 * wrong_sum / images}


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Mean loss, and top-1 and top-5 error in percent: of five classes or fewer, all are the top 5."""
    model.eval()
    total, images = torch.zeros(3, device=accelerator.device), 0
    for x, y in batches:
        logits = model(x)
        hit = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="none")
        rows = torch.stack([loss, ~hit[:, 0], ~hit.any(1)], dim=1)
        rows = accelerator.gather_for_metrics(rows)  # without those that fill up the last batch
        total += rows.sum(0)
        images += len(rows)
    loss_sum, wrong, wrong_of_five = total.tolist()
    return {
        "test_loss": loss_sum / images,
        "test_error": 100 * wrong / images,
        "test_accuracy": 100 * (1 - wrong / images),
        "test_error_top5": 100 * wrong_of_five / images,
    }


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Written to a temporary file, then renamed: a killed process leaves the old checkpoint or the new."""
    with atomic_write(path) as temporary:
        torch.save(dict(state), temporary)


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint with which a run goes on; None where there is none.

    Raises:
        ValueError: it is of a run with other settings, or damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"{path} is damaged ({reason}): give another --output, or remove it") from error
    others = [name for name in settings if settings[name] != saved.get(name)]
    if others:
        shown = ", ".join(
            f"{name} {_short(saved.get(name))}, not {_short(settings[name])}" for name in others
        )
        raise ValueError(f"{path} is of a run with {shown}: give another --output")
    return state


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _made_folder(accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder with made images, the same for all processes."""
    with tempfile.TemporaryDirectory() as folder:
        shared = broadcast_object_list([folder])
        if accelerator.is_main_process:
            make_images(Path(folder))
        accelerator.wait_for_everyone()
        yield Path(shared[0])
        accelerator.wait_for_everyone()


def main(
    root: Path = Path("imagenet"),
    rule: str = "sign-symmetry",
    options: dict[str, Any] | None = None,
    last_layer_exact: bool = True,
    model: str = "resnet18",
    epochs: int = 50,
    batch_size: int = 256,
    lr: float = 0.1,
    lr_step: int = 10,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    size: int = 224,
    seed: int = 0,
    watch_every: int = 500,
    workers: int = 8,
    bf16: bool = False,
    cpu: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
    steps: int = 20,
    smoke: bool = False,
) -> None:
    """Train, or say what training would cost.

    Args:
        root: the folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE.
        rule: "sign-symmetry" or "feedback-alignment", as the paper's code has them, "backprop", or one of
            feedbackhook's: "sign", "random", "uSF", "brSF", ...
        options: the rule's options, as in `--rule sign --options.concordance 0.8`.
        last_layer_exact: leave the classifier with exact backprop.
        model: a classification network of torchvision.
        epochs: passes over the training images.
        batch_size: images in a step of all processes together.
        lr: SGD's learning rate in the first epochs.
        lr_step: epochs after which it is divided by ten, again and again.
        momentum: SGD's.
        weight_decay: SGD's, on all parameters.
        size: pixels; test images are resized to 256 / 224 of it, and the centre is cut out.
        seed: of the initial weights, of the order and augmentation of images, and of random feedback.
        watch_every: steps from one in which each layer's alignment is measured to the next.
        workers: processes that read images, for each training process.
        bf16: mixed precision: bfloat16 where autocast allows it, weights in float32.
        cpu: train on the CPU though there is a GPU.
        output: the run folder; by default runs/imagenet/RULE-seedSEED.
        dry_run: train a few steps on random images, and print hours and disk of the whole run.
        steps: steps that the dry run times.
        smoke: two epochs on made images in a temporary folder, to see that it works: seconds.
    """
    given = dict(locals())
    for name in ("epochs", "batch_size", "lr_step", "size", "watch_every", "steps"):
        if given[name] < 1:
            raise ValueError(f"--{name} must be 1 or more, not {given[name]}")
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {seed}")
    accelerator = Accelerator(
        cpu=cpu or not torch.accelerator.is_available(),  # else it would leave CPU processes to themselves
        mixed_precision="bf16" if bf16 else "no",
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=seed_of(seed, 0, 0)
        ),
    )
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"{started} processes were started, and Accelerate sees {accelerator.num_processes}"
        )
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch_size {batch_size} is no multiple of the {accelerator.num_processes} processes"
        )
    given["options"] = dict(options or {})
    given["output"] = output or Path("runs/imagenet") / f"{rule}-seed{seed}"
    given = {name: value for name, value in given.items() if name not in ("dry_run", "steps", "smoke")}
    if dry_run:
        estimate(accelerator, steps=steps, **given)
    elif smoke:
        with _made_folder(accelerator) as folder:
            small = {"epochs": 2, "batch_size": 8, "size": 32, "lr": 0.01, "watch_every": 1, "workers": 0}
            run(accelerator, **{**given, **small, "root": folder, "output": folder / "run"})
    else:
        run(accelerator, **given)
    accelerator.end_training()


def run(accelerator: Accelerator, **given: Any) -> None:
    """Train from the run folder's checkpoint, or from the start, to the end. The options are `main`'s."""
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    output, seed, epochs = Path(given["output"]), given["seed"], given["epochs"]
    train, test = image_folders(Path(given["root"]), given["size"])
    if len(train) < given["batch_size"]:
        raise ValueError(
            f"a batch of {given['batch_size']} is more than the {len(train)} images in {train.root}"
        )
    decisive = (
        "rule options last_layer_exact model batch_size lr lr_step momentum weight_decay size seed bf16"
    )
    settings = {name: given[name] for name in decisive.split()}
    settings |= {"images": len(train), "classes": train.classes}
    checkpoint = load(output / "checkpoint.pt", settings)
    done = checkpoint["epoch"] if checkpoint else 0
    if checkpoint and done >= epochs:
        console.print(f"{output} is finished: {_shown(checkpoint['metrics'])} after epoch {done}")
        return

    kind = ("model", "rule", "options", "last_layer_exact", "seed")
    network, patch = build(classes=len(train.classes), **{name: given[name] for name in kind})
    network.to(accelerator.device)
    optimizer = torch.optim.SGD(
        network.parameters(), given["lr"], momentum=given["momentum"], weight_decay=given["weight_decay"]
    )
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if patch:
            patch.load_state_dict(checkpoint["patch"])
    reading = {"num_workers": given["workers"], "pin_memory": accelerator.device.type == "cuda"}
    model, stepper, train_batches, test_batches = accelerator.prepare(
        network,
        optimizer,
        DataLoader(train, given["batch_size"], shuffle=True, drop_last=True, **reading),
        DataLoader(test, given["batch_size"], **reading),
    )
    steps = len(train_batches)

    with feedbackhook.Recorder(output) as recorder:
        recorder.drop_after(done * steps if checkpoint else -1, done)
        if accelerator.is_main_process:
            kept = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
            (output / "settings.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
        if patch:
            patch.watch(given["watch_every"], recorder, step=done * steps)
        console.print(
            f"{output}: {given['rule']}, {len(train):,} training and {len(test):,} test images of "
            f"{len(train.classes)} classes, {accelerator.num_processes} x {accelerator.device.type}"
            + (f", going on after epoch {done}" if checkpoint else "")
        )
        for epoch in range(done + 1, epochs + 1):
            for group in optimizer.param_groups:
                group["lr"] = given["lr"] * 0.1 ** ((epoch - 1) // given["lr_step"])
            recorder.epoch = epoch
            train_batches.set_epoch(epoch)
            torch.manual_seed(seed_of(seed, epoch, accelerator.process_index))
            began = time.perf_counter()
            metrics = train_epoch(accelerator, model, stepper, _bar(console, train_batches, f"epoch {epoch}"))
            rate = steps * given["batch_size"] / (time.perf_counter() - began)
            if math.isfinite(metrics["train_loss"]):
                metrics |= evaluate(accelerator, model, _bar(console, test_batches, "test"))
            metrics |= {"images_per_second": rate}
            if patch is None:  # else the watch records it
                metrics |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            for name, value in metrics.items():
                recorder.add(epoch * steps, epoch, name, value)
            recorder.flush()  # before the checkpoint: a run that goes on drops the rows that follow it
            for name in ("train_loss", "test_loss"):
                if not math.isfinite(metrics[name]):
                    raise FloatingPointError(
                        f"{name} is {metrics[name]} in epoch {epoch}: this run diverges; try a smaller --lr"
                    )
            if accelerator.is_main_process:
                state = {
                    "settings": settings,
                    "epoch": epoch,
                    "metrics": metrics,
                    "model": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "patch": patch.state_dict() if patch else None,
                }
                save(output / "checkpoint.pt", state)
            console.print(
                f"epoch {epoch}/{epochs}: train loss {metrics['train_loss']:.3f}, {_shown(metrics)}, "
                f"{rate:.0f} images/s"
            )
    if patch:
        console.print(str(patch), highlight=False)
        patch.remove()


def _bar(console: Console, batches: DataLoader, what: str) -> Iterator[Any]:
    return track(
        batches,
        what,
        total=len(batches),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )


def _shown(metrics: Mapping[str, float]) -> str:
    return f"test error {metrics['test_error']:.2f} % (top 5: {metrics['test_error_top5']:.2f} %)"


# --- the cost ---------------------------------------------------------------------------------------------


def estimate(accelerator: Accelerator, steps: int, **given: Any) -> None:
    """Time some steps on random images, and print what the whole run would take. The options are `main`'s."""
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    root, size, epochs, batch = Path(given["root"]), given["size"], given["epochs"], given["batch_size"]
    counts, reading = IMAGENET, f"Reading files was not measured: there is no folder {root}."
    if root.exists():
        train, test = image_folders(root, size)
        counts = {"train": len(train), "val": len(test), "classes": len(train.classes)}
        chosen = np.random.default_rng(0).integers(len(train), size=64).tolist()
        _, seconds = _timed(lambda: [train[index] for index in chosen])
        reading = (
            f"One process reads and augments {len(chosen) / seconds:.0f} images/s of {root}; "
            f"--workers {given['workers']}."
        )

    kind = ("model", "rule", "options", "last_layer_exact", "seed")
    network, patch = build(classes=counts["classes"], **{name: given[name] for name in kind})
    network.to(accelerator.device)
    optimizer = torch.optim.SGD(
        network.parameters(), given["lr"], momentum=given["momentum"], weight_decay=given["weight_decay"]
    )
    model, stepper = accelerator.prepare(network, optimizer)
    share = batch // accelerator.num_processes
    x = torch.randn(share, 3, size, size, device=accelerator.device)
    y = torch.randint(counts["classes"], (share,), device=accelerator.device)

    with FlopCounterMode(display=False) as counter:
        train_epoch(accelerator, model, stepper, iter([(x, y)]))
    flops = counter.get_total_flops() / share
    train_epoch(accelerator, model, stepper, iter([(x, y)] * 2))  # warm
    _, train_seconds = _timed(lambda: train_epoch(accelerator, model, stepper, iter([(x, y)] * steps)))
    evaluate(accelerator, model, iter([(x, y)]))
    _, test_seconds = _timed(lambda: evaluate(accelerator, model, iter([(x, y)] * steps)))
    rate, test_rate = steps * batch / train_seconds, steps * batch / test_seconds
    trained = counts["train"] // batch * batch * epochs
    hours = (trained / rate + counts["val"] * epochs / test_rate) / 3600

    buffer = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    watched = math.ceil(trained / batch / given["watch_every"]) if patch else 0
    table_bytes = (
        watched * _bytes_of_a_watched_step(accelerator, model, stepper, patch, (x, y)) if patch else 0
    )

    processes, device = accelerator.num_processes, accelerator.device.type
    table = Table(
        title=f"{given['model']} under {given['rule']}, {size} pixels", box=box.SIMPLE, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    table.add_column(f"{processes} x {device}", justify="right", no_wrap=True)
    for name, value in (
        ("timed steps", f"{steps} of {batch} images"),
        ("a training step", f"{1000 * train_seconds / steps:.0f} ms"),
        ("training", f"{rate:.1f} images/s"),
        ("testing", f"{test_rate:.1f} images/s"),
        ("counted", f"{flops / 1e9:.2f} GFLOP an image, both ways"),
        ("sustained", f"{flops * rate / processes / 1e12:.3f} TFLOP/s a device"),
        ("the run", f"{epochs} x ({counts['train']:,} + {counts['val']:,}) images"),
        ("time", f"{hours:,.1f} hours"),
        ("GPU hours" if device == "cuda" else "device hours", f"{hours * processes:,.1f}"),
        ("checkpoint", f"{buffer.tell() / 1e6:.1f} MB, twice while it is written"),
        ("table", f"{table_bytes / 1e6:.1f} MB"),
    ):
        table.add_row(name, value)
    if device == "cuda":
        table.add_row("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB a device")
    console.print(table)
    console.print(f"The time is that of the timed steps, on random images in memory. {reading}")
    console.print("Training waits for its readers unless together they read as fast as it trains.")


def _timed(work: Any) -> tuple[Any, float]:
    """What `work()` gives, and its seconds, those included that a GPU is still busy after it."""
    began = time.perf_counter()
    result = work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result, time.perf_counter() - began


def _bytes_of_a_watched_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, patch: feedbackhook.Patch, batch: Any
) -> int:
    """The size of the file in which one watched step's rows lie, as they do where steps are slow."""
    with tempfile.TemporaryDirectory() as folder:
        with feedbackhook.Recorder(folder) as recorder:
            watch = patch.watch(1, recorder)
            train_epoch(accelerator, model, optimizer, iter([batch]))
            watch.remove()
        return sum(part.stat().st_size for part in Path(folder).rglob("*.parquet"))


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # the sizes do not change
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
