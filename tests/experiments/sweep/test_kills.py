"""Sweeps in a separate process that is killed or asked to stop."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from support.bounds import HANG
from support.sweeps import children, how_many, names, runs, tiny, written

from feedbackhook.experiments.config import (
    DataConfig,
    SweepModelConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.report.aggregate import sweep_table


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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + HANG
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_changes(count: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the files of a sweep have changed `count` times: a moment in a run at the machine's pace."""
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


GRID = {
    "conditions": ["SGD", "uSF+BN+BM", "brSF+BN+BM concordance=0.5", "RndF+BN+BM"],
    "data": DataConfig(val_fraction=0.1),
    "model": SweepModelConfig(),
    "protocol": SweepProtocolConfig(epochs=2, lr_factors=3, seeds=2),
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


@pytest.mark.slow
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
