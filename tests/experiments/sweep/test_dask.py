"""How a sweep uses a cluster: checks, GPUs, SLURM jobs, and runs that are given back."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pytest
from support.bounds import HANG
from support.machines import ENVIRONMENT, LOOPBACK, wait_until
from support.run_folders import leave_run
from support.sweeps import tiny

from feedbackhook.experiments.config import (
    ClusterConfig,
    ConfigError,
    RunConfig,
    SweepConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep import dask as cluster
from feedbackhook.experiments.sweep import run as sweep_module
from feedbackhook.experiments.sweep import worker
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.experiments.sweep.pruning import run_in_stages
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.store.recorder import Recorder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cluster": ClusterConfig(address="tcp://a:1")}, "no effect with backend joblib"),
        ({"backend": "dask"}, "needs either cluster.address .of a running scheduler. or cluster.slurm"),
        (
            {"backend": "dask", "cluster": ClusterConfig(address="tcp://a:1", slurm={"cores": 1})},
            "needs either cluster.address .of a running scheduler. or cluster.slurm",
        ),
        ({"backend": "dask", "workers": 3}, "workers has no effect with backend dask"),
        (
            {"backend": "dask", "cluster": ClusterConfig(address="tcp://a:1", jobs=0)},
            "cluster.jobs must be 1 or more",
        ),
        (
            {"backend": "dask", "cluster": ClusterConfig(address="tcp://a:1", runs_per_gpu=0)},
            "cluster.runs_per_gpu must be 1 or more",
        ),
        (
            {"backend": "dask", "cluster": ClusterConfig(address="tcp://a:1", gpus=-1)},
            "cluster.gpus must be 0 or more",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_cluster_that_cannot_be_is_one_clear_error(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, **given))


def test_no_scheduler_at_the_address_stops_the_sweep_before_its_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask = pytest.importorskip("dask")
    nobody = ClusterConfig(address="tcp://127.0.0.1:9")
    config = tiny(tmp_path / "sweep", backend="dask", cluster=nobody)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ConfigError, match=r"no scheduler answers at cluster\.address tcp://127\.0\.0\.1:9"),
    ):
        sweep(config)
    assert not (tmp_path / "sweep").exists()


class FakeClient:
    def __init__(self, view: Any, threads: int = 1) -> None:
        self._view, self._threads = view, threads

    def nthreads(self) -> dict[str, int]:
        return {"tcp://far": self._threads}

    def run(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"tcp://far": self._view}


HERE = cluster._View(cluster._versions(), 0, True, True)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (ModuleNotFoundError("No module named 'feedbackhook'"), "cannot run feedbackhook: No module named"),
        (HERE._replace(versions={**HERE.versions, "torch": "1.0"}), "has torch 1.0, this machine"),
        (
            HERE._replace(sees_folder=False),
            "does not see .*sweep: choose an output on a file system that",
        ),
        (HERE._replace(sees_lock=False), r"can lock .*sweep/\.lock although this machine has locked it"),
        (HERE._replace(gpus=1), "has 4 threads, but its 1 GPUs take only 2 runs: .* --nthreads 2"),
    ],
    ids=["import", "version", "folder", "lock", "gpu"],
)
def test_a_worker_that_cannot_do_it_is_named(tmp_path: Path, view: Any, message: str) -> None:
    config = tiny(tmp_path / "sweep", cluster=ClusterConfig(address="tcp://a:1", runs_per_gpu=2))
    with pytest.raises(ConfigError, match=f"the worker tcp://far {message}"):
        cluster.Cluster(FakeClient(view, 4), config).check()
    cluster.Cluster(FakeClient(HERE._replace(gpus=2), 4), config).check()
    on_cpu = replace(config, protocol=replace(config.protocol, device="cpu"))
    cluster.Cluster(FakeClient(HERE._replace(gpus=1), 4), on_cpu).check()


def test_a_worker_sees_whether_the_folder_and_its_lock_are_shared(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    assert cluster._look(folder)[2:] == (False, False)
    with sweep_module._alone(folder):
        assert cluster._look(folder)[2:] == (True, True)
        (folder / "keep").touch()
    assert cluster._look(folder)[2:] == (True, False)


def test_gpus_are_shared_out_evenly_and_no_more_runs_have_one_than_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cluster, "_visible_gpus", lambda: ["2", "5"])
    had: list[str] = []
    looked, freed = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        """Look once in vain; look again when others have gone."""
        looked.set()
        assert freed.wait(HANG)

    monkeypatch.setattr(cluster, "time", SimpleNamespace(sleep=sleep))
    with ExitStack() as all_slots:
        first = all_slots.enter_context(cluster._gpu("auto", 2))
        with ExitStack() as rest:
            given = [first, *(rest.enter_context(cluster._gpu("cuda", 2)) for _ in range(3))]
            assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["2", "5", "2", "5"]

            def wait_for_one() -> None:
                with cluster._gpu("auto", 2) as late:
                    had.append(late["CUDA_VISIBLE_DEVICES"])

            waiting = threading.Thread(target=wait_for_one, daemon=True)
            waiting.start()
            wait_until(lambda: looked.is_set() or not waiting.is_alive())
            assert had == []
        freed.set()
        waiting.join(HANG)
        assert had == ["5"]
        with cluster._gpu("cpu", 1) as none, cluster._gpu("cuda:1", 1) as certain:
            assert none == certain == {}


def test_visible_gpus_are_those_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-4f1c")
    assert cluster._visible_gpus() == ["3", "GPU-4f1c"]


def test_a_run_whose_process_is_killed_each_time_has_used_up_its_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses = [-9, 1, -9, 0]
    monkeypatch.setattr(cluster, "_run_child", lambda *_: statuses.pop(0))
    config = plan(tiny(Path("sweep")))[0].config
    assert cluster._run(config, None, ".", 1)
    assert statuses == [0]
    assert not cluster._run(config, None, ".", 1)


@pytest.fixture
def one_worker() -> Iterator[Any]:
    """A scheduler and a worker that does one run at a time, in this process."""
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as made:
        yield made


def three(folder: Path) -> tuple[SweepConfig, list[PlannedRun]]:
    config = tiny(
        folder / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(1, lr_factors=1, seeds=3)
    )
    return config, plan(config)


@pytest.mark.parametrize("client_goes", [False, True], ids=["with its client", "without"])
def test_a_worker_that_finds_a_folder_in_use_takes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: Any, client_goes: bool
) -> None:
    config, planned = three(tmp_path)
    first, second, third = (run.name for run in planned)
    begun: list[str] = []
    monkeypatch.setattr(cluster, "_run_child", lambda run, *_: begun.append(Path(run.output).name) or 0)
    with distributed.Client(one_worker) as client:
        with Recorder(planned[0].folder.path):
            futures = cluster.Cluster(client, config)._submit(planned, 0)
            assert client.gather(futures[1:]) == [False, False]
            assert begun == [second, third]
            assert not futures[0].done()
            if client_goes:
                client.close()
        if client_goes:
            wait_until(lambda: len(begun) == 3)
        else:
            assert futures[0].result() is False
    assert begun == [second, third, first]


def test_a_run_whose_process_finds_its_folder_in_use_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: Any
) -> None:
    """As when another process takes the folder between the worker's look and its process's."""
    config, planned = three(tmp_path)
    statuses = [worker.IN_USE, 0]
    monkeypatch.setattr(cluster, "_run_child", lambda *_: statuses.pop(0))
    with distributed.Client(one_worker) as client:
        (future,) = cluster.Cluster(client, config)._submit(planned[:1], 0)
        assert future.result() is False
    assert statuses == []


def test_the_process_of_a_run_says_that_its_folder_is_in_use(tmp_path: Path) -> None:
    config = three(tmp_path)[1][0].config
    with Recorder(str(config.output)):
        command = [sys.executable, "-m", "feedbackhook.experiments.sweep.worker"]
        message = pickle.dumps((config, os.getpid()))
        assert subprocess.run(command, input=message, env=ENVIRONMENT).returncode == worker.IN_USE


def test_a_sweep_that_stops_begins_no_run_that_was_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: Any
) -> None:
    config, planned = three(tmp_path)
    begun: list[str] = []
    monkeypatch.setattr(cluster, "_run_child", lambda run, *_: begun.append(run.output) or 0)
    scheduler = one_worker.scheduler
    with distributed.Client(one_worker) as client, Recorder(planned[0].folder.path):
        at_work = cluster.Cluster(client, config)
        at_work._submit(planned[:1], 0)
        wait_until(lambda: any(state.long_running for state in scheduler.workers.values()))
        at_work._stop()
        wait_until(lambda: not scheduler.tasks)
        wait_until(lambda: not any(w.state.tasks for w in one_worker.workers.values()))
    assert begun == []


def test_ctrl_c_is_what_it_was_after_the_import_of_job_queues() -> None:
    code = "import signal; before = signal.getsignal(signal.SIGINT); "
    code += "from feedbackhook.experiments.sweep.dask import job_queue; job_queue(); "
    code += "assert signal.getsignal(signal.SIGINT) is before"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("cluster_options", "lines"),
    [
        ({"slurm": {"cores": 6, "queue": "long"}}, ["-p long", "--nthreads 3"]),
        ({"slurm": {"cores": 8}, "gpus": 2, "runs_per_gpu": 3}, ["--gres=gpu:2", "--nthreads 6"]),
        (
            {"slurm": {"cores": 8, "job_extra_directives": ["--gpus=1"]}, "gpus": 1},
            ["#SBATCH --gpus=1", "--nthreads 1"],
        ),
    ],
    ids=["cpu", "gpu", "own"],
)
def test_a_job_asks_for_what_is_given(
    monkeypatch: pytest.MonkeyPatch, cluster_options: dict[str, Any], lines: list[str]
) -> None:
    jobqueue = cluster.job_queue()
    asked: list[Any] = []
    monkeypatch.setattr(jobqueue.SLURMCluster, "adapt", lambda _, **jobs: asked.append(jobs))
    slurm = {"memory": "4GB", **LOOPBACK, **cluster_options.pop("slurm")}
    with cluster._slurm(ClusterConfig(slurm=slurm, **cluster_options, jobs=5), threads=2) as jobs:
        script = jobs.job_script()
    assert asked == [{"minimum_jobs": 5, "maximum_jobs": 5}]
    assert all(line in script for line in lines)
    assert script.count("gpu") == (1 if "gpus" in cluster_options else 0)


def test_a_wrong_option_of_slurm_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.slurm: .*quue"):
        cluster._slurm(ClusterConfig(slurm={"cores": 1, "memory": "1GB", "quue": "long", **LOOPBACK}), 1)
    with pytest.raises(ConfigError, match=r"cluster\.slurm: You must specify how much cores and memory"):
        cluster._slurm(ClusterConfig(slurm={}), 1)


def test_a_cluster_prunes_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: Any
) -> None:
    """The scheduler must not take the second stage of a run for the first, which it has done."""
    asked: list[tuple[str, int | None]] = []

    def run_child(run: RunConfig, until: int | None, *_: Any) -> int:
        asked.append((Path(str(run.output)).name, until))
        epoch = until or run.protocol.epochs
        shutil.rmtree(str(run.output), ignore_errors=True)
        error = 20.0 if "rate0.1-" in str(run.output) else 10.0
        curve = [(90.0, 90.0), *[(error, error)] * epoch]
        leave_run(run, curve, epoch, "paused" if until else "finished")
        return 0

    monkeypatch.setattr(cluster, "_run_child", run_child)
    config = tiny(tmp_path / "sweep", conditions=["SGD"])
    planned = plan(config)
    with distributed.Client(one_worker) as client:
        run_in_stages(planned, [1], cluster.Cluster(client, config).run_all)
    first, second = (run.name for run in planned)
    assert sorted(asked, key=str) == sorted([(first, 1), (second, 1), (first, None)], key=str)
    results = [run.folder.result() for run in planned]
    assert [result and result.status for result in results] == ["finished", "pruned"]
