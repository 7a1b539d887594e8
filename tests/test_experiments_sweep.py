"""A sweep: which runs it plans, and that all of them end, once each, whatever is killed meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest
import yaml
from bounds import HANG
from safetensors.torch import load_file

from feedbackhook import console
from feedbackhook.cli import main
from feedbackhook.experiments import estimates, pool, worker
from feedbackhook.experiments import sweep as sweep_module
from feedbackhook.experiments import train as train_module
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FolderInUse,
    ModelConfig,
    OptimizerConfig,
    SweepConfig,
    SweepModelConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.estimates import estimate
from feedbackhook.experiments.folder import RunResult
from feedbackhook.experiments.plan import PlannedRun, ended, plan, stored
from feedbackhook.experiments.pool import workers
from feedbackhook.experiments.sweep import sweep
from feedbackhook.experiments.train import Progress, train
from feedbackhook.recorder import Recorder, process_name
from feedbackhook.report.tables import sweep_table

TINY = SweepModelConfig("timm/test_resnet")  # with images of 16x16 an epoch on digits takes half a second


def tiny(output: Path, **given: Any) -> SweepConfig:
    config = SweepConfig(
        conditions=["SGD", "uSF", "brSF concordance=0.5"],
        datasets=["digits"],
        data=DataConfig(size=16, held_out=0.1),
        model=TINY,
        protocol=SweepProtocolConfig(epochs=2, rates=[1.0, 0.1]),
        output=str(output),
    )
    return replace(config, **given)


def written(config: SweepConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(asdict(config)))
    return path


def names(runs: list[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


def test_a_plan_is_the_product_and_its_names_tell_the_place_in_it(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(rates=3, seeds=2, seed=4)
    runs = plan(tiny(tmp_path, protocol=protocol))
    assert len(runs) == 3 * 3 * 2
    assert names(runs)[:3] == [
        "digits-SGD-rate10-seed4",
        "digits-SGD-rate10-seed5",
        "digits-SGD-rate1-seed4",
    ]
    assert names(runs)[-1] == "digits-brSF-concordance=0.5-rate0.1-seed5"
    assert names(runs) == names(plan(tiny(tmp_path / "elsewhere", protocol=protocol)))
    last = runs[-1].config
    assert (last.optimizer.lr, last.protocol.seed) == (pytest.approx(5e-5), 5)
    assert last.data == DataConfig("digits", size=16, held_out=0.1)
    assert last.output == str(tmp_path / "digits-brSF-concordance=0.5-rate0.1-seed5")


@pytest.mark.parametrize(
    ("rates", "factors"),
    [(5, (100, 10, 1, 0.1, 0.01)), (3, (10, 1, 0.1)), (1, (1,)), ([2.0, 0.5], (2, 0.5))],
    ids=str,
)
def test_rates_are_the_papers_or_ones_own(tmp_path: Path, rates: Any, factors: tuple[float, ...]) -> None:
    runs = plan(tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(rates=rates)))
    assert tuple(run.rate for run in runs) == factors
    assert [run.config.optimizer.lr for run in runs] == pytest.approx([5e-4 * f for f in factors])


def test_the_network_is_the_papers_for_the_dataset(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, datasets=["digits", "MNIST", "CIFAR100", "SVHN", "STL10"], model=SweepModelConfig()
    )
    networks = {run.dataset: run.config.model.name for run in plan(config)}
    assert networks == {
        "digits": "liao2016/mnist",
        "MNIST": "liao2016/mnist",
        "CIFAR100": "liao2016/cifar",
        "SVHN": "liao2016/svhn",
        "STL10": "liao2016/images",
    }
    given = plan(replace(config, model=SweepModelConfig("timm/resnet18", options={"drop_rate": 0.1})))
    assert given[0].config.model == ModelConfig("timm/resnet18", options={"drop_rate": 0.1})


OWN: dict[str, dict[str, Any]] = {
    "backprop": {"feedback": {"mode": None}, "optimizer": {"name": "sgd", "lr": 0.02}},
    "half of the signs": {"feedback": {"mode": "sign", "options": {"concordance": 0.5}}},
    "the paper's": {"condition": "uSF+BM2"},
    "other network": {"model": {"name": "liao2016/mnist"}, "data": {"size": 28}, "protocol": {"epochs": 1}},
}


def test_conditions_of_ones_own_set_what_they_name_and_leave_the_rest(tmp_path: Path) -> None:
    given = tiny(tmp_path, conditions=OWN)
    runs = {run.condition: run for run in plan(given) if run.rate == 0.1}
    assert list(runs) == list(OWN)
    assert runs["half of the signs"].name == "digits-half-of-the-signs-rate0.1-seed0"
    backprop, half, papers, other = (runs[name].config for name in OWN)
    assert (backprop.label, backprop.condition, backprop.feedback.mode) == ("backprop", None, None)
    assert (backprop.optimizer.name, backprop.optimizer.lr) == ("sgd", pytest.approx(0.002))
    assert half.optimizer == replace(given.optimizer, lr=pytest.approx(5e-5))
    assert (half.feedback.mode, half.feedback.options) == ("sign", {"concordance": 0.5})
    assert (papers.condition, papers.label) == ("uSF+BM2", "the paper's")
    assert (other.model.name, other.data.size, other.protocol.epochs) == ("liao2016/mnist", 28, 1)
    assert half.data == replace(given.data, name="digits")
    path = written(given, tmp_path / "sweep.yaml")
    assert stored(path.parent).conditions == OWN


def test_a_sweep_of_ones_own_conditions_has_its_table_and_report(tmp_path: Path) -> None:
    own = {name: OWN[name] for name in ("backprop", "half of the signs")}
    protocol = SweepProtocolConfig(epochs=1, rates=1)
    results = sweep(tiny(tmp_path, conditions=own, protocol=protocol))
    assert {result.status for result in results.values()} == {"finished"}
    table = sweep_table(tmp_path)
    assert list(table.cells["condition"]) == list(own)
    assert table.reference == "backprop"
    assert table.cells["class_of_best"].notna().all()
    assert table.missing == {}
    for command in (["table"], ["report"], ["compare"]):
        assert main([*command, str(tmp_path)]) == 0
    assert "more worse than backprop" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": {"mood": "sign"}}, "condition 'own'.*mood"),
        ({"optimizer": {"lr": "fast"}}, "condition 'own'.*lr"),
        ({"data": {"name": "MNIST"}}, "sets data.name, which is the sweep's to set"),
        ({"protocol": {"seed": 3}}, "sets protocol.seed, which is the sweep's to set"),
        ({"condition": "uSF", "feedback": {"mode": "random"}}, "makes feedback.mode 'uSF'"),
        ("sign", "must map settings of a run to values"),
    ],
)
def test_a_condition_of_ones_own_that_cannot_be_is_named(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, conditions={"own": settings}))


def test_usf_with_batch_manhattan_alone_has_two_procedures(tmp_path: Path) -> None:
    conditions = ["uSF+BM", "uSF+BN+BM", "uSF+BM2", "uSF+BM Top", "brSF+BM"]
    protocol = SweepProtocolConfig(epochs=8, rates=1)
    runs = plan(tiny(tmp_path, conditions=conditions, protocol=protocol))
    assert names(runs)[:2] == ["digits-uSF+BM-rate1-seed0", "digits-uSF+BM-rate1-seed0-batch500"]
    assert [run.config.protocol.batch_sizes for run in runs] == [{}, {3: 500}, {}, {}, {}, {}]
    short = tiny(tmp_path, conditions=["uSF+BM"], protocol=SweepProtocolConfig(epochs=3, rates=1))
    assert len(plan(short)) == 1  # there is nothing after the third epoch


def test_small_is_one_dataset_and_a_short_protocol_in_a_folder_of_its_own(tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "full", datasets=["MNIST", "SVHN"], protocol=SweepProtocolConfig(), small="digits"
    )
    runs = plan(config)
    assert {run.dataset for run in runs} == {"digits"}
    assert [run.rate for run in runs] == [10, 1, 0.1] * 3
    assert {run.config.protocol.epochs for run in runs} == {8}
    assert Path(str(runs[0].config.output)).parent == tmp_path / "full-digits"
    own = replace(config, protocol=SweepProtocolConfig(epochs=3, rates=1))
    assert [(run.config.protocol.epochs, run.rate) for run in plan(own)] == [(3, 1.0)] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditions": []}, "one of them is empty"),
        ({"conditions": ["uSF+BX"]}, "'BX' is no part of a condition"),
        ({"conditions": ["uSF+BN", "uSF+BN"]}, "2 runs of the sweep have the name digits-uSF"),
        ({"datasets": ["Omniglot"], "model": SweepModelConfig()}, "no network for Omniglot: set model.name"),
        ({"data": DataConfig("MNIST")}, "data.name has no effect in a sweep"),
        ({"optimizer": OptimizerConfig("batch_manhattan", setting=3)}, "makes optimizer.setting 1"),
        ({"protocol": SweepProtocolConfig(rates=2)}, "protocol.rates must be 1, 3 or 5"),
        ({"protocol": SweepProtocolConfig(rates=[0.0])}, "more than 0, not 0.0"),
        ({"protocol": SweepProtocolConfig(rates=[float("inf")])}, "more than 0, not inf"),
        ({"protocol": SweepProtocolConfig(seeds=0)}, "protocol.seeds must be 1 or more"),
        ({"workers": 0}, "workers must be 1 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_is_one_clear_error(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, **given))


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
    del before[tmp_path / "sweep" / "sweep.yaml"], after[tmp_path / "sweep" / "sweep.yaml"]
    assert after == before


def test_a_sweep_of_another_configuration_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["SGD"], workers=1)
    sweep(config)
    longer = replace(config, conditions=["RndF", "SGD"], protocol=replace(config.protocol, epochs=3))
    with pytest.raises(ConfigError, match=r"digits-SGD-rate1-seed0: its protocol\.epochs is 2, here it is 3"):
        sweep(longer)
    assert not (tmp_path / "digits-RndF-rate1-seed0").exists()
    assert stored(tmp_path) == config
    file = re.escape(str(tmp_path / "sweep.yaml"))
    with pytest.raises(ConfigError, match=f"start from {file}, or give another output"):
        sweep(longer)
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0  # which the command takes
    more = replace(config, conditions=["RndF", "SGD"])
    assert len(sweep(more)) == 4


def test_a_sweep_with_both_procedures_of_usf_bm_goes_on(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(epochs=4, rates=1)
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


def _failing(config: Any, sweeper: int) -> str:
    """In a worker: one run fails in the middle of its training."""
    real = worker.train

    def train(run: Any, **given: Any) -> Any:
        if Path(run.output).name == FAILED:
            raise RuntimeError("the disk [/dev/x] is full")
        return real(run, **given)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(worker, "train", train)
        return _run_one(config, sweeper)


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
    assert (row["ended"], row["runs"], row["rate"]) == (1, 2, 0.1)
    assert sweep(config)[FAILED].status == "finished"  # the next sweep tries it again
    assert not (tmp_path / "sweep" / FAILED / "traceback.txt").exists()


def test_what_could_not_be_begun_can_be_run_when_it_is_put_right(tmp_path: Path) -> None:
    wrong = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, 5000, rates=1), workers=1)
    assert [result.status for result in sweep(wrong).values()] == ["failed"]
    right = replace(wrong, protocol=replace(wrong.protocol, batch_size=100))
    assert [result.status for result in sweep(right).values()] == ["finished"]


@pytest.mark.parametrize("left", ["status", "aside", "tensorboard"])
def test_a_run_that_was_killed_before_it_had_begun_begins(tmp_path: Path, left: str) -> None:
    config = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, rates=1), workers=1)
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
    config = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, rates=1), workers=1)
    before = sweep(config)
    worker.fail(plan(config)[0].config, "RuntimeError: no font")
    assert plan(config)[0].folder.result() == before["digits-SGD-rate1-seed0"]


def test_two_sweeps_at_work_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "sweep", workers=1)
    with (
        sweep_module._alone(tmp_path / "sweep"),
        pytest.raises(ConfigError, match="another sweep is at work"),
    ):
        sweep(config)
    assert not list((tmp_path / "sweep").glob("digits*"))


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


def test_a_run_whose_folder_is_in_use_makes_way_for_the_others(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(1, rates=[1.0, 0.1])
    config = tiny(tmp_path, conditions=["SGD"], protocol=protocol, workers=1)
    first, second = plan(config)
    told: list[str] = []
    with ExitStack() as held:
        held.enter_context(Recorder(first.folder.path))

        def release(states: dict[str, RunResult | None]) -> None:
            if (other := states[second.name]) is not None and other.ended:
                held.close()

        results = sweep(config, release, told.append)
    assert [result.status for result in results.values()] == ["finished"] * 2
    me = process_name(os.getpid())
    assert told[3:] == [f"{first.name} is in use by {me}: the other runs go on, and it is tried again"]


def test_a_worker_gives_back_a_run_whose_folder_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process takes the folder between the pool's look and the worker's."""
    monkeypatch.setattr(train_module, "_PATIENCE", 0.0)
    first, second = plan(tiny(tmp_path, conditions=["SGD"]))
    queue = pool._Queue([first, second], print)
    waiting = deque([second])
    with Recorder(first.folder.path), pytest.raises(FolderInUse) as error:
        worker.run_one(first.config, os.getpid())
    queue._settle(first, error.value, waiting)
    assert list(waiting) == [second, first]
    assert list(queue.left) == [first.name, second.name]
    assert first.folder.result() is None  # it did not fail


