"""A sweep runs all its runs, once each, and keeps how each ended."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import pytest
from support.sweeps import names, tiny, written

from feedbackhook.cli import main
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    SweepModelConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep import local as pool
from feedbackhook.experiments.sweep import worker
from feedbackhook.experiments.sweep.grid import done, plan, stored
from feedbackhook.experiments.sweep.local import workers
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.experiments.training.progress import Progress
from feedbackhook.experiments.training.run import train
from feedbackhook.report.aggregate import sweep_table


def test_workers_are_as_many_as_cores_and_threads_allow(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    cores = joblib.cpu_count()
    assert workers(config, plan(config)) == cores
    wide = replace(config, protocol=replace(config.protocol, threads=2 * cores))
    assert workers(wide, plan(wide)) == 1
    assert workers(replace(config, workers=3), plan(config)) == 3


def test_a_sweep_runs_all_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path / "sweep", workers=1)
    seen: list[dict[str, Any]] = []
    results = sweep(config, seen.append)
    assert list(results) == names(plan(config))
    assert {result.status for result in results.values()} == {"finished"}
    assert seen[0] == dict.fromkeys(results)  # none had begun
    assert seen[-1] == results
    assert stored(tmp_path / "sweep") == config
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    monkeypatch.setattr(pool, "run_all", None)
    assert sweep(config) == results
    after = {path: path.stat().st_mtime_ns for path in before}
    for name in ("sweep.yaml", "manifest.json"):
        del before[tmp_path / "sweep" / name], after[tmp_path / "sweep" / name]
    assert after == before


def test_a_sweep_of_another_configuration_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["SGD"], workers=1)
    sweep(config)
    longer = replace(config, conditions=["RndF", "SGD"], protocol=replace(config.protocol, epochs=3))
    with pytest.raises(
        ConfigError, match=r"digits-SGD-rate1-seed0: `protocol\.epochs` was 2 in this run and is 3 now"
    ):
        sweep(longer)
    assert not (tmp_path / "digits-RndF-rate1-seed0").exists()
    assert stored(tmp_path) == config
    file = re.escape(str(tmp_path / "sweep.yaml"))
    with pytest.raises(ConfigError, match=f"start from {file}, or choose another output"):
        sweep(longer)
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0  # which the command takes
    more = replace(config, conditions=["RndF", "SGD"])
    assert len(sweep(more)) == 4


def test_a_sweep_with_both_procedures_of_usf_bm_goes_on(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(epochs=4, lr_factors=1)
    config = tiny(tmp_path, conditions=["uSF+BM"], protocol=protocol, workers=1)
    first = sweep(config)
    assert [result.status for result in first.values()] == ["finished"] * 2
    assert sweep(config) == first


def test_data_that_are_not_there_stop_a_sweep_before_its_first_run(tmp_path: Path) -> None:
    config = tiny(tmp_path / "sweep", datasets=["digits", "MNIST"], data=DataConfig(root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"MNIST could not be read.*leave MNIST out of datasets"):
        sweep(config)
    assert not (tmp_path / "sweep").exists()


FAILED = "digits-uSF-rate1-seed0"


_run_one = worker.run_one


def _failing(config: Any, sweeper: int, until: int | None) -> str:
    """In a worker: one run fails in the middle of its training."""
    real = worker.train

    def train(run: Any, **given: Any) -> Any:
        if Path(run.output).name == FAILED:
            raise RuntimeError("the disk [/dev/x] is full")
        return real(run, **given)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(worker, "train", train)
        return _run_one(config, sweeper, until)


def test_a_run_that_fails_is_kept_with_its_reason_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "sweep", workers=1)
    path = written(config, tmp_path / "sweep.yaml")
    with monkeypatch.context() as context:
        context.setattr(pool, "run_one", _failing)
        assert main(["sweep", str(path)]) == 1
    assert f"{FAILED} failed: RuntimeError: the disk [/dev/x] is full" in capsys.readouterr().out
    states = {run.name: run.folder.result() for run in plan(config)}
    assert [name for name, result in states.items() if result and result.status != "finished"] == [FAILED]
    assert "the disk" in (tmp_path / "sweep" / FAILED / "traceback.txt").read_text()
    table = sweep_table(tmp_path / "sweep")
    assert table.missing == {FAILED: "failed after 0 epochs: RuntimeError: the disk [/dev/x] is full"}
    row = table.cells.set_index("condition").loc["uSF"]
    assert (row["ended"], row["runs"], row["lr_factor"]) == (1, 2, 0.1)
    assert sweep(config)[FAILED].status == "finished"  # the next sweep tries it again
    assert not (tmp_path / "sweep" / FAILED / "traceback.txt").exists()


def test_what_could_not_be_begun_can_be_run_when_it_is_put_right(tmp_path: Path) -> None:
    wrong = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, 5000, lr_factors=1), workers=1)
    assert [result.status for result in sweep(wrong).values()] == ["failed"]
    right = replace(wrong, protocol=replace(wrong.protocol, batch_size=100))
    assert [result.status for result in sweep(right).values()] == ["finished"]


@pytest.mark.parametrize("left", ["status", "aside", "tensorboard"])
def test_a_run_that_was_killed_before_it_had_begun_begins(tmp_path: Path, left: str) -> None:
    config = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, lr_factors=1), workers=1)
    folder = plan(config)[0].folder.path
    (folder / "metrics").mkdir(parents=True)
    if left == "status":
        (folder / "status.json").write_text('{"status": "running"}')
    elif left == "aside":
        (folder / ".config.yaml.4711").write_text("half")
    else:
        (folder / "tensorboard").mkdir()
    assert [result.status for result in sweep(config).values()] == ["finished"]
    assert not list(folder.glob(".config*"))


def test_a_finished_run_does_not_fail_for_its_figures(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, lr_factors=1), workers=1)
    before = sweep(config)
    worker.fail(plan(config)[0].config, "RuntimeError: no font")
    assert plan(config)[0].folder.result() == before["digits-SGD-rate1-seed0"]


def test_a_sweep_says_at_once_what_there_is_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path / "sweep", conditions=["SGD", "uSF"], workers=3)
    ended_, begun, *_ = plan(config)
    train(ended_.config)

    def stop(now: Progress) -> None:
        if now.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(begun.config, progress=stop)
    told: list[str] = []
    before: list[list[str]] = []
    monkeypatch.setattr(pool, "run_all", lambda *_: before.append(list(told)))
    sweep(config, tell=told.append)
    first, second, opening = before[0]
    assert opening.startswith("timm/test_resnet on 1x16x16 pixels, ")
    assert first == f"4 runs in {tmp_path}/sweep: 1 have ended already, 1 to resume, 2 to start"
    assert second.startswith("running 3 at a time on this machine (")
    assert second.endswith("if this stops, rerun the same command to resume")


def test_threads_that_are_not_given_are_one_and_so_a_sweep_goes_on(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(1, lr_factors=1, threads=None)
    config = tiny(tmp_path, conditions=["SGD"], protocol=protocol, workers=1)
    assert plan(config)[0].config.protocol.threads == 1
    sweep(config)
    assert len(sweep(config)) == 1


def test_runs_that_the_sweep_no_longer_plans_are_named(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, lr_factors=1, seeds=2), workers=1
    )
    sweep(config)
    fewer = replace(config, protocol=replace(config.protocol, seeds=1))
    sweep(fewer)
    table = sweep_table(tmp_path)
    assert table.missing == {"digits-SGD-rate1-seed1": "not planned by this sweep"}
    assert table.cells["ended"].tolist() == [1]


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(epochs=2, lr_factors=[1e9, 1.0]), workers=1
    )
    results = list(sweep(config).values())
    assert [result.status for result in results] == ["diverged", "finished"]
    assert done(plan(config)[0])
    row = sweep_table(tmp_path).cells.iloc[0]
    assert (row["ended"], row["diverged"], row["lr_factor"]) == (2, 1, 1.0)


@pytest.mark.slow
def test_a_run_whose_process_is_killed_each_time_fails_and_the_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "run_one", partial(_poisoned, "digits-uSF-rate1-seed0"))
    results = sweep(tiny(tmp_path, workers=2))
    statuses = {name: result.status for name, result in results.items()}
    assert statuses.pop("digits-uSF-rate1-seed0") == "failed"
    assert set(statuses.values()) == {"finished"}
    assert results["digits-uSF-rate1-seed0"].reason == "its process ended 3 times: killed, or out of memory?"


def _poisoned(name: str, config: Any, sweeper: int, until: int | None) -> str:
    if Path(config.output).name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return _run_one(config, sweeper, until)


def test_the_command_says_how_it_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tiny(tmp_path / "sweep", conditions=["SGD"]), tmp_path / "sweep.yaml")
    assert main(["sweep", str(path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "[2/2] digits-SGD-rate0.1-seed0 finished: best test error" in out
    assert "2 finished" in out
    assert f"feedbackhook table {tmp_path}/sweep" in out
    assert main(["table", f"{tmp_path}/sweep"]) == 0
    assert "| SGD |" in capsys.readouterr().out
    assert main(["sweep", str(path), "--conditions", "[nothing]"]) == 2
    assert "'nothing' is not a term of a condition" in capsys.readouterr().err


def test_a_sweep_begins_with_its_networks_data_and_rules(tmp_path: Path) -> None:
    conditions = {
        "backprop": {"feedback": {"mode": None}},
        "signs": {"feedback": {"mode": "sign"}},
        "normalized": {"feedback": {"mode": "sign"}, "model": {"batch_norm": "affine"}},
        "large": {"data": {"size": 28}, "model": {"name": "liao2016/cifar"}},
    }
    once = SweepProtocolConfig(epochs=1, lr_factors=1, device="cpu")
    config = tiny(tmp_path, conditions=conditions, protocol=once, model=SweepModelConfig("liao2016/mnist"))
    config = replace(config, data=replace(config.data, size=28))
    told: list[str] = []
    results = sweep(config, tell=told.append)
    assert [result.status for result in results.values()] == ["finished"] * 3 + ["failed"]
    counts = "digits: 1,293 training, 144 validation, 360 test, 10 classes"
    lines = [line for line in told if "digits: " in line]
    assert lines == [
        f"liao2016/mnist on 1x28x28 pixels, 431,080 parameters; {counts}; backprop, sign; cpu",
        # two more for each of 20 and 50 maps and 500 units
        f"liao2016/mnist on 1x28x28 pixels, {431_080 + 2 * 570:,} parameters; {counts}; sign; cpu",
        "digits: liao2016/cifar cannot be trained (liao2016/cifar takes images of 32x32, not 28x28: set "
        "data.size to 32); sign; cpu",
    ]
