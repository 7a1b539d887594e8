"""Does a small character transformer learn when its error signals pass through other weights?

Trains a causal transformer on a text that Python ships (the English texts of `pydoc_data.topics`) under
backprop, sign feedback at three concordances, random feedback, random feedback with exact attention, and with
its last layer alone. The training loop is an ordinary one; `feedbackhook.patch` is one line in it. Measures
the test loss in bits per character, the angle to backprop's gradients, and the angle between V and W of each
layer.

The last tenth of the text is the test text. The tenth before it is the validation text, which chooses each
rule's learning rate. Finished runs are not repeated; remove the output folder to start over.

    python recipes/retrofit/characters.py
    python recipes/retrofit/characters.py --smoke true --output runs/characters-smoke
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import loop_recipes
import torch
from characters_model import CharacterTransformer, bits_per_character, loss_of
from characters_results import best_lrs, draw, last_angles, name_of, shown, summarize
from characters_text import alphabet, count_model_bits, encode, shipped_text, split
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor

import feedbackhook

HEAD_ALONE = "head alone"  # not a feedback rule: all other layers keep their initial weights
RULES: dict[str, dict[str, Any] | None] = {
    **loop_recipes.RULES,
    "random, attention exact": {"mode": "random", "exclude": r".*\.attention\..*"},
    HEAD_ALONE: None,
}
"""Keyword arguments of `feedbackhook.patch` by the rule's name in the tables; None: no patch."""

Texts = tuple[str, str, str]


@dataclass(frozen=True)
class Settings:
    """Train, print and draw.

    Args:
        text: A text file in UTF-8 (default: the texts that Python ships in `pydoc_data.topics`).
        rules: Names of the rules to run, from `RULES` in characters.py.
        lrs: AdamW's learning rates; each rule uses the one with the smallest validation loss of seed 0.
        seeds: Runs of each rule at its learning rate.
        steps: Optimizer steps of a run.
        batch_size: Windows of text per step.
        blocks: Transformer blocks.
        width: Features of each position.
        heads: Attention heads of each block.
        context: Characters of each window.
        every: Measure every so many steps.
        jobs: Number of processes; each uses one thread.
        smoke: Train for a few steps to check that it works (seconds).
        output: Folder of the run folders, the tables and the figure.
    """

    text: Path | None = None
    rules: list[str] = field(default_factory=lambda: list(RULES))
    lrs: list[float] = field(default_factory=lambda: [3e-3, 1e-2])
    seeds: int = 1
    steps: int = 1000
    batch_size: int = 16
    blocks: int = 3
    width: int = 64
    heads: int = 4
    context: int = 64
    every: int = 100
    jobs: int = 2
    smoke: bool = False
    output: Path = Path("runs/characters")


def train(texts: Texts, settings: dict[str, Any], folder: Path) -> loop_recipes.Result:
    """Train one run on one thread, or return the result of a finished run in `folder`.

    Raises:
        ValueError: The run in `folder` has other settings.
    """
    return loop_recipes.run_once(folder / "result.json", settings, lambda: _train(texts, settings, folder))


