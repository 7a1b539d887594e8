"""The time that a sweep still takes, and what it would take."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from support.sweeps import names, tiny, written

from feedbackhook.cli import main
from feedbackhook.cli.progress import sweep_progress
from feedbackhook.experiments.config import (
    OptimizerConfig,
    RunConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.sweep import estimate as estimates
from feedbackhook.experiments.sweep import progress
from feedbackhook.experiments.sweep.estimate import estimate
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.experiments.sweep.progress import SweepClock
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.experiments.training import run as train_module
from feedbackhook.store.run_folder import RunResult


def test_an_estimate_does_not_depend_on_whether_a_run_would_diverge(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["uSF"], optimizer=OptimizerConfig(lr=1e9))
    assert estimate(plan(config))["digits-uSF-rate1-seed0"].seconds > 0


def test_an_estimate_of_what_changes_after_an_epoch(tmp_path: Path) -> None:
    """It trains a single epoch, in which nothing changes."""
    protocol = SweepProtocolConfig(epochs=4, milestones=[3], lr_factors=[1.0])
    later = {"feedback": {"mode": "sign", "schedule": {2: {"concordance": 0.75}}}}
    config = tiny(tmp_path, conditions={"later": later}, protocol=protocol)
    (run,) = plan(config)
    assert estimate([run])[run.name].seconds > 0


def test_the_time_left_goes_by_what_this_sweep_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(
        tiny(
            tmp_path, conditions=["SGD", "uSF"], protocol=SweepProtocolConfig(epochs=4, lr_factors=[1.0, 0.1])
        )
    )
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = SweepClock(runs)
    states: dict[str, Any] = dict.fromkeys(names(runs))
    finished, failed = RunResult(tmp_path, "finished", epoch=4), RunResult(tmp_path, "failed", epoch=0)
    states |= {runs[0].name: finished, runs[1].name: failed}  # by an earlier sweep
    assert clock.left(states) is None
    states |= {runs[1].name: RunResult(tmp_path, "running", epoch=2)}
    assert clock.left(states) == pytest.approx(10 / 0.5 * 2.5)  # half a run in ten seconds, 2.5 are left
    states |= {runs[1].name: finished, runs[2].name: failed}
    assert clock.left(states) == pytest.approx(30 / 2 * 1)


def test_runs_weigh_what_finished_runs_on_their_dataset_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = SweepProtocolConfig(epochs=2, lr_factors=[1.0, 0.1])
    fast, fast_left, slow, slow_left = plan(
        tiny(tmp_path, conditions=["SGD"], datasets=["digits", "MNIST"], protocol=protocol)
    )
    now = iter([0.0, 10.0, 10.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = SweepClock([fast, fast_left, slow, slow_left])
    running, finished = RunResult(tmp_path, "running"), RunResult(tmp_path, "finished", epoch=2)
    states: dict[str, Any] = dict.fromkeys(names([fast, fast_left, slow, slow_left]))
    assert clock.left({**states, fast.name: running}) is None
    states |= {fast.name: finished}
    assert clock.left(states) == pytest.approx(3 * 10)  # MNIST is not known yet: as long as a run on digits
    states |= {slow.name: running}
    assert clock.left(states) == pytest.approx(3 * 10)
    states |= {slow.name: finished}
    assert clock.left(states) == pytest.approx(10 + 90)


def test_the_time_left_is_known_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "train", None)
    monkeypatch.setattr(estimates, "train", None)
    runs = plan(tiny(tmp_path, datasets=["digits", "MNIST"]))
    with sweep_progress(Console(), runs) as show:
        show(dict.fromkeys(names(runs)))
        show(dict.fromkeys(names(runs), RunResult(tmp_path, "running", epoch=1)))


def test_an_estimate_is_near_what_a_run_takes_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=partial(next, itertools.count()))
    monkeypatch.setattr(estimates, "time", clock)  # a second for each step, on every machine
    config = tiny(
        tmp_path, conditions=["frSF"], protocol=SweepProtocolConfig(epochs=4, lr_factors=1), workers=1
    )
    expected = estimate(plan(config))["digits-frSF-rate1-seed0"]
    sweep(config)
    size = sum(path.stat().st_size for path in (tmp_path / "digits-frSF-rate1-seed0").rglob("*"))
    assert expected.size == pytest.approx(size, rel=0.2)
    p = plan(config)[0].config.protocol
    steps = (1293 + (144 + 360) / 3) / p.batch_size  # an image that is only evaluated is a third of a step
    assert expected.seconds == pytest.approx(4 * steps)
    without = replace(config, record=replace(config.record, weights="none"), output=f"{tmp_path}/none")
    saved = expected.size - estimate(plan(without))["digits-frSF-rate1-seed0"].size
    weights = load_file(tmp_path / "digits-frSF-rate1-seed0" / "last.safetensors").values()
    assert saved > 3 * sum(w.numel() * w.element_size() for w in weights)  # best, last and the checkpoint's
    twice = replace(config, protocol=replace(config.protocol, epochs=8))
    assert estimate(plan(twice))["digits-frSF-rate1-seed0"].size < 2 * expected.size


def test_an_estimate_of_compiled_runs_counts_what_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 10 s, compiled 4 s, and compiling 100 s."""

    def trained(config: RunConfig, images: ImageData) -> tuple[float, float, float, float]:
        return (107.0, 4.0, 0.0, 0.0) if config.protocol.compile else (7.0, 10.0, 5.0, 3.0)

    monkeypatch.setattr(estimates, "_train", trained)
    protocol = SweepProtocolConfig(epochs=2, lr_factors=1, compile=True, batch_sizes={1: 50})
    config = tiny(tmp_path, conditions=["SGD", "uSF"], protocol=protocol)
    config.record.every = 10
    found = estimate(plan(config))
    steps, evaluated = 1293 / 100, (144 + 360) / 100 / 3
    epoch = {"SGD": 4 * steps + 10 * evaluated, "uSF": (4 + 0.1 * 6) * steps + 10 * evaluated}
    for name, seconds in epoch.items():
        expected = found[f"digits-{name}-rate1-seed0"]
        assert expected.seconds == pytest.approx(2 * seconds + 2 * 100)
        assert expected.size == 5 + 2 * 3


def test_a_dry_run_shows_the_runs_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tiny(tmp_path / "sweep"), tmp_path / "sweep.yaml")
    assert main(["sweep", str(path), "--dry-run", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names(plan(tiny(tmp_path))))
    assert out.startswith("timing a few steps with each dataset's network: digits\n")
    assert "6 runs, 6 of them to be run: about" in out
    assert "with 2 at a time" in out
    assert "--record.weights best keeps less" in out
    assert not (tmp_path / "sweep").exists()
