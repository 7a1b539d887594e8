"""Run a sweep on a cluster, with dask.distributed.

The scheduler has one task for each run. A task starts a separate process for its run: runs then share
neither random state nor memory, however many threads a worker has, and a run that is killed does not take its
worker with it. The scheduler may take a worker that only hangs for lost and give its run to another. So the
process that trains a run locks its folder, and a worker that finds a folder locked gives the run back and
takes another. The file system must share locks, which is tested first.

Giving a run back needs no client, which may have ended: the task secedes, so that its thread takes another
run, and asks the scheduler to run it again, anywhere, once the folder is free. If it asked at once, the
scheduler would hand the same run out again before all others, since it came first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from filelock import FileLock, Timeout

from feedbackhook.experiments.config import ClusterConfig, ConfigError, RunConfig, SweepConfig, one_line
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.experiments.sweep.worker import ATTEMPTS, IN_USE, fail, fail_for_lost_processes
from feedbackhook.store.locks import holder

try:
    import distributed
    from distributed.core import Status
    from distributed.scheduler import KilledWorker
except ImportError as error:
    raise ConfigError(f"backend dask: {error}: pip install 'feedbackhook[cluster]'") from error

logger = logging.getLogger(__name__)

_POLL = 1.0  # seconds
_PATIENCE = 120.0  # seconds: a network file system may be late to show the files of another machine
# exit statuses of a process that ended by itself, or because a signal asked it to
_ENDED = (0, *(s for number in (signal.SIGINT, signal.SIGTERM) for s in (128 + number, -number)))
_ANY_GPU = ("auto", "cuda")
_CLOSING = (Status.closing, Status.closed, Status.failed)
_VERSIONS = ("feedbackhook", "torch")


# --- on the worker ----------------------------------------------------------------------------------------


class _View(NamedTuple):
    """What a worker's machine has and sees."""

    versions: dict[str, str]
    gpus: int
    sees_folder: bool
    sees_lock: bool


# both by the folder of the sweep
_children: dict[Path, set[subprocess.Popen[bytes]]] = defaultdict(set)
_stops: dict[Path, threading.Event] = defaultdict(threading.Event)  # set, then replaced, when its runs stop


def _look(folder: Path) -> _View:
    """Look at a sweep's folder, which the sweep has locked, from a worker."""
    sees_folder, sees_lock = (folder / ".lock").exists(), False
    if sees_folder:
        try:
            with FileLock(folder / ".lock", timeout=0):
                pass
        except Timeout:
            sees_lock = True
    return _View(_versions(), len(_visible_gpus()), sees_folder, sees_lock)


def _versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in _VERSIONS}


def _run(config: RunConfig, until: int | None, place: str, runs_per_gpu: int) -> bool:
    """Train one run, to the epoch ``until`` if that is given, in a separate process, started in the folder
    ``place``; return whether it has used up its attempts.

    Raises:
        Reschedule: another process held the run folder, which is free now.
    """
    folder = Path(place, str(config.output))
    if holder(folder) is not None:
        _give_back(folder)
    with _gpu(config.protocol.device, runs_per_gpu) as environment:
        for attempt in range(1, ATTEMPTS + 1):
            status = _run_child(config, until, place, environment)
            if status in _ENDED:
                return False
            if status == IN_USE:
                break
            logger.warning(
                "the process of %s ended with status %d (attempt %d)", config.output, status, attempt
            )
        else:
            return True
    return _give_back(folder)


def _give_back(folder: Path) -> NoReturn:
    """Free this task's thread for another run, and give the task back once its folder is free."""
    worker, stop = distributed.get_worker(), _stops[folder.parent]
    logger.warning("%s is in use by %s: the run is given back until it is free", folder, holder(folder))
    distributed.secede()
    while holder(folder) is not None and worker.status not in _CLOSING and not stop.wait(_POLL):
        pass
    raise distributed.Reschedule


def _run_child(config: RunConfig, until: int | None, place: str, environment: dict[str, str]) -> int:
    worker = distributed.get_worker()
    process = subprocess.Popen(
        [sys.executable, "-m", "feedbackhook.experiments.sweep.worker"],
        stdin=subprocess.PIPE,
        cwd=place,
        env={**os.environ, **environment},
    )
    siblings = _children[Path(place, str(config.output)).parent]
    siblings.add(process)
    message: bytes | None = pickle.dumps((config, os.getpid(), until))
    while process.returncode is None:
        try:
            process.communicate(message, timeout=_POLL)
        except subprocess.TimeoutExpired:
            message = None  # already sent
            if worker.status in _CLOSING and process in siblings:
                _interrupt_one(siblings, process)  # the worker would wait for it
    siblings.discard(process)
    return process.returncode


