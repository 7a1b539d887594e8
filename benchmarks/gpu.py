"""Step time and memory on a GPU: training in bfloat16 with and without a patch, eager and compiled.

Each rule has a copy of the network. It and a plain copy take turns, one step each, in a new random order each
round; a step's time is the time between two events on the device. The table gives the median and quartiles of
the rule's steps, and the median over rounds of its time divided by the plain step's in the same round. "plain
again" shows the resolution of the measurement. "Kernels" is the time of the step's kernels one after the
other, by the profiler; "host" the median time until Python has queued the last one, from an idle device on.
A step that takes hardly longer than that waits for Python, not for the device. Peak memory covers
one contestant's weights, gradients, optimizer, patch and activations, after a first step.

    python benchmarks/gpu.py        # ViT-B/16 and ResNet-50 at 224 pixels
    python benchmarks/gpu.py --before ../checkout-of-an-earlier-commit   # and its steps in turn
    python benchmarks/gpu.py --device cpu --cases timm/test_vit:4 timm/test_resnet:4 --size 64

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
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from common import (
    RESULTS,
    RULES,
    Setting,
    Step,
    another_version,
    build_model,
    fresh,
    images,
    timed,
    train_step,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import feedbackhook

CASES = ("timm/vit_base_patch16_224:128", "timm/resnet50:256")
EAGER = ("plain again", "uSF", "frSF", "brSF", "random", "brSF fused")
COMPILED = ("frSF", "brSF")
MIB = 2**20


@dataclass
class Contestant:
    """A training step of one copy of the network, its peak memory in MiB and its kernels' time in ms."""

    step: Step
    peak: float
    kernels: float = float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and memory of patched networks on a GPU.")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="timm/NAME:BATCH, of BATCH images")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rules", nargs="*", default=list(EAGER), help="of eager networks, by importance")
    parser.add_argument("--compiled", nargs="*", default=list(COMPILED), help="of compiled ones, the same")
    parser.add_argument(
        "--modes", nargs="*", default=["default"], help="of torch.compile, by importance: default, ..."
    )
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no case is begun")
    parser.add_argument("--before", type=Path, help="a checkout whose eager steps take turns as RULE before")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.csv")
    given = parser.parse_args()
    earlier = None if given.before is None else another_version(given.before)

    began, console = time.monotonic(), Console(width=120)
    longest = {"no": 0.0}  # seconds a contestant; compiling takes 20 at least on a GPU
    rows: list[dict[str, object]] = []
    plain: dict[Setting, Contestant] = {}
    # All that is eager first: it is cheap, and a case that is compiled may take the rest of the budget.
    for how, rules in (("no", given.rules), *((mode, given.compiled) for mode in given.modes)):
        for rule, case in itertools.product(rules, given.cases):
            network, _, batch = case.rpartition(":")
            setting = Setting(network, int(batch), given.size, given.device, "bfloat16", how)
            packages = {rule: feedbackhook}
            if earlier is not None and how == "no" and rule != "plain again":
                packages[f"{rule} before"] = earlier
            started, new = time.monotonic(), len(packages) + (setting not in plain)
            label = f"{case}, {rule}, compiled: {how}"
            if started - began + new * longest.get(how, 20.0) > given.budget:
                console.print(f"{started - began:5.0f} s  {label}: left out, for the budget")
                continue
            rows += _measure(setting, packages, plain, given.warmup, given.rounds)
            _write(rows, given.output)
            ended = time.monotonic()
            longest[how] = max(longest.get(how, 20.0), (ended - started) / new)
            console.print(f"{ended - began:5.0f} s  {label}")
    _print(rows, console)


