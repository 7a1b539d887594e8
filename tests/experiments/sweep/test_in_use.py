"""Folders that another process holds, and processes that hang or stop."""

from __future__ import annotations

import os
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.sweeps import how_many, tiny

from feedbackhook.experiments.config import (
    ConfigError,
    FolderInUse,
    SweepProtocolConfig,
)
from feedbackhook.experiments.stored import write_config
from feedbackhook.experiments.sweep import local as pool
from feedbackhook.experiments.sweep import run as sweep_module
from feedbackhook.experiments.sweep import worker
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.experiments.training import run as train_module
from feedbackhook.store.locks import process_name
from feedbackhook.store.recorder import Recorder
from feedbackhook.store.run_folder import RunResult


def test_two_sweeps_at_work_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "sweep", workers=1)
    with (
        sweep_module._alone(tmp_path / "sweep"),
        pytest.raises(ConfigError, match="another sweep is at work"),
    ):
        sweep(config)
    assert not list((tmp_path / "sweep").glob("digits*"))


def test_a_run_whose_folder_is_in_use_makes_way_for_the_others(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(1, lr_factors=[1.0, 0.1])
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
    held = f"{first.name} is in use by {me}"
    assert told[3:] == [f"{held}: the other runs continue, and it is tried again later"]


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
        write_config(run.folder, run.config)
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
    write_config(run.folder, run.config)
    with Recorder(run.folder.path):
        worker.keep_interrupted(run.config)
        assert how_many(tmp_path, "running") == 1
    worker.keep_interrupted(run.config)
    assert how_many(tmp_path, "interrupted") == 1
    run.folder.write_result(RunResult(run.folder.path, "finished"))
    worker.keep_interrupted(run.config)
    assert how_many(tmp_path, "finished") == 1
