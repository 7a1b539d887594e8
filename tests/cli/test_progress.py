"""What a sweep shows while it runs: the runs that end, and the time left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.sweeps import tiny

from feedbackhook.cli.progress import States, sweep_progress
from feedbackhook.experiments.config import SweepProtocolConfig
from feedbackhook.experiments.sweep import progress
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.store.run_folder import RunResult


def states(runs: list[PlannedRun], **by_index: RunResult) -> States:
    """The states of the runs, by `run0=`, `run1=` ...; all others have not started."""
    return {run.name: by_index.get(f"run{index}") for index, run in enumerate(runs)}


def test_each_run_that_ends_is_a_line_and_what_had_ended_before_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(epochs=4, lr_factors=3)))
    finished = RunResult(tmp_path, "finished", epoch=4, best_error=3.0)
    diverged = RunResult(tmp_path, "diverged", epoch=1)
    now = iter([0.0, 60.0, 61.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = io.StringIO()
    with sweep_progress(Console(file=shown, width=200), runs) as draw:
        draw(states(runs, run0=finished))
        draw(states(runs, run0=finished, run1=finished))
        draw(states(runs, run0=finished, run1=finished, run2=diverged))
    assert shown.getvalue().splitlines() == [
        f"[2/3] {runs[1].name} finished: best test error 3.00%, about 1.0 min left",
        f"[3/3] {runs[2].name} diverged, about 0 s left",
    ]
