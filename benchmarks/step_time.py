"""How long does a patched training step take, compared with a plain one?

Each contestant has its own copy of the model and its own optimizer. They take turns in one process, one step
each, in a random order that changes with each round. So other load on the machine affects all alike, and the
state of the caches does not depend on the order. A contestant's figure is the median over the rounds of its
time divided by the plain model's time in the same round. "plain again" is a second plain model; the spread of
its ratios is the resolution of the measurement. On Linux, the process keeps freed memory, so that page faults
do not affect some contestants more than others.

    python benchmarks/step_time.py --model timm/resnet18 --size 64 --batch 32 --threads 2
    python benchmarks/step_time.py --model timm/resnet50 --size 224 --batch 256 --device cuda --dtype bfloat16
    python benchmarks/step_time.py --before ../checkout-of-an-earlier-commit --name before-and-after

Writes benchmarks/results/step_time/NAME.json, and the tables and figure of all results in that folder.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Literal

import torch
from common import (
    DIRECT,
    PEERS,
    RULES,
    Setting,
    Step,
    another_version,
    autocast,
    build_model,
    case_name,
    fresh,
    images,
    peer,
    peers_installed,
    timed,
    train_step,
    write_result,
)
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from tables import draw, print_step_time
from torch import Tensor, nn

import feedbackhook

MEASURED = "uSF"
"""The rule for the steps that are measured or watched."""


def main(
    model: str = "liao2016/mnist",
    batch: int = 100,
    size: int | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no",
    threads: int = 2,
    steps: int = 40,
    warmup: int = 5,
    rules: Sequence[str] = tuple(RULES),
    peers: Sequence[str] = PEERS,
    measures: bool = True,
    before: Path | None = None,
    name: str | None = None,
) -> None:
    """Measure one case, and draw the tables of all cases.

    Args:
        model: liao2016/mnist or timm/NAME.
        batch: Images per batch.
        size: Height and width in pixels (default: the model's own).
        device: cpu, cuda or cuda:N.
        dtype: Data type; bfloat16 uses autocast.
        compile: Mode of torch.compile, or "no".
        threads: CPU threads.
        steps: Measured rounds.
        warmup: Rounds before them.
        rules: Names from `RULES` in common.py; with torch.compile those of direct rules are left out.
        peers: Modes of biotorch, only without torch.compile and if biotorch is installed.
        measures: Also time steps that are measured or watched, only without torch.compile.
        before: A checkout of an earlier version, whose steps take their turns as "RULE before".
        name: Name of the result (default: made from the case).
    """
    torch.set_num_threads(threads)
    _keep_freed_memory()
    setting = Setting(model, batch, size, device, dtype, compile, threads)
    console = Console()
    with TemporaryDirectory() as folder:
        if compile != "no":
            rules, peers = [rule for rule in rules if rule not in DIRECT], ()
        if peers and not peers_installed(console):
            peers = ()
        contestants = _contestants(setting, rules, peers)
        if measures and compile == "no":
            contestants |= _measuring(setting, Path(folder))
        if before is not None:
            contestants |= _earlier(setting, rules, measures and compile == "no", before, Path(folder))
        times = _take_turns(contestants, setting, warmup, steps, console)
    name = name or case_name(setting)
    write_result("step_time", name, setting, {"milliseconds": times})
    print_step_time(console, name)
    draw()


def _take_turns(
    contestants: dict[str, Step], setting: Setting, warmup: int, steps: int, console: Console
) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant's steps."""
    times: dict[str, list[float]] = {label: [] for label in contestants}
    order = random.Random(0)
    for round_number in track(range(warmup + steps), case_name(setting), console=console, transient=True):
        for label in order.sample(list(contestants), len(contestants)):
            milliseconds = timed(contestants[label], torch.device(setting.device))
            if round_number >= warmup:
                times[label].append(milliseconds)
    return times


def _contestants(setting: Setting, rules: Sequence[str], peers: Sequence[str]) -> dict[str, Step]:
    """Return the step of each contestant by name."""
    start, size = build_model(setting)
    x, y = images(setting, size)
    training = partial(_training, x, y, setting)
    removed, called = fresh(start, setting, "sign")
    training(removed, called)()
    feedbackhook.unpatch(removed)
    contestants = {"plain": training(*fresh(start, setting)), "plain again": training(*fresh(start, setting))}
    contestants |= {rule: training(*fresh(start, setting, rule)) for rule in rules}
    contestants["removed"] = training(removed, called)
    contestants |= {f"biotorch {mode}": training(*peer(start, setting, mode, y)) for mode in peers}
    for label, rule in {"plain": None, "plain again": None, "sign": "sign"}.items():
        contestants[f"no_grad {label}"] = partial(_look, fresh(start, setting, rule)[1], x, setting)
    return contestants


def _training(x: Tensor, y: Tensor, setting: Setting, model: nn.Module, called: nn.Module) -> Step:
    """Return the training step of a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    return partial(train_step, called, optimizer, x, y, setting)


def _earlier(
    setting: Setting, rules: Sequence[str], measures: bool, checkout: Path, folder: Path
) -> dict[str, Step]:
    """Return the same steps with the package of another checkout."""
    package = another_version(checkout)
    start, size = build_model(setting)
    training = partial(_training, *images(setting, size), setting)
    contestants = {f"{rule} before": training(*fresh(start, setting, rule, package)) for rule in rules}
    if measures:
        watched = _measuring(setting, folder / "before", package)
        contestants |= {f"{label} before": step for label, step in watched.items()}
    return contestants


def _measuring(setting: Setting, folder: Path, package: ModuleType = feedbackhook) -> dict[str, Step]:
    """Return steps under `MEASURED`: watched, watched every 50 steps, and measured on their graph."""
    start, size = build_model(setting)

    def step(every: int | None) -> Step:
        model, called = fresh(start, setting, MEASURED, package)
        patch = package.get_patch(model)
        assert patch is not None
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        look = partial(package.measure, patch) if every is None else None
        if every is not None:
            patch.watch(every, package.Recorder(folder / str(every)))
        return partial(train_step, called, optimizer, *images(setting, size), setting, look)

    kinds = {"watched": 1, "watched each 50th": 50, "measured": None}
    return {f"{MEASURED} {kind}": step(every) for kind, every in kinds.items()}


def _keep_freed_memory() -> None:
    """Set M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) of glibc's mallopt to the maximum."""
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


@torch.no_grad()
def _look(model: nn.Module, x: Tensor, setting: Setting) -> None:
    with autocast(setting):
        model(x)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