def test_a_worker_that_is_stopped_has_an_attempt_less(tmp_path: Path) -> None:
    first, *_ = plan(tiny(tmp_path, conditions=["SGD"]))
    queue = pool._Queue([first], print)
    waiting: deque[PlannedRun] = deque()
    for _ in range(worker.ATTEMPTS):
        queue._settle(first, KeyboardInterrupt(), waiting)
    assert (queue.left, len(waiting)) == ({}, 1)  # after the first; before the last it must run alone
    result = first.folder.result()
    assert result is not None
    assert result.reason == "its process ended 3 times: killed, or out of memory?"


def test_a_process_that_does_not_touch_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, *_), now = plan(tiny(tmp_path, conditions=["SGD"])), 1000.0
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: now)
    told: list[str] = []
    monitor = sweep_module._Monitor([run], None, told.append)

    def after(seconds: float) -> int:
        nonlocal now
        now += seconds
        monitor._tell()
        return len(told)

    with Recorder(run.folder.path):
        run.folder.write_result(RunResult(run.folder.path))
        run.folder.write_config(run.config)
        assert [after(seconds) for seconds in (0, 299, 1, 1000)] == [0, 0, 1, 1]
        me = process_name(os.getpid())
        assert told[0].startswith(f"{run.name}: {me} has not touched its folder for 5 minutes; if it hangs")
        os.utime(run.folder.path / "metrics" / ".lock", (2**32, 2**32))
        assert [after(seconds) for seconds in (1, 299, 1)] == [1, 1, 2]  # it went on, and stands still again
        os.utime(run.folder.path / "metrics" / ".lock", (2**33, 2**33))
    assert [after(seconds) for seconds in (1, 1000)] == [2, 2]  # nobody is there who could be named