def _measure(
    setting: Setting,
    packages: dict[str, ModuleType],
    plain: dict[Setting, Contestant],
    warmup: int,
    rounds: int,
) -> list[dict[str, object]]:
    """Let these contestants, and the version that each is made by, take turns with a plain step; return their
    rows, and in the first case of a setting the plain step's, which is kept in `plain`."""
    contestants: dict[str, Contestant] = {}
    shown = list(packages)
    if setting not in plain:
        if setting.compile == "no":
            _contestant(setting, None)  # the libraries' own memory is nobody's
        plain[setting] = _contestant(setting, None)
        shown.insert(0, "plain")
    contestants["plain"] = plain[setting]
    for name, package in packages.items():
        rule = name.removesuffix(" before")
        contestants[name] = _contestant(setting, None if rule == "plain again" else rule, package)
    times = _take_turns(contestants, torch.device(setting.device), warmup, rounds)
    return [_row(setting, name, contestants[name], times[name], times["plain"]) for name in shown]


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


def _contestant(setting: Setting, rule: str | None, package: ModuleType = feedbackhook) -> Contestant:
    """Run the first steps of a copy, which compile it, and measure its memory in the next one."""
    device = torch.device(setting.device)
    start, x, y = _start(replace(setting, compile="no"))
    before = _allocated(device)
    model, called = fresh(start, setting, rule, package)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    step = partial(train_step, called, optimizer, x, y, setting)
    for _ in range(2):
        step()
    if device.type != "cuda":
        return Contestant(step, float("nan"))
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    return Contestant(
        step, peak, sum(event.self_device_time_total for event in profiled.key_averages()) / 1000
    )


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _take_turns(
    contestants: dict[str, Contestant], device: torch.device, warmup: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return the milliseconds of each contestant's steps, and of those the host's."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    order = random.Random(0)
    for number in range(warmup + rounds):
        for name in order.sample(list(contestants), len(contestants)):
            host = 0.0

            def step(step: Step = contestants[name].step) -> None:
                nonlocal host
                begin = time.perf_counter()
                step()
                host = 1000 * (time.perf_counter() - begin)

            milliseconds = timed(step, device)
            if number >= warmup:
                times[name].append((milliseconds, host))
    return times


def _row(
    setting: Setting,
    rule: str,
    contestant: Contestant,
    times: list[tuple[float, float]],
    plain: list[tuple[float, float]],
) -> dict[str, object]:
    milliseconds, host = np.array(times).T
    low, median, high = np.percentile(milliseconds, [25, 50, 75])
    ratio = np.median(milliseconds / np.array(plain)[:, 0])
    on_gpu = torch.device(setting.device).type == "cuda"
    return {
        "network": setting.model,
        "size": setting.size,
        "batch": setting.batch,
        "compiled": setting.compile,
        "rule": rule,
        "median_ms": round(median, 3),
        "q25_ms": round(low, 3),
        "q75_ms": round(high, 3),
        "ratio": round(float(ratio), 4),
        "host_ms": round(float(np.median(host)), 3),
        "kernels_ms": round(contestant.kernels, 3),
        "peak_mib": round(contestant.peak, 1),
        "rounds": len(milliseconds),
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }


def _write(rows: list[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def _print(rows: list[dict[str, object]], console: Console) -> None:
    columns = ("ms", "quartiles", "times plain", "host ms", "kernels ms", "peak MiB")
    table = Table("network", "batch", "compiled", "rule", *columns)
    for row in sorted(
        rows, key=lambda row: (str(row["network"]), int(str(row["batch"])), str(row["compiled"]))
    ):
        quartiles = f"{row['q25_ms']:.1f} to {row['q75_ms']:.1f}"
        cells = (
            f"{row['median_ms']:.1f}",
            quartiles,
            f"{row['ratio']:.3f}",
            f"{row['host_ms']:.1f}",
            f"{row['kernels_ms']:.1f}",
            f"{row['peak_mib']:,.0f}",
        )
        table.add_row(
            str(row["network"]).removeprefix("timm/"),
            str(row["batch"]),
            str(row["compiled"]),
            str(row["rule"]),
            *cells,
        )
    console.print(table)


if __name__ == "__main__":
    assert set(EAGER) | set(COMPILED) <= {"plain again", *RULES}
    main()
