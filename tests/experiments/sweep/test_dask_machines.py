"""A sweep on a cluster: a real scheduler and worker processes on the loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from support.machines import ENVIRONMENT, LOOPBACK, Machines, wait_until
from support.sweeps import children, how_many, runs, tiny, written

import feedbackhook
from feedbackhook.cli import main
from feedbackhook.experiments.config import ClusterConfig, SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.store.locks import holder, process_name


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[..., Machines]]:
    with ExitStack() as stack:

        def start(workers: int, **environment: str) -> Machines:
            folder = tmp_path / "machines"
            folder.mkdir()
            made = Machines(folder, **environment)
            stack.callback(made.close)
            for _ in range(workers):
                made.add_worker()
            return made

        yield start


def on(machines: Machines, config: SweepConfig) -> SweepConfig:
    return replace(config, backend="dask", cluster=ClusterConfig(address=str(machines.file)))


def started(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "feedbackhook", "sweep", str(config)]
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # where it is ignored
    )


def rows(folder: Path) -> pd.DataFrame:
    """All that the runs of a sweep have recorded, in an order of its own."""
    table = feedbackhook.read(folder)
    return table.sort_values([*table.columns]).reset_index(drop=True)


def assert_equal(folder: Path, reference: Path) -> None:
    """The same table, and of each run the same rows to the last bit: none lost, none doubled."""
    ours, theirs = sweep_table(folder), sweep_table(reference)
    assert not ours.missing
    assert ours.cells.to_csv() == theirs.cells.to_csv()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        path.name for path in reference.iterdir() if path.is_dir()
    }
    pd.testing.assert_frame_equal(rows(folder), rows(reference), check_exact=True)


@pytest.mark.slow
def test_a_sweep_on_a_cluster_is_that_of_one_machine(
    tmp_path: Path, machines: Callable[..., Machines], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "sweep", conditions=["brSF concordance=0.5"])
    there = machines(1)
    path = written(on(there, config), tmp_path / "sweep.yaml")
    assert main(["sweep", str(path)]) == 0
    out = capsys.readouterr().out
    assert "dashboard: http://127.0.0.1:" in out
    assert "1 workers, 1 runs at a time" in out
    assert "2 finished" in out
    assert stored(tmp_path / "sweep").cluster.address == str(there.file)
    sweep(replace(config, output=str(tmp_path / "reference")))
    assert_equal(tmp_path / "sweep", tmp_path / "reference")


# what follows takes minutes
@pytest.mark.slow
def test_jobs_of_slurm_run_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of SLURM, two scripts that start a job as a process and end it."""
    job = tmp_path / "job"
    commands = {
        "sbatch": f'cp "$1" {job}\nsetsid bash {job} > {job}.log 2>&1 &\necho Submitted batch job $!',
        "scancel": 'kill -- "-$1"',
    }
    for name, content in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = {"cores": 2, "memory": "4GB", "local_directory": str(tmp_path), **LOOPBACK}
    config = tiny(tmp_path / "sweep", conditions=["brSF concordance=0.5"])
    told: list[str] = []
    results = sweep(replace(config, backend="dask", cluster=ClusterConfig(slurm=asked)), tell=told.append)
    assert {result.status for result in results.values()} == {"finished"}
    assert "1 workers, 2 runs at a time" in told
    sweep(replace(config, output=str(tmp_path / "reference")))
    assert_equal(tmp_path / "sweep", tmp_path / "reference")


@pytest.mark.slow
def test_an_interrupted_sweep_stops_its_runs_and_goes_on(
    tmp_path: Path, machines: Callable[..., Machines]
) -> None:
    there = machines(1)
    protocol = SweepProtocolConfig(epochs=150, lr_factors=1, seeds=2)
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=protocol)
    path, folder = written(on(there, config), tmp_path / "sweep.yaml"), tmp_path / "sweep"
    process = started(path)
    wait_until(lambda: how_many(folder, "running") == 1)
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0].decode()
    assert process.returncode == 130, out
    assert "interrupted; rerun the same command to resume" in out
    wait_until(lambda: how_many(folder, "interrupted") == 1)
    assert how_many(folder, "running") == 0  # nor has the second begun
    again = started(path)
    out = again.communicate()[0].decode()
    assert again.returncode == 0, out
    assert "2 finished" in out