def test_a_stopped_sweep_leaves_no_run_running_unless_a_process_is_at_work_in_it(tmp_path: Path) -> None:
    (run, *_) = plan(tiny(tmp_path, conditions=["SGD"]))
    run.folder.path.mkdir()
    run.folder.write_result(RunResult(run.folder.path))
    run.folder.write_config(run.config)
    with Recorder(run.folder.path):
        worker.keep_interrupted(run.config)
        assert how_many(tmp_path, "running") == 1
    worker.keep_interrupted(run.config)
    assert how_many(tmp_path, "interrupted") == 1
    run.folder.write_result(RunResult(run.folder.path, "finished"))
    worker.keep_interrupted(run.config)
    assert how_many(tmp_path, "finished") == 1


def test_threads_that_are_not_given_are_one_and_so_a_sweep_goes_on(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(1, rates=1, threads=None)
    config = tiny(tmp_path, conditions=["SGD"], protocol=protocol, workers=1)
    assert plan(config)[0].config.protocol.threads == 1
    sweep(config)
    assert len(sweep(config)) == 1


def test_runs_that_the_sweep_no_longer_plans_are_named(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(1, rates=1, seeds=2), workers=1)
    sweep(config)
    fewer = replace(config, protocol=replace(config.protocol, seeds=1))
    sweep(fewer)
    table = sweep_table(tmp_path)
    assert table.missing == {"digits-SGD-rate1-seed1": "sweep.yaml does not plan it"}
    assert table.cells["ended"].tolist() == [1]


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(epochs=2, rates=[1e9, 1.0]), workers=1
    )
    results = list(sweep(config).values())
    assert [result.status for result in results] == ["diverged", "finished"]
    assert ended(plan(config)[0])
    row = sweep_table(tmp_path).cells.iloc[0]
    assert (row["ended"], row["diverged"], row["rate"]) == (2, 1, 1.0)


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


