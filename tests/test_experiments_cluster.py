"""A sweep on a cluster: a real scheduler and worker processes on the loopback address."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pandas as pd
import pytest
from bounds import HANG
from test_experiments_sweep import children, how_many, runs, tiny, written

import feedbackhook
from feedbackhook.cli import main
from feedbackhook.experiments import cluster, worker
from feedbackhook.experiments import sweep as sweep_module
from feedbackhook.experiments.config import ClusterConfig, ConfigError, SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.plan import PlannedRun, plan, stored
from feedbackhook.experiments.sweep import sweep
from feedbackhook.recorder import Recorder, holder, process_name
from feedbackhook.report.tables import sweep_table

LOOPBACK = {"scheduler_options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
DASK = [sys.executable, "-m", "dask"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Machines:
    """A scheduler, and workers that come and go."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        self._environment = ENVIRONMENT | environment
        self.workers: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file)
        )
        wait_until(self.file.exists)

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{kind}-{time.monotonic_ns()}.log").open("wb")
        command = [*DASK, kind, *options, "--dashboard-address", "127.0.0.1:0"]
        return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def add_worker(self, threads: int = 1) -> None:
        options = ("--scheduler-file", str(self.file), "--host", "127.0.0.1", "--no-nanny")
        local = ("--nthreads", str(threads), "--local-directory", str(self.folder))
        name = ("--name", f"worker-{len(self.workers)}")
        self.workers.append(self._start("worker", *options, *local, *name))

    def _of_scheduler(self, ask: Callable[..., Any], *given: Any) -> Any:
        with distributed.Client(scheduler_file=str(self.file)) as client:
            return client.run_on_scheduler(ask, *given)

    def take_for_lost(self, worker: subprocess.Popen[bytes]) -> None:
        """What the scheduler does when it has not heard of a worker for long."""

        async def remove(name: str, dask_scheduler: Any) -> None:
            address = dask_scheduler.aliases[name]
            await dask_scheduler.remove_worker(address, stimulus_id="taken-for-lost")

        self._of_scheduler(remove, f"worker-{self.workers.index(worker)}")

    def given_back(self) -> set[str]:
        """The runs that wait for their folders."""

        def ask(dask_scheduler: Any) -> set[str]:
            workers = dask_scheduler.workers.values()
            return {task.key[1] for worker in workers for task in worker.long_running}

        found: set[str] = self._of_scheduler(ask)
        return found

    def has_a_sweep(self) -> bool:
        """Whether a client waits for runs."""

        def ask(dask_scheduler: Any) -> bool:
            clients = dask_scheduler.clients.items()
            return any(state.wants_what for name, state in clients if name != "fire-and-forget")

        found: bool = self._of_scheduler(ask)
        return found

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


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


def wait_until(condition: Callable[[], bool]) -> None:
    """However slow the machine is: only the test runner sets a limit."""
    while not condition():
        time.sleep(0.05)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cluster": ClusterConfig(address="tcp://a:1")}, "no effect with backend joblib"),
        ({"backend": "dask"}, "needs cluster.address, of a scheduler that runs, or cluster.slurm"),
        (
            {"backend": "dask", "cluster": ClusterConfig(address="tcp://a:1", slurm={"cores": 1})},
            "needs cluster.address, of a scheduler that runs, or cluster.slurm",
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
        (HERE._replace(sees_folder=False), "does not see .*sweep: give an output on a file system that all"),
        (HERE._replace(sees_lock=False), r"can lock .*sweep/\.lock, which this machine has locked"),
        (HERE._replace(gpus=1), "has 4 threads, and its 1 GPUs take 2 runs: .* --nthreads 2"),
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
        """One look in vain, and the next when others have gone."""
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
    assert cluster._run(config, ".", 1)
    assert statuses == [0]
    assert not cluster._run(config, ".", 1)


@pytest.fixture
def one_worker() -> Iterator[Any]:
    """A scheduler and a worker that does one run at a time, in this process."""
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as made:
        yield made


def three(folder: Path) -> tuple[SweepConfig, list[PlannedRun]]:
    config = tiny(folder / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(1, rates=1, seeds=3))
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
        command = [sys.executable, "-m", "feedbackhook.experiments.worker"]
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
    code += "from feedbackhook.experiments.cluster import job_queue; job_queue(); "
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


# what follows takes minutes


@pytest.mark.slow
def test_jobs_of_slurm_run_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of SLURM two scripts, which start a job as a process and end it."""
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
    protocol = SweepProtocolConfig(epochs=150, rates=1, seeds=2)
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=protocol)
    path, folder = written(on(there, config), tmp_path / "sweep.yaml"), tmp_path / "sweep"
    process = started(path)
    wait_until(lambda: how_many(folder, "running") == 1)
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0].decode()
    assert process.returncode == 130, out
    assert "interrupted; the same command goes on" in out
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
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(10_000, rates=1))
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
    config = tiny(tmp_path / "sweep", conditions=["SGD"], protocol=SweepProtocolConfig(10_000, rates=1))
    process = started(written(on(there, config), tmp_path / "sweep.yaml"))
    wait_until(lambda: how_many(tmp_path / "sweep", "running") == 1)
    left = children(there.workers[0].pid)
    there.scheduler.kill()
    out = process.communicate()[0].decode()
    assert process.returncode == 2, out
    assert "the same command goes on when it is there again" in out
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
    grid = tiny(tmp_path / "sweep", protocol=SweepProtocolConfig(2, rates=[10.0, 1.0, 0.1, 0.01], seeds=4))
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
