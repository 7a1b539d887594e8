"""Shared by the benchmarks: the measured case, its model, and the files of the results."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import feedbackhook
from feedbackhook.experiments.config import ModelConfig
from feedbackhook.experiments.models.build import build, default_size
from feedbackhook.experiments.provenance import provenance

RESULTS = Path(__file__).parent / "results"

RULES: dict[str, dict[str, Any]] = {
    "symmetric": {"mode": "symmetric"},
    "uSF": {"mode": "uSF"},
    "NuSF": {"mode": "NuSF"},
    "frSF": {"mode": "frSF"},
    "frSF recompute fused": {"mode": "frSF", "recompute": True, "fused": True},
    "brSF": {"mode": "brSF"},
    "brSF fused": {"mode": "brSF", "fused": True},
    "RndF": {"mode": "RndF"},
    "sign": {"mode": "sign"},
    "random": {"mode": "random"},
    "FA": {"mode": "FA"},
    "uSF-SN": {"mode": "uSF-SN"},
    "uSF-init": {"mode": "uSF-init"},
    "sign-symmetry": {"mode": "sign-symmetry"},
    "angle": {"mode": "angle"},
    "noise": {"mode": "noise"},
    "sparse": {"mode": "sparse"},
    "quantized": {"mode": "quantized"},
    "low_rank": {"mode": "low_rank"},
    "toeplitz": {"mode": "toeplitz"},
    "svd": {"mode": "svd"},
    "DFA": {"mode": "DFA"},
    "DFA shared": {"mode": "DFA", "shared": True},
    "DFA recompute": {"mode": "DFA", "recompute": True},
    "sDFA": {"mode": "sDFA"},
    "DRTP": {"mode": "DRTP"},
}
"""Keyword arguments of `feedbackhook.patch` by the contestant's name."""
DIRECT = tuple(name for name, given in RULES.items() if given["mode"] in ("DFA", "sDFA", "DRTP"))
"""The rules that refuse compiled code."""
PEERS = ("usf", "frsf", "brsf", "fa", "dfa")
"""Modes of biotorch."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """A model, its input, and how it runs."""

    model: str
    batch: int
    size: int | None
    device: str = "cpu"
    dtype: str = "float32"
    compile: str = "no"
    threads: int = 2


def build_model(setting: Setting, classes: int = 10) -> tuple[nn.Module, int]:
    """Build the model, with the same weights each time; return it and the size of its images in pixels."""
    torch.manual_seed(0)
    channels, height, _ = default_size(setting.model)
    size = setting.size or height
    options: dict[str, Any] = {}
    if setting.size and "vit_" in setting.model:
        options["img_size"] = size  # a vision transformer's position embedding depends on it
    model = build(ModelConfig(setting.model, options=options), classes, channels, (size, size))
    return model.to(setting.device), size


def images(setting: Setting, size: int) -> tuple[Tensor, Tensor]:
    """Return a batch of random images and classes."""
    torch.manual_seed(0)
    channels = 1 if setting.model.startswith("liao2016/") else 3
    x = torch.randn(setting.batch, channels, size, size, device=setting.device)
    return x, torch.randint(0, 10, (setting.batch,), device=setting.device)


def fresh(
    start: nn.Module, setting: Setting, rule: str | None = None, package: ModuleType = feedbackhook
) -> tuple[nn.Module, nn.Module]:
    """Copy the model, patch it if a rule is given; return it, and it or its compiled form to call."""
    model = copy.deepcopy(start)
    if rule is not None:
        package.patch(model, **RULES[rule])
    return model, model if setting.compile == "no" else torch.compile(model, mode=setting.compile)


def another_version(checkout: Path) -> ModuleType:
    """Import the package of another checkout beside this one, which stays what `import feedbackhook` gives.

    A module that the other version imports only when it is needed would be this version's; the core has none.
    """
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "feedbackhook"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        other = importlib.import_module("feedbackhook")
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.split(".")[0] == "feedbackhook"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if not Path(str(other.__file__)).is_relative_to(checkout.resolve()):
        raise SystemExit(f"{checkout} has no package feedbackhook: give the folder of a checkout")
    return other


def peer(start: nn.Module, setting: Setting, mode: str, y: Tensor) -> tuple[nn.Module, nn.Module]:
    """Copy the model and convert it by biotorch; return it, and a module to call with images alone."""
    from biotorch.module.biomodule import BioModule

    with redirect_stdout(StringIO()):  # it prints what it converts
        converted = BioModule(copy.deepcopy(start), mode=mode, output_dim=10).to(setting.device)
    return converted, _WithTargets(converted, y) if mode == "dfa" else converted


def peers_installed(console: Console) -> bool:
    """Return whether biotorch is installed, and print that it is not."""
    try:
        import biotorch  # noqa: F401
    except ModuleNotFoundError:
        console.print('biotorch is not installed (pip install -e ".[bench]"), so it is left out')
        return False
    return True


class _WithTargets(nn.Module):
    """biotorch's DFA computes the loss of its own to get the error at the output."""

    def __init__(self, converted: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.converted, self.targets = converted, targets

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.converted(x, self.targets, F.cross_entropy)
        return output


def autocast(setting: Setting) -> Any:
    if setting.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(setting.device).type, getattr(torch, setting.dtype))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    setting: Setting,
    look: Callable[[Tensor], object] | None = None,
) -> None:
    """Run a training step; `look` is called with the loss before the backward pass."""
    optimizer.zero_grad()
    with autocast(setting):
        loss = F.cross_entropy(model(x), y)
    if look is not None:
        look(loss)
    loss.backward()
    optimizer.step()


def case_name(setting: Setting) -> str:
    """Return the name of the case's file."""
    parts = [setting.model.removeprefix("timm/").replace("/", "-"), f"batch{setting.batch}"]
    if setting.size:
        parts.insert(1, f"{setting.size}px")
    parts += [value for value in (setting.dtype,) if value != "float32"]
    parts += [f"compiled-{setting.compile}"] if setting.compile != "no" else []
    parts += [torch.device(setting.device).type]
    return "_".join(parts)


def write_result(kind: str, name: str, setting: Setting, figures: dict[str, Any]) -> None:
    """Write the case, the machine, versions, command and figures to RESULTS/kind/name.json."""
    path = RESULTS / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": asdict(setting), **provenance(), **figures}, indent=1) + "\n")


def read_results(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the content of each result of a kind."""
    for path in sorted((RESULTS / kind).glob("*.json")):
        yield path.stem, json.loads(path.read_text())


def timed(step: Step, device: torch.device) -> float:
    """Return the milliseconds of one step, by CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1000