def _poisoned(name: str, config: Any, sweeper: int) -> str:
    if Path(config.output).name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return _run_one(config, sweeper)


def test_an_estimate_does_not_depend_on_whether_a_run_would_diverge(tmp_path: Path) -> None:
    config = tiny(tmp_path, conditions=["uSF"], optimizer=OptimizerConfig(lr=1e9))
    assert estimate(plan(config))["digits-uSF-rate1-seed0"].seconds > 0


def test_the_time_left_goes_by_what_this_sweep_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(
        tiny(tmp_path, conditions=["SGD", "uSF"], protocol=SweepProtocolConfig(epochs=4, rates=[1.0, 0.1]))
    )
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    clock = console._SweepClock(runs)
    states: dict[str, Any] = dict.fromkeys(names(runs))
    finished, failed = RunResult(tmp_path, "finished", epoch=4), RunResult(tmp_path, "failed", epoch=0)
    states |= {runs[0].name: finished, runs[1].name: failed}  # by an earlier sweep
    assert clock.left(states) is None
    states |= {runs[1].name: RunResult(tmp_path, "running", epoch=2)}
    assert clock.left(states) == pytest.approx(10 / 0.5 * 2.5)  # half a run in ten seconds, 2.5 are left
    states |= {runs[1].name: finished, runs[2].name: failed}
    assert clock.left(states) == pytest.approx(30 / 2 * 1)


