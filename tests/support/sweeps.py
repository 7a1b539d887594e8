"""Small sweeps, and what is seen of their processes from outside."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from feedbackhook.experiments.config import DataConfig, SweepConfig, SweepModelConfig, SweepProtocolConfig
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.experiments.sweep.manifest import write

TINY = SweepModelConfig("timm/test_resnet")  # with images of 16x16 an epoch on digits takes half a second


def tiny(output: Path, **given: Any) -> SweepConfig:
    config = SweepConfig(
        conditions=["SGD", "uSF", "brSF concordance=0.5"],
        datasets=["digits"],
        data=DataConfig(size=16, val_fraction=0.1),
        model=TINY,
        protocol=SweepProtocolConfig(epochs=2, lr_factors=[1.0, 0.1]),
        output=str(output),
    )
    return replace(config, **given)


def written(config: SweepConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(asdict(config)))
    return path


def children(pid: int) -> list[int]:
    """The processes in which a sweep or a worker of a cluster trains runs, and no helpers of theirs.

    A process that has only just been forked still has the command line of its parent, and is not one yet.
    """
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"popen_loky" in command or b"feedbackhook.experiments.sweep.worker" in command:
                found.append(int(child))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and not one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def how_many(folder: Path, status: str) -> int:
    return sum(json.loads(path.read_text())["status"] == status for path in folder.glob("*/status.json"))


def names(runs: list[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


def left(config: SweepConfig) -> list[PlannedRun]:
    """The plan of a sweep whose own files are left in its folder; its runs are not."""
    runs = plan(config)
    write(config, runs)
    return runs
