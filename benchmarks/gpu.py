"""Step time and memory on a GPU: training in bfloat16 with and without a patch, eager and compiled.

Each rule has a copy of the network. It and a plain copy take turns, one step each, in a new random order each
round; a step's time is the time between two events on the device. The table gives the median and quartiles of
the rule's steps, and the median over rounds of its time divided by the plain step's in the same round. "plain
again" shows the resolution of the measurement. Peak memory covers one contestant's weights, gradients,
optimizer, patch and activations, after a first step.

    python benchmarks/gpu.py        # ViT-B/16 and ResNet-50 at 224 pixels
    python benchmarks/gpu.py --device cpu --networks timm/test_vit timm/test_resnet --batch 4 --size 64

Rewrites benchmarks/results/gpu.csv after each case, so an interrupted run keeps its finished cases.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, RULES, Setting, Step, build_model, fresh, images, timed, train_step
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

BATCH = {"timm/vit_base_patch16_224": 128, "timm/resnet50": 256}
EAGER = ("plain again", "uSF", "frSF", "brSF", "random", "brSF fused")
COMPILED = ("frSF", "brSF")
MIB = 2**20


@dataclass
class Contestant:
    """A training step of one copy of the network, and its peak memory."""

    step: Step
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and memory of patched networks on a GPU.")
    parser.add_argument("--networks", nargs="+", default=list(BATCH), help="timm/NAME")
    parser.add_argument("--batch", type=int, help="images in a batch (256 for ResNet-50, else 128)")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rules", nargs="*", default=list(EAGER), help="of eager networks, by importance")
    parser.add_argument("--compiled", nargs="*", default=list(COMPILED), help="of compiled ones, the same")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no case is begun")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.csv")
    given = parser.parse_args()

    began, console = time.monotonic(), Console(width=110)
    longest = {False: 0.0, True: 20.0}  # seconds a contestant; compiling takes that at least on a GPU
    rows: list[dict[str, object]] = []
    plain: dict[tuple[str, bool], Contestant] = {}
    # All that is eager first: it is cheap, and a case that is compiled may take the rest of the budget.
    for compiled, rules in ((False, given.rules), (True, given.compiled)):
        for rule, network in itertools.product(rules, given.networks):
            case = f"{network}, {rule}{', compiled' if compiled else ''}"
            key, started = (network, compiled), time.monotonic()
            new = 1 if key in plain else 2
            if started - began + new * longest[compiled] > given.budget:
                console.print(f"{started - began:5.0f} s  {case}: left out, for the budget")
                continue
            batch, how = given.batch or BATCH.get(network, 128), "default" if compiled else "no"
            setting = Setting(network, batch, given.size, given.device, "bfloat16", how)
            if key not in plain:
                if not compiled:
                    _contestant(setting, None)  # the libraries' own memory is nobody's
                plain[key] = _contestant(setting, None)
            pair = {
                "plain": plain[key],
                rule: _contestant(setting, None if rule == "plain again" else rule),
            }
            times = _take_turns(pair, torch.device(given.device), given.warmup, given.rounds)
            for name in pair if new == 2 else (rule,):
                ratio = np.median(np.array(times[name]) / np.array(times["plain"]))
                rows.append(_row(setting, name, times[name], float(ratio), pair[name].peak))
            _write(rows, given.output)
            del pair
            ended = time.monotonic()
            longest[compiled] = max(longest[compiled], (ended - started) / new)
            console.print(f"{ended - began:5.0f} s  {case}")
    _print(rows, console)


@cache
def _start(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    """Build the network that contestants copy, and a batch."""
    model, size = build_model(setting, classes=1000)
    x, y = images(setting, size)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):  # a convolutional network
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    return model, x, y


def _contestant(setting: Setting, rule: str | None) -> Contestant:
    """Run the first steps of a copy, which compile it, and measure its memory in the next one."""
    device = torch.device(setting.device)
    start, x, y = _start(replace(setting, compile="no"))
    before = _allocated(device)
    model, called = fresh(start, setting, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    step = partial(train_step, called, optimizer, x, y, setting)
    for _ in range(2):
        step()
    if device.type != "cuda":
        return Contestant(step, float("nan"))
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return Contestant(step, (torch.cuda.max_memory_allocated(device) - before) / MIB)


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _take_turns(
    contestants: dict[str, Contestant], device: torch.device, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant's steps."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)
    for number in range(warmup + rounds):
        for name in order.sample(list(contestants), len(contestants)):
            milliseconds = timed(contestants[name].step, device)
            if number >= warmup:
                times[name].append(milliseconds)
    return times


def _row(
    setting: Setting, rule: str, milliseconds: list[float], ratio: float, peak: float
) -> dict[str, object]:
    low, median, high = np.percentile(milliseconds, [25, 50, 75])
    on_gpu = torch.device(setting.device).type == "cuda"
    return {
        "network": setting.model,
        "size": setting.size,
        "batch": setting.batch,
        "compiled": setting.compile != "no",
        "rule": rule,
        "median_ms": round(median, 3),
        "q25_ms": round(low, 3),
        "q75_ms": round(high, 3),
        "ratio": round(ratio, 4),
        "peak_mib": round(peak, 1),
        "rounds": len(milliseconds),
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }


def _write(rows: list[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def _print(rows: list[dict[str, object]], console: Console) -> None:
    table = Table("network", "compiled", "rule", "ms", "quartiles", "times plain", "peak MiB")
    for row in sorted(rows, key=lambda row: (str(row["network"]), bool(row["compiled"]))):
        quartiles = f"{row['q25_ms']:.1f} to {row['q75_ms']:.1f}"
        cells = (f"{row['median_ms']:.1f}", quartiles, f"{row['ratio']:.3f}", f"{row['peak_mib']:,.0f}")
        table.add_row(
            str(row["network"]).removeprefix("timm/"),
            "yes" if row["compiled"] else "no",
            str(row["rule"]),
            *cells,
        )
    console.print(table)


if __name__ == "__main__":
    assert set(EAGER) | set(COMPILED) <= {"plain again", *RULES}
    main()