def test_epochs_weigh_what_a_rehearsal_took_where_datasets_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(tiny(tmp_path, conditions=["SGD"], datasets=["digits", "MNIST"]))
    seconds = {run.name: 9.0 if run.dataset == "MNIST" else 1.0 for run in runs}
    monkeypatch.setattr(
        estimates,
        "estimate",
        lambda left: {r.name: estimates.Estimate(seconds[r.name], 0) for r in left},
    )
    clock = console._SweepClock(runs)
    clock.left(dict.fromkeys(names(runs)))
    assert clock._weight == seconds


def test_an_estimate_is_near_what_a_run_takes_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=partial(next, itertools.count()))
    monkeypatch.setattr(estimates, "time", clock)  # a second for each step, on every machine
    config = tiny(tmp_path, conditions=["frSF"], protocol=SweepProtocolConfig(epochs=4, rates=1), workers=1)
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


def test_a_dry_run_shows_the_runs_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tiny(tmp_path / "sweep"), tmp_path / "sweep.yaml")
    assert main(["sweep", str(path), "--dry-run", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names(plan(tiny(tmp_path))))
    assert "6 runs, 6 of them to be run: about" in out
    assert "with 2 at a time" in out
    assert "--record.weights best keeps less" in out
    assert not (tmp_path / "sweep").exists()


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
    assert "'nothing' is no part of a condition" in capsys.readouterr().err


# what follows runs the command in a process of its own, and kills


def started(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "feedbackhook", "sweep", str(config), "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # where it is ignored
    )


def children(pid: int) -> list[int]:
    """The processes that a sweep or a worker has begun."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and not one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + HANG
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_changes(count: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the files of a sweep have changed so often: a moment in a run, at the pace of the machine."""
    for _ in range(count):
        before = times(folder)
        wait_for(lambda before=before: times(folder) != before, process)


def times(folder: Path) -> dict[Path, int]:
    """When each file was changed."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed since
            found[path] = path.stat().st_mtime_ns
    return found


def undisturbed(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors.decode()


def how_many(folder: Path, status: str) -> int:
    return sum(json.loads(path.read_text())["status"] == status for path in folder.glob("*/status.json"))


GRID = {
    "conditions": ["SGD", "uSF+BN+BM", "brSF+BN+BM concordance=0.5", "RndF+BN+BM"],
    "data": DataConfig(held_out=0.1),
    "model": SweepModelConfig(),
    "protocol": SweepProtocolConfig(epochs=2, rates=3, seeds=2),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The table of 24 runs of the paper's network, by two workers that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    undisturbed(started(written(tiny(folder / "sweep", **GRID), folder / "sweep.yaml")))
    return table_of(folder / "sweep")


def table_of(folder: Path) -> str:
    runs = plan(stored(folder))
    assert len(runs) == 24
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names(runs))
    found = sweep_table(folder)
    assert not found.missing
    assert (found.cells["ended"] == 6).all()
    content: str = found.cells.to_csv(index=False)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 1])
def test_a_killed_worker_changes_nothing(tmp_path: Path, table: str, moment: int) -> None:
    process = started(written(tiny(tmp_path / "sweep", **GRID), tmp_path / "sweep.yaml"))
    folder = tmp_path / "sweep"
    wait_for(lambda: how_many(folder, "finished") >= 4 + 8 * moment, process)
    wait_for_changes(random.Random(moment).randint(0, 16), folder, process)
    os.kill(random.Random(moment).choice(children(process.pid)), signal.SIGKILL)
    undisturbed(process)
    assert table_of(folder) == table


@pytest.mark.slow
def test_a_sweep_that_is_killed_three_times_goes_on_to_the_same_table(tmp_path: Path, table: str) -> None:
    path, folder = written(tiny(tmp_path / "sweep", **GRID), tmp_path / "sweep.yaml"), tmp_path / "sweep"
    moments = random.Random(5)
    for kill in range(3):
        process = started(path)
        wait_for(lambda least=5 * kill: how_many(folder, "finished") > least, process)
        wait_for_changes(moments.randint(0, 16), folder, process)
        process.kill()
        process.wait()
    undisturbed(started(path))
    assert table_of(folder) == table


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_sweep_that_is_asked_to_stop_leaves_no_run_running(tmp_path: Path, number: int) -> None:
    """SIGTERM goes to the sweep, and Ctrl-C, as from a terminal, to its workers, too."""
    long = replace(tiny(tmp_path / "sweep").protocol, epochs=10_000)
    process = started(written(tiny(tmp_path / "sweep", protocol=long), tmp_path / "sweep.yaml"))
    wait_for(lambda: how_many(tmp_path / "sweep", "running") == 2, process)
    left = children(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert how_many(tmp_path / "sweep", "running") == 0
    assert how_many(tmp_path / "sweep", "interrupted") == 2
    assert not any(runs(pid) for pid in left)


def test_workers_stop_with_the_sweep(tmp_path: Path) -> None:
    """Else a run would go on beside the one of the next sweep."""
    long = replace(tiny(tmp_path / "sweep").protocol, epochs=10_000)
    process = started(written(tiny(tmp_path / "sweep", protocol=long), tmp_path / "sweep.yaml"))
    wait_for(lambda: how_many(tmp_path / "sweep", "running") == 2, process)
    left = children(process.pid)
    assert len(left) >= 2
    process.kill()
    process.wait()
    until = time.monotonic() + HANG
    while any(runs(pid) for pid in left):
        assert time.monotonic() < until, "a worker outlived its sweep"
        time.sleep(0.1)


def test_a_sweep_begins_with_its_networks_data_and_rules(tmp_path: Path) -> None:
    conditions = {
        "backprop": {"feedback": {"mode": None}},
        "signs": {"feedback": {"mode": "sign"}},
        "normalised": {"feedback": {"mode": "sign"}, "model": {"batch_norm": "affine"}},
        "large": {"data": {"size": 28}, "model": {"name": "liao2016/cifar"}},
    }
    once = SweepProtocolConfig(epochs=1, rates=1, device="cpu")
    config = tiny(tmp_path, conditions=conditions, protocol=once, model=SweepModelConfig("liao2016/mnist"))
    config = replace(config, data=replace(config.data, size=28))
    told: list[str] = []
    results = sweep(config, tell=told.append)
    assert [result.status for result in results.values()] == ["finished"] * 3 + ["failed"]
    counts = "digits: 1,293 training, 144 held out, 360 test, 10 classes"
    lines = [line for line in told if "digits: " in line]
    assert lines == [
        f"liao2016/mnist on 1x28x28 pixels, 431,080 parameters; {counts}; backprop, sign; cpu",
        # two more for each of 20 and 50 maps and 500 units
        f"liao2016/mnist on 1x28x28 pixels, {431_080 + 2 * 570:,} parameters; {counts}; sign; cpu",
        "digits: liao2016/cifar cannot be trained (liao2016/cifar takes images of 32x32, not 28x28: set "
        "data.size to 32); sign; cpu",
    ]
