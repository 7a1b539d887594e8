"""The options of resnet18.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Train, or estimate what training would cost.

    Args:
        root: Folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE.
        rule: "sign-symmetry" or "feedback-alignment" as in the paper's code, "backprop", or a rule of
            feedbackhook: "sign", "random", "uSF", "brSF", ...
        options: Options of the rule, as in `--rule sign --options.concordance 0.8`.
        last_layer_exact: Keep exact backprop in the classifier.
        model: Classification network of torchvision.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes.
        lr: SGD's initial learning rate.
        lr_step: Divide the learning rate by ten every so many epochs.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay, for all parameters.
        size: Image size in pixels; test images are resized to 256 / 224 of it and center-cropped.
        seed: Seed of the initial weights, of the order and augmentation of images, and of random feedback.
        watch_every: Measure each layer's alignment every so many steps.
        workers: Processes that read images, per training process.
        bf16: Use mixed precision: bfloat16 where autocast allows it, weights in float32.
        cpu: Train on the CPU even if there is a GPU.
        output: Run folder (default: runs/imagenet/RULE-seedSEED).
        dry_run: Train a few steps on random images, and print the time and disk space of the whole run.
        steps: Steps that the dry run times.
        smoke: Train for two epochs on generated images to check that it works (seconds).
    """

    root: Path = Path("imagenet")
    rule: str = "sign-symmetry"
    options: dict[str, Any] | None = None
    last_layer_exact: bool = True
    model: str = "resnet18"
    epochs: int = 50
    batch_size: int = 256
    lr: float = 0.1
    lr_step: int = 10
    momentum: float = 0.9
    weight_decay: float = 1e-4
    size: int = 224
    seed: int = 0
    watch_every: int = 500
    workers: int = 8
    bf16: bool = False
    cpu: bool = False
    output: Path | None = None
    dry_run: bool = False
    steps: int = 20
    smoke: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if a number is too small."""
        for name in ("epochs", "batch_size", "lr_step", "size", "watch_every", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {self.seed}")


def run_folder(settings: Settings) -> Path:
    """Return the run folder."""
    return settings.output or Path("runs/imagenet") / f"{settings.rule}-seed{settings.seed}"


def saved_options(settings: Settings) -> dict[str, Any]:
    """Return the options to save in the run folder; `--config` reads them."""
    saved = {**asdict(settings), "options": settings.options or {}, "output": run_folder(settings)}
    for name in ("dry_run", "steps", "smoke"):
        del saved[name]
    return {name: str(value) if isinstance(value, Path) else value for name, value in saved.items()}


def fixed_options(settings: Settings) -> dict[str, Any]:
    """Return the options that may not change when a run is resumed."""
    names = "rule options last_layer_exact model batch_size lr lr_step momentum weight_decay size seed bf16"
    return {name: saved_options(settings)[name] for name in names.split()}
