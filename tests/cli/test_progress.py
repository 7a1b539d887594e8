"""What a sweep shows while it runs: the runs that end, and the time left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.sweeps import tiny

from feedbackhook.cli import progress
from feedbackhook.cli.progress import States, SweepClock, sweep_progress
from feedbackhook.experiments.config import SweepProtocolConfig
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.store.run_folder import RunResult


def at(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the clock return these times, one per call."""
    now = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))


def states(runs: list[PlannedRun], **by_index: RunResult) -> States:
    """The states of the runs, by `run0=`, `run1=` ...; all others have not started."""
    return {run.name: by_index.get(f"run{index}") for index, run in enumerate(runs)}


def test_the_time_left_goes_by_what_this_sweep_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = SweepProtocolConfig(epochs=4, lr_factors=[1.0, 0.1])
    runs = plan(tiny(tmp_path, conditions=["SGD", "uSF"], protocol=protocol))
    at(monkeypatch, 100.0, 110.0, 130.0)
    clock = SweepClock(runs)
    finished, failed = RunResult(tmp_path, "finished", epoch=4), RunResult(tmp_path, "failed", epoch=0)
    half = RunResult(tmp_path, "running", epoch=2)
    assert clock.left(states(runs, run0=finished, run1=failed)) is None  # both by an earlier sweep
    # half a run in ten seconds, 2.5 are left
    assert clock.left(states(runs, run0=finished, run1=half)) == pytest.approx(10 / 0.5 * 2.5)
    assert clock.left(states(runs, run0=finished, run1=finished, run2=failed)) == pytest.approx(30 / 2 * 1)


def test_a_run_weighs_what_finished_runs_of_its_dataset_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = SweepProtocolConfig(epochs=4, lr_factors=[1.0, 0.1])
    runs = plan(tiny(tmp_path, conditions=["SGD"], datasets=["digits", "MNIST"], protocol=protocol))
    assert [run.dataset for run in runs] == ["digits", "digits", "MNIST", "MNIST"]
    running, finished = RunResult(tmp_path, "running", epoch=0), RunResult(tmp_path, "finished", epoch=4)
    at(monkeypatch, 0.0, 10.0, 100.0)
    clock = SweepClock(runs)
    assert clock.left(states(runs, run0=running)) is None
    # one run in ten seconds; nothing is known about MNIST yet, so it counts the same
    assert clock.left(states(runs, run0=finished, run2=running)) == pytest.approx(30)
    # the run on MNIST took 90 s: 100 s are done, another of 10 and of 90 are left
    assert clock.left(states(runs, run0=finished, run2=finished)) == pytest.approx(100)


def test_each_run_that_ends_is_a_line_and_what_had_ended_before_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(epochs=4, lr_factors=3)))
    finished = RunResult(tmp_path, "finished", epoch=4, best_error=3.0)
    diverged = RunResult(tmp_path, "diverged", epoch=1)
    at(monkeypatch, 0.0, 60.0, 61.0)
    shown = io.StringIO()
    with sweep_progress(Console(file=shown, width=200), runs) as draw:
        draw(states(runs, run0=finished))
        draw(states(runs, run0=finished, run1=finished))
        draw(states(runs, run0=finished, run1=finished, run2=diverged))
    assert shown.getvalue().splitlines() == [
        f"[2/3] {runs[1].name} finished: best test error 3.00%, about 1.0 min left",
        f"[3/3] {runs[2].name} diverged, about 0 s left",
    ]
