"""What does a patch cost in Python alone? Times a vision transformer whose tensors are very small.

It has the twelve blocks of ViT-tiny with a width of 12 features, one image of 32x32 pixels, one thread. The
contestants take turns. Prints the difference of their medians to the plain model's.

    python benchmarks/python_time.py

Writes benchmarks/results/python_time.csv.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
import timm
import torch
import torch.nn.functional as F
from common import RESULTS, RULES
from jsonargparse import auto_cli
from torch import nn

import feedbackhook

PHASES = ("forward", "backward", "forward under no_grad")


def main(
    rules: Sequence[str] = ("symmetric", "uSF", "frSF", "RndF"), steps: int = 100, warmup: int = 5
) -> None:
    """Measure and print.

    Args:
        rules: Names from `RULES` in common.py.
        steps: Measured rounds.
        warmup: Rounds before them.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_classes=10)
    models = {"plain": start, "plain again": copy.deepcopy(start)}
    for rule in rules:
        models[rule] = copy.deepcopy(start)
        feedbackhook.patch(models[rule], **RULES[rule])
    rounds = [
        {"contestant": label, **dict(zip(PHASES, _phases(model), strict=True))}
        for _ in range(warmup + steps)
        for label, model in models.items()
    ][warmup * len(models) :]
    medians = pd.DataFrame(rounds).groupby("contestant", sort=False).median()
    added = (medians - medians.loc["plain"]).round(0).astype(int).add_suffix(" [µs more than plain]")
    added.to_csv(RESULTS / "python_time.csv")
    print(added.to_string())


def _phases(model: nn.Module) -> tuple[float, ...]:
    """Return the microseconds of each of `PHASES`."""
    x, y = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    model.zero_grad()
    times = [time.perf_counter()]
    loss = F.cross_entropy(model(x), y)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    with torch.no_grad():
        model(x)
    times.append(time.perf_counter())
    return tuple(1e6 * (end - begin) for begin, end in pairwise(times))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
