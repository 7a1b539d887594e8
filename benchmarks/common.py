"""What the benchmarks share: the case that is measured, its model, and where its result lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedbackhook.experiments.config import ModelConfig
from feedbackhook.experiments.folder import provenance
from feedbackhook.experiments.models import build, default_size

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """One case: a model, its input, and how it runs."""

    model: str
    batch: int
    size: int | None
    device: str = "cpu"
    dtype: str = "float32"
    compile: str = "no"
    threads: int = 2


def build_model(setting: Setting, classes: int = 10) -> tuple[nn.Module, int]:
    """The model, with the same weights each time, and the size of its images in pixels."""
    torch.manual_seed(0)
    channels, height, _ = default_size(setting.model)
    size = setting.size or height
    options: dict[str, Any] = {}
    if setting.size and "vit_" in setting.model:
        options["img_size"] = size  # a vision transformer's positions depend on it
    model = build(ModelConfig(setting.model, options=options), classes, channels, (size, size))
    return model.to(setting.device), size


def case_name(setting: Setting) -> str:
    """A file's name for the case."""
    parts = [setting.model.removeprefix("timm/").replace("/", "-"), f"batch{setting.batch}"]
    if setting.size:
        parts.insert(1, f"{setting.size}px")
    parts += [value for value in (setting.dtype,) if value != "float32"]
    parts += [f"compiled-{setting.compile}"] if setting.compile != "no" else []
    parts += [torch.device(setting.device).type]
    return "_".join(parts)


def write_result(kind: str, name: str, setting: Setting, figures: dict[str, Any]) -> None:
    """Writes RESULTS/kind/name.json: the case, machine, versions and command, and the figures."""
    path = RESULTS / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": asdict(setting), **provenance(), **figures}, indent=1) + "\n")


def read_results(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the content of each result of a kind."""
    for path in sorted((RESULTS / kind).glob("*.json")):
        yield path.stem, json.loads(path.read_text())