def _train(texts: Texts, settings: dict[str, Any], folder: Path) -> loop_recipes.Result:
    torch.manual_seed(settings["seed"])
    characters = alphabet(*texts)
    training, validation, test = (encode(text, characters) for text in texts)
    steps, context = settings["steps"], settings["context"]
    sizes = (settings[name] for name in ("blocks", "width", "heads", "context"))
    model = CharacterTransformer(len(characters), *sizes)
    if settings["rule"] == HEAD_ALONE:
        model.requires_grad_(False).head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], settings["lr"])
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    patch = None
    if settings["patch"] is not None:
        patch = feedbackhook.patch(model, **settings["patch"], seed=settings["seed"])
    with feedbackhook.Recorder(folder, append=True) as recorder:
        recorder.drop_after(-1)  # rows of an interrupted run
        if patch is not None:
            patch.watch(settings["every"], recorder)
        for step, windows in enumerate(_random_windows(training, settings)):
            if step % settings["every"] == 0:
                recorder.add(step, 0, "test_bits", bits_per_character(model, test, context))
            loss = loss_of(model, windows)
            if not loss.isfinite():
                break
            if patch is not None and (step % settings["every"] == 0 or step == steps - 1):
                # the watch records all metrics but this one
                rows = feedbackhook.measure(patch, loss)
                _record(recorder, step, [row for row in rows if row.metric == "gradient_angle"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
        val_bits, test_bits = (bits_per_character(model, part, context) for part in (validation, test))
        recorder.add(step + 1, 0, "test_bits", test_bits)
        if patch is not None:
            _record(recorder, step + 1, feedbackhook.measure(patch))
            patch.remove()
    finished = math.isfinite(val_bits) and math.isfinite(test_bits) and step == steps - 1
    return {
        "status": "finished" if finished else "diverged",
        "val_bits": val_bits,
        "test_bits": test_bits,
        "torch": torch.__version__,
    }


def _random_windows(text: Tensor, settings: dict[str, Any]) -> Iterator[Tensor]:
    """Draw a batch of windows [N, T + 1] for each step."""
    generator = torch.Generator().manual_seed(settings["seed"])
    offsets = torch.arange(settings["context"] + 1)
    for _ in range(settings["steps"]):
        last = len(text) - settings["context"]
        yield text[torch.randint(last, (settings["batch_size"], 1), generator=generator) + offsets]


def _record(recorder: feedbackhook.Recorder, step: int, rows: Sequence[feedbackhook.Row]) -> None:
    for row in rows:
        recorder.add(step, 0, row.metric, row.value, row.layer, row.depth)


def main(settings: Settings) -> None:
    """Train, print and draw."""
    console = Console(soft_wrap=True)
    loop_recipes.check_names("rules", settings.rules, RULES)
    if settings.smoke:
        small = {"seeds": 1, "steps": 4, "batch_size": 4, "width": 32, "context": 32, "every": 2, "jobs": 1}
        settings = replace(settings, lrs=settings.lrs[:1], **small)
    text = shipped_text() if settings.text is None else settings.text.read_text(encoding="utf-8")
    texts = split(text)
    if settings.smoke:
        texts = (texts[0][:4000], texts[1][:4000], texts[2][:4000])
    if min(map(len, texts)) <= settings.context:
        raise ValueError(
            f"a text of {len(text)} characters is too short: a tenth must hold {settings.context + 1}"
        )
    settings.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    runs = summarize(_train_all(settings, text, texts, console))
    metrics = feedbackhook.read(settings.output)
    metrics = metrics[metrics["run"].isin(runs["run"])]
    layers = last_angles(runs, metrics)
    characters = alphabet(text)
    training, test = encode(texts[0], characters), encode(texts[2], characters)
    count_bits = count_model_bits(training, test, len(characters))
    console.print(shown(runs, layers))
    console.print(
        f"{len(texts[0])} characters for training, {len(texts[1])} for validation, {len(texts[2])} for "
        f"testing, {len(characters)} different ones. Bits per character of the test text by counts of single "
        f"characters: {count_bits[0]:.3f}, of pairs: {count_bits[1]:.3f}"
    )
    paths = [settings.output / name for name in ("runs.csv", "layers.csv", "characters.png")]
    runs.to_csv(paths[0], index=False, float_format="%.4f")
    layers.to_csv(paths[1], index=False, float_format="%.2f")
    draw(runs, metrics, layers, count_bits).savefig(paths[2], dpi=150)
    console.print(f"{time.perf_counter() - began:.0f} s; sum over the runs: {runs['seconds'].sum():.0f} s")
    console.print(*paths, sep="\n")


def _train_all(settings: Settings, text: str, texts: Texts, console: Console) -> list[loop_recipes.Result]:
    """Train each rule at each learning rate with seed 0, then at its best one with the other seeds."""
    names = ("steps", "batch_size", "every", "blocks", "width", "heads", "context")
    shared = {
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        **{name: getattr(settings, name) for name in names},
    }

    def run(planned: list[tuple[str, float, int]], words: str) -> list[loop_recipes.Result]:
        calls = [
            (
                texts,
                {"rule": rule, "patch": RULES[rule], "lr": lr, "seed": seed, **shared},
                settings.output / name_of(rule, lr, seed),
            )
            for rule, lr, seed in planned
        ]
        return loop_recipes.run_in_processes(train, calls, settings.jobs, words, console)

    results = run([(rule, lr, 0) for rule in settings.rules for lr in settings.lrs], "learning rates")
    lr_of = best_lrs(summarize(results))
    seeds = range(1, settings.seeds)
    return results + run([(rule, lr_of[rule], seed) for rule in settings.rules for seed in seeds], "seeds")


if __name__ == "__main__":
    config = str(Path(__file__).with_suffix(".yaml"))
    main(auto_cli(Settings, as_positional=False, default_config_files=[config]))