def _interrupt(folder: Path) -> None:
    """Stop the runs of the sweep in a folder, and the waiting for runs that were given back."""
    _stops.pop(folder, threading.Event()).set()
    for process in list(_children[folder]):
        _interrupt_one(_children[folder], process)


def _interrupt_one(siblings: set[subprocess.Popen[bytes]], process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process once: a second signal would keep it from ending in order."""
    siblings.discard(process)
    process.send_signal(signal.SIGINT)


@contextmanager
def _gpu(device: str, runs_per_gpu: int) -> Iterator[dict[str, str]]:
    """Wait for a GPU, and give the environment variables with which a process sees only that GPU.

    At most ``runs_per_gpu`` runs of this user have a GPU at a time, whichever worker they belong to. If runs
    use no GPU, or one that is given, there is nothing to set.
    """
    gpus = _visible_gpus() if device in _ANY_GPU else []
    if not gpus:
        yield {}
        return
    slots = [(gpu, number) for number in range(runs_per_gpu) for gpu in gpus]
    name = f"{tempfile.gettempdir()}/feedbackhook-{os.getuid()}-gpu"
    while True:
        for gpu, number in slots:
            try:
                with FileLock(f"{name}-{gpu}-{number}.lock", timeout=0):
                    yield {"CUDA_VISIBLE_DEVICES": gpu}
                    return
            except Timeout:
                continue
        time.sleep(_POLL)


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


# --- on the machine of the sweep --------------------------------------------------------------------------


@contextmanager
def connected(config: SweepConfig, tell: Callable[[str], None] = logger.info) -> Iterator[Cluster]:
    """Connect to the cluster of a sweep whose folder is locked, and wait for its first worker.

    Raises:
        ConfigError: there is no scheduler, or a worker cannot train the sweep's runs.
    """
    with _client(config) as client:
        tell(f"dashboard: {client.dashboard_link}")
        if not client.nthreads():
            tell("waiting for the first worker")
        client.wait_for_workers(1)
        cluster = Cluster(client, config)
        cluster.check()
        threads = client.nthreads()
        tell(f"{len(threads)} workers, {sum(threads.values())} runs at a time")
        yield cluster


@contextmanager
def _client(config: SweepConfig) -> Iterator[distributed.Client]:
    cluster = config.cluster
    if cluster.slurm is not None:
        with _slurm(cluster, config.protocol.threads or 1) as jobs, distributed.Client(jobs) as client:
            yield client
        return
    assert cluster.address is not None
    try:
        if "://" not in cluster.address and Path(cluster.address).is_file():
            client = distributed.Client(scheduler_file=cluster.address)
        else:
            client = distributed.Client(cluster.address)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no scheduler answers at cluster.address {cluster.address}: {one_line(error)} (start one with "
            "`dask scheduler`, and its workers with `dask worker ADDRESS`)"
        ) from error
    with client:
        yield client


def job_queue() -> Any:
    """Import dask_jobqueue, and restore the handler of Ctrl-C, which the import replaces."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        import dask_jobqueue
    except ImportError as error:
        raise ConfigError(f"cluster.slurm: {error}: pip install 'feedbackhook[cluster]'") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
    return dask_jobqueue


def _slurm(cluster: ClusterConfig, threads: int) -> Any:
    job_queues = job_queue()
    options = dict(cluster.slurm or {})
    directives = list(options.pop("job_extra_directives", []))
    if cluster.gpus and not any("gres" in line or "gpus" in line for line in directives):
        directives.append(f"--gres=gpu:{cluster.gpus}")
    at_once = cluster.gpus * cluster.runs_per_gpu or max(1, int(options.get("cores", 1)) // threads)
    # one worker for each job: each of its threads waits for the process of one run
    of_worker = [*options.pop("worker_extra_args", []), "--nthreads", str(at_once)]
    try:
        jobs = job_queues.SLURMCluster(
            **{"processes": 1, **options}, job_extra_directives=directives, worker_extra_args=of_worker
        )
        # not `scale`: a job that ends at its time limit is then replaced
        jobs.adapt(minimum_jobs=cluster.jobs, maximum_jobs=cluster.jobs)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"cluster.slurm: {one_line(error)}") from error
    return jobs


class Cluster:
    """A cluster at work for one sweep."""

    def __init__(self, client: distributed.Client, config: SweepConfig) -> None:
        self._client = client
        self._place, self._folder = os.getcwd(), Path(os.getcwd(), config.output)
        self._device, self._runs_per_gpu = config.protocol.device, config.cluster.runs_per_gpu
        self._keys: list[tuple[str, str, str, int]] = []  # of all tasks submitted

    def check(self) -> None:
        """Check that the present workers can train the sweep's runs.

        Raises:
            ConfigError: a worker cannot; the message names it and says why.
        """
        threads = self._client.nthreads()
        views = self._client.run(_look, self._folder, on_error="return")
        for worker, view in views.items():
            if isinstance(view, Exception):
                raise ConfigError(f"the worker {worker} cannot run feedbackhook: {one_line(view)}") from view
            for name, here in _versions().items():
                if view.versions[name] != here:
                    raise ConfigError(
                        f"the worker {worker} has {name} {view.versions[name]}, this machine has {here}: "
                        "install the same version on both"
                    )
            if not view.sees_folder:
                raise ConfigError(
                    f"the worker {worker} does not see {self._folder}: choose an output on a file system "
                    "that all machines share"
                )
            if not view.sees_lock:
                raise ConfigError(
                    f"the worker {worker} can lock {self._folder}/.lock although this machine has locked it, "
                    "so two workers could train the same run: choose an output on a file system that shares "
                    "locks (flock)"
                )
            takes = view.gpus * self._runs_per_gpu
            if takes and self._device in _ANY_GPU and threads[worker] > takes:
                raise ConfigError(
                    f"the worker {worker} has {threads[worker]} threads, but its {view.gpus} GPUs take only "
                    f"{takes} runs: start it with dask worker --nthreads {takes}, or raise "
                    "cluster.runs_per_gpu"
                )

    def run_all(self, pending: list[PlannedRun]) -> None:
        """Run them until each has ended, paused or failed.

        The scheduler keeps the tasks if this process ends, and recognizes them by their keys when this sweep,
        or another one in the folder, submits them again.

        Raises:
            ConfigError: the scheduler is gone, or the files of a run do not appear on this machine.
        """
        try:
            self._run_all(pending)
        except KeyboardInterrupt:
            self._stop()
            raise

    def _run_all(self, pending: list[PlannedRun]) -> None:
        runs = dict(zip(self._submit(pending, 0), pending, strict=True))
        lost: Counter[str] = Counter()
        done = distributed.as_completed(list(runs))
        for future in done:
            run = runs.pop(future)
            if future.status not in ("finished", "error"):
                raise ConfigError(
                    f"the scheduler lost {run.name} ({future.status}): start it again, then rerun the same "
                    "command to resume"
                )
            error = future.exception()
            if error is None and future.result():
                fail_for_lost_processes(run.config)
            elif error is not None and not isinstance(error, KilledWorker):
                fail(run.config, f"{type(error).__name__}: {one_line(error)}")
            elif (
                error is not None or self._status(run) == "interrupted"
            ):  # its worker is gone; the run did not fail
                lost[run.name] += 1
                if lost[run.name] == ATTEMPTS:
                    fail(run.config, f"its worker ended {ATTEMPTS} times: killed, or out of memory?")
                else:
                    (again,) = self._submit([run], lost[run.name])
                    runs[again] = run
                    done.add(again)

    def _submit(self, runs: list[PlannedRun], attempt: int) -> list[distributed.Future]:
        group = f"feedbackhook-{self._folder.name}"  # the scheduler keeps one queue for each group
        keys = [(group, run.name, self._token(run), attempt) for run in runs]
        self._keys += keys
        futures = self._client.map(
            _run,
            [run.config for run in runs],
            [run.until for run in runs],
            key=keys,
            place=self._place,
            runs_per_gpu=self._runs_per_gpu,
        )
        distributed.fire_and_forget(futures)
        return list(futures)

    def _token(self, run: PlannedRun) -> str:
        """A hash of the run's configuration: with another one it is another task."""
        content = json.dumps(
            [asdict(run.config), run.until, self._place, self._runs_per_gpu], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def _status(self, run: PlannedRun) -> str:
        """The status of a run that was trained; waits until it appears on this machine."""
        until = time.monotonic() + _PATIENCE
        while (result := run.folder.result()) is None or not (
            run.done(result) or result.status in ("interrupted", "failed")
        ):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{run.name} was trained, but {run.folder.path} does not show it on this machine: choose "
                    "an output on a file system that all machines share"
                )
            time.sleep(_POLL)
        return result.status

    def _stop(self) -> None:
        """Stop the runs; their finished epochs are kept."""
        futures = [distributed.Future(key, self._client) for key in self._keys]
        self._client.cancel(futures, force=True)
        for _ in range(2):  # twice: a task may just have started
            self._client.run(_interrupt, self._folder, on_error="ignore")
            time.sleep(_POLL)
