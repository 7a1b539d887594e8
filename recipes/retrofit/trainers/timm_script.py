"""I train with timm's own train.py; where does the one line go?

In your copy of the script, right after the model is made, and so before EMA, DistributedDataParallel and
torch.compile, which all take the model as it is:

    model = create_model(args.model, ...)
    feedbackhook.patch(model, "sign", concordance=0.75)  # the one line

Or leave your copy as it is, and let this recipe run it: it patches the first model that `timm.create_model`
makes and passes on whatever stands behind `--`. The script is not in timm's package, but in its repository
(huggingface/pytorch-image-models, train.py); take that of your version of timm.

    python recipes/retrofit/trainers/timm_script.py --script train.py -- PATH --model resnet18 --epochs 10
    python recipes/retrofit/trainers/timm_script.py --script train.py --digits digits -- --model resnet10t
    torchrun --nproc-per-node 2 recipes/retrofit/trainers/timm_script.py --script train.py -- PATH
    python recipes/retrofit/trainers/timm_script.py --script train.py --smoke true

`--digits` writes scikit-learn's digits as image files, so that nothing is downloaded. The script's options:

- `--amp`, `--grad-checkpointing`, `--grad-accum-steps` and `--channels-last` work as without a patch.
- `--model-ema`: the average is a copy of the patched model, V's random parts included, which takes memory.
  It is never trained.
- torchrun: every process patches its model before it is wrapped; names and seed give all of them the same V.
- `--torchcompile`: error signals go through V, but compiled code counts no calls, and the table says 0.
- `--resume`: the script's checkpoints know nothing of the patch. V is the same again under all rules but
  those that draw after each update, such as brSF, whose draws begin anew.
- `--torchscript` does not work, since a scripted model cannot be patched; this recipe refuses it.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from summary import summarise

import feedbackhook


@contextmanager
def patching_models(feedback: dict[str, Any]) -> Iterator[list[feedbackhook.Patch]]:
    """Within it the first model that `timm.create_model` makes is patched. Further ones, as the teacher in
    distillation, are not. Yields a list that holds the patch then."""
    import timm

    original = timm.models.create_model
    made: list[feedbackhook.Patch] = []

    @functools.wraps(original)
    def create_model(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = original(*args, **kwargs)
        if not made:
            made.append(feedbackhook.patch(model, **feedback))  # the one line
        return model

    timm.create_model = timm.models.create_model = create_model
    try:
        yield made
    finally:
        timm.create_model = timm.models.create_model = original


def run(script: Path, arguments: list[str], feedback: dict[str, Any]) -> feedbackhook.Patch:
    """Runs the script as `python SCRIPT ARGUMENTS` would; returns the patch on its model."""
    if not script.is_file():
        raise SystemExit(f"--script: there is no file {str(script)!r}; timm's train.py is in its repository")
    if "--torchscript" in arguments:
        raise SystemExit("--torchscript: a scripted model cannot be patched; leave the option out")
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # a checkout's own timm lies beside its train.py
    try:
        with patching_models(feedback) as made:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    if not made:
        raise SystemExit(f"{script} made no model by timm.create_model, so nothing was patched")
    return made[0]


def write_digits(folder: Path, size: int = 32, limit: int | None = None) -> None:
    """scikit-learn's digits as images of size x size pixels, in `folder/train/CLASS` and, every fifth, in
    `folder/validation/CLASS`; the first `limit` alone, if that is given."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images[:limit], found.target[:limit], strict=True)):
        file = folder / ("train" if number % 5 else "validation") / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).resize((size, size)).save(file)


def training_losses(summary: Path) -> list[float]:
    """Those of each epoch, of the last of the runs of which the script has written rows below one another."""
    with summary.open() as file:
        rows = [row["train_loss"] for row in csv.DictReader(file)]
    begun = max((row for row, text in enumerate(rows, 1) if text == "train_loss"), default=0)
    return [float(text) for text in rows[begun:]]


def main(
    script: Path,
    arguments: list[str] | None = None,
    feedback: dict[str, Any] | None = None,
    digits: Path | None = None,
    output: Path = Path("runs/timm"),
    smoke: bool = False,
) -> None:
    """Run the script with a patched model, print.

    Args:
        script: your copy of timm's train.py.
        arguments: the script's arguments; on the command line they stand behind `--`.
        feedback: the arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        digits: write scikit-learn's digits into this folder as images, and have the script train on them.
        output: the folder that the script writes into.
        smoke: one short epoch on a few digits, to see that it works: seconds.
    """
    console = Console(soft_wrap=True, width=200)  # no name in the table is cut
    options: dict[str, Any] = {"output": output.parent, "experiment": output.name}
    if smoke:
        digits = digits or output / "digits"
        options |= {"model": "resnet10t", "batch-size": 16, "epochs": 1, "warmup-epochs": 0, "workers": 0}
        if not torch.cuda.is_available():  # as a file, since older scripts have no option for it
            output.mkdir(parents=True, exist_ok=True)
            (output / "cpu.yaml").write_text("device: cpu\n")
            options["config"] = output / "cpu.yaml"
    if digits is not None:
        write_digits(digits, limit=100 if smoke else None)
        options |= {"data-dir": digits, "num-classes": 10, "img-size": 32}
    given = [f"--{name}={value}" for name, value in options.items()]
    patch = run(script, [*given, *(arguments or [])], feedback or {})
    if int(os.environ.get("RANK", "0")) > 0:
        return
    summary = output / "summary.csv"
    if not summary.is_file():
        raise SystemExit(f"the script wrote no {summary}: leave --output and --experiment to this recipe")
    summarise(console, patch, training_losses(summary))


def cli(argv: list[str]) -> None:
    """This recipe's options stand before `--`, the script's behind it."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, passed = argv[:end], argv[end + 1 :]
    if passed:
        own = [*own, f"--arguments={json.dumps(passed)}"]
    yaml = str(Path(__file__).with_suffix(".yaml"))
    auto_cli(main, args=own, as_positional=False, default_config_files=[yaml])


if __name__ == "__main__":
    cli(sys.argv[1:])
