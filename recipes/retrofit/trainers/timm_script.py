"""I train with timm's own train.py; where does the one line go?

In your copy of the script, right after the model is created, and so before EMA, DistributedDataParallel and
torch.compile use it:

    model = create_model(args.model, ...)
    feedbackhook.patch(model, "sign", concordance=0.75)  # the one line

Or let this recipe run your unchanged copy: it patches the first model that `timm.create_model` returns and
passes the options after `--` to the script. The script is not in timm's package but in its repository
(huggingface/pytorch-image-models, train.py); use the one for your version of timm.

    python recipes/retrofit/trainers/timm_script.py --script train.py -- PATH --model resnet18 --epochs 10
    python recipes/retrofit/trainers/timm_script.py --script train.py --digits digits -- --model resnet10t
    torchrun --nproc-per-node 2 recipes/retrofit/trainers/timm_script.py --script train.py -- PATH
    python recipes/retrofit/trainers/timm_script.py --script train.py --smoke true

`--digits` writes scikit-learn's digits as image files, so that nothing is downloaded. Notes on the script's
options:

- `--amp`, `--grad-checkpointing`, `--grad-accum-steps` and `--channels-last` work as they do without a patch.
- `--model-ema`: the average is a copy of the patched model. It is never trained, but the random parts of its
  V take memory.
- torchrun: each process patches its model before it is wrapped; layer names and seed give all the same V.
- `--torchcompile`: error signals pass through V, but compiled code counts no calls, so the table shows 0.
- `--resume`: the script's checkpoints do not save the patch. V is the same after a resume, except for rules
  that redraw V after each update, such as brSF, which start their draws again.
- `--torchscript` does not work, because a scripted model cannot be patched; this recipe raises an error.
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
from shared import make_console, summarize

import feedbackhook


@contextmanager
def patching_models(feedback: dict[str, Any]) -> Iterator[list[feedbackhook.Patch]]:
    """Patch the first model that `timm.create_model` returns within the block.

    Later ones, such as the teacher in distillation, are not patched. Yields a list, to which the patch is
    added.
    """
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
    """Run the script as `python SCRIPT ARGUMENTS` would; return the patch on its model."""
    if not script.is_file():
        raise SystemExit(f"--script: there is no file {str(script)!r}; get train.py from timm's repository")
    if "--torchscript" in arguments:
        raise SystemExit("--torchscript: a scripted model cannot be patched; remove this option")
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # a checkout has its own timm beside train.py
    try:
        with patching_models(feedback) as made:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    if not made:
        raise SystemExit(f"{script} did not call timm.create_model, so nothing was patched")
    return made[0]


def write_digits(folder: Path, size: int = 32, limit: int | None = None) -> None:
    """Write scikit-learn's digits as images of size x size pixels.

    Every fifth goes to `folder/validation/CLASS`, the others to `folder/train/CLASS`. If `limit` is given,
    only the first `limit` are written.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images[:limit], found.target[:limit], strict=True)):
        file = folder / ("train" if number % 5 else "validation") / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).resize((size, size)).save(file)


def training_losses(summary: Path) -> list[float]:
    """Return the loss of each epoch of the last run; the script appends each run's rows to the same file."""
    with summary.open() as file:
        rows = [row["train_loss"] for row in csv.DictReader(file)]
    start = max((row for row, text in enumerate(rows, 1) if text == "train_loss"), default=0)
    return [float(text) for text in rows[start:]]


def main(
    script: Path,
    arguments: list[str] | None = None,
    feedback: dict[str, Any] | None = None,
    digits: Path | None = None,
    output: Path = Path("runs/timm"),
    smoke: bool = False,
) -> None:
    """Run the script with a patched model, and print.

    Args:
        script: Your copy of timm's train.py.
        arguments: The script's arguments; on the command line, put them after `--`.
        feedback: Keyword arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        digits: Write scikit-learn's digits into this folder as images, and train on them.
        output: Folder that the script writes to.
        smoke: Train for one short epoch on a few digits to check that it works (seconds).
    """
    console = make_console()
    options: dict[str, Any] = {"output": output.parent, "experiment": output.name}
    if smoke:
        digits = digits or output / "digits"
        options |= {"model": "resnet10t", "batch-size": 16, "epochs": 1, "warmup-epochs": 0, "workers": 0}
        if not torch.cuda.is_available():  # in a file, because older scripts have no such option
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
        raise SystemExit(f"the script did not write {summary}: do not pass --output or --experiment to it")
    summarize(console, patch, training_losses(summary))


def cli(argv: list[str]) -> None:
    """Run `main` with the options before `--`, and the script with those after it."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, passed = argv[:end], argv[end + 1 :]
    if passed:
        own = [*own, f"--arguments={json.dumps(passed)}"]
    yaml = str(Path(__file__).with_suffix(".yaml"))
    auto_cli(main, args=own, as_positional=False, default_config_files=[yaml])


if __name__ == "__main__":
    cli(sys.argv[1:])