@pytest.mark.slow
def test_a_run_whose_process_is_killed_three_times_fails(
    tmp_path: Path, machines: Callable[..., Machines]
) -> None:
    there = machines(1)
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(10_000, lr_factors=1))
    process = started(written(on(there, config), tmp_path / "sweep.yaml"))
    worker = there.workers[0].pid
    killed: set[int] = set()
    while len(killed) < 3:
        wait_until(lambda: bool(set(children(worker)) - killed))
        victim = (set(children(worker)) - killed).pop()
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    out = process.communicate()[0].decode()
    assert process.returncode == 1, out
    assert "failed: its process ended 3 times: killed, or out of memory?" in out


@pytest.mark.slow
def test_a_scheduler_that_ends_is_named_and_the_runs_end_with_it(
    tmp_path: Path, machines: Callable[..., Machines]
) -> None:
    there = machines(1)
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(10_000, lr_factors=1))
    process = started(written(on(there, config), tmp_path / "sweep.yaml"))
    wait_until(lambda: how_many(tmp_path / "sweep", "running") == 1)
    left = children(there.workers[0].pid)
    there.scheduler.kill()
    out = process.communicate()[0].decode()
    assert process.returncode == 2, out
    assert "start it again, then rerun the same command to resume" in out
    wait_until(lambda: not any(runs(pid) for pid in left))


def frozen_at_work(worker: int, folder: Path) -> tuple[list[int], str]:
    """Stop a worker and its process while that holds a run's folder: their IDs, and the run."""
    while True:
        os.kill(worker, signal.SIGSTOP)  # it begins no other run while we look
        stopped = [worker]
        for child in children(worker):
            os.kill(child, signal.SIGSTOP)
            stopped.append(child)
            for run in folder.glob("*/metrics"):
                if holder(run.parent) == process_name(child):
                    return stopped, run.parent.name
        thaw(stopped)
        time.sleep(0.05)


def thaw(frozen: list[int]) -> None:
    for pid in reversed(frozen):
        if runs(pid):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_48_runs_with_a_killed_a_stopped_worker_and_a_killed_client(
    tmp_path: Path, machines: Callable[..., Machines]
) -> None:
    """The scheduler takes the stopped worker for lost, and gives its run to another, which gives it back."""
    grid = tiny(
        tmp_path / "sweep", protocol=SweepProtocolConfig(2, lr_factors=[10.0, 1.0, 0.1, 0.01], seeds=4)
    )
    assert len(plan(grid)) == 48
    reference = replace(grid, output=str(tmp_path / "reference"), workers=2)
    sweep(reference)

    there = machines(3)
    path, folder = written(on(there, grid), tmp_path / "sweep.yaml"), tmp_path / "sweep"
    killed, stopped, _ = there.workers
    client = started(path)
    wait_until(lambda: how_many(folder, "finished") >= 6)
    killed.kill()
    killed.wait()

    wait_until(lambda: how_many(folder, "finished") >= 12)
    frozen, held = frozen_at_work(stopped.pid, folder)
    there.take_for_lost(stopped)
    wait_until(lambda: held in there.given_back())

    def more(count: int) -> None:
        """All but the run that is held can end."""
        least = min(how_many(folder, "finished") + count, 47)
        wait_until(lambda: how_many(folder, "finished") >= least)

    more(2)
    client.kill()
    client.wait()
    more(3)  # the cluster goes on without it
    client = started(path)
    wait_until(there.has_a_sweep)
    more(1)
    thaw(frozen)
    out = client.communicate()[0].decode()
    assert client.returncode == 0, out
    assert how_many(folder, "finished") + how_many(folder, "diverged") == 48
    assert_equal(folder, tmp_path / "reference")
