"""Run the planned runs of a sweep that have not ended, on this machine or on a cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from feedbackhook.experiments.config import ConfigError, SweepConfig
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.resolve import check_device
from feedbackhook.experiments.sweep import local as pool
from feedbackhook.experiments.sweep import manifest
from feedbackhook.experiments.sweep.grid import PlannedRun, check, done, plan, shrink
from feedbackhook.experiments.sweep.pruning import run_in_stages
from feedbackhook.experiments.sweep.worker import keep_interrupted
from feedbackhook.experiments.training.stopping import stoppable
from feedbackhook.experiments.training.summary import describe_runs
from feedbackhook.store.locks import holder
from feedbackhook.store.run_folder import RunResult

logger = logging.getLogger(__name__)

_POLL = 1.0  # seconds
_STILL = 300.0  # seconds after which a process that has not touched its run's folder is named


def sweep(
    config: SweepConfig,
    progress: Callable[[dict[str, RunResult | None]], None] | None = None,
    tell: Callable[[str], None] = logger.info,
    runs: Sequence[PlannedRun] | None = None,
) -> dict[str, RunResult]:
    """Run the runs that have not ended, in worker processes; return all results by name, in planned order.

    Runs that have ended are kept as they are, and all others resume from their checkpoints. A run that
    fails is kept as `failed` with its reason and stops no other run; the next sweep tries it again. A run
    whose process is killed resumes from its checkpoint in a new process; after three lost processes it is
    kept as `failed`. If the sweep is interrupted (Ctrl-C or SIGTERM), its runs stop as `interrupted`, and the
    next sweep resumes them. If it is killed, its runs stop too, except on a cluster whose scheduler keeps
    running: there the next sweep waits for the runs that are already queued.

    A run whose folder another process holds lets the other runs go first and is tried again. A process that
    does not touch its run folder for five minutes is named.

    Args:
        config: the sweep.
        progress: called every second with the state of each run by name; None is a run that has not started.
        tell: called with lines for a person: at the start with what there is to do and where; with counts,
            network and rules of each dataset; with the address of a cluster's dashboard; and with any process
            that seems to hang.
        runs: its plan, if the caller already has it.

    Raises:
        ConfigError: the configuration is wrong, a folder holds runs of another sweep, data are missing, or
            the cluster cannot be used.
    """
    runs = plan(config) if runs is None else runs
    config = shrink(config)
    monitor = _Monitor(runs, progress, tell)
    with stoppable(), _alone(Path(config.output)):
        check(runs)
        pending = [run for run in runs if not done(run)]
        _announce(config, runs, pending, tell)
        with _backend(config, pending, tell) as run_all:
            for dataset in {run.dataset: run for run in pending}.values():
                with _named(dataset.dataset):
                    images = data.load(dataset.resolved.data)  # decodes what is not in the cache yet
                on_it = [run.resolved for run in pending if run.dataset == dataset.dataset]
                # on a cluster each worker has its own device
                device = f"; {dataset.resolved.protocol.device}" if config.backend == "joblib" else ""
                for line in describe_runs(on_it, images):
                    tell(f"{line}{device}")
            manifest.write(config, runs)
            with monitor, _interrupted_at_the_end(pending):
                run_in_stages(runs, config.protocol.lr_pruning, run_all)
    states, nothing = monitor.states(), "it left nothing in its folder"
    return {run.name: states[run.name] or RunResult(run.folder.path, "failed", nothing) for run in runs}


def _announce(
    config: SweepConfig,
    runs: Sequence[PlannedRun],
    pending: Sequence[PlannedRun],
    tell: Callable[[str], None],
) -> None:
    """Say what there is to do, where, and how to resume after an interruption."""
    resumed = sum(run.folder.trained() for run in pending)
    tell(
        f"{len(runs)} runs in {config.output}: {len(runs) - len(pending)} have ended already, "
        f"{resumed} to resume, {len(pending) - resumed} to start"
    )
    if not pending:
        return
    cluster = config.cluster
    if config.backend == "joblib":
        count = min(pool.workers(config, pending), len(pending))
        device = pending[0].resolved.protocol.device
        where = f"{count} at a time on this machine ({device})"
    elif cluster.slurm is not None:
        where = f"in {cluster.jobs} SLURM {'job' if cluster.jobs == 1 else 'jobs'}"
    else:
        where = f"on the cluster at {cluster.address}"
    tell(f"running {where}; if this stops, rerun the same command to resume")


@contextmanager
def _interrupted_at_the_end(pending: Sequence[PlannedRun]) -> Iterator[None]:
    """Leave no run `running` after an interruption, even if its process had no time to write its status."""
    try:
        yield
    except KeyboardInterrupt:
        for run in pending:
            keep_interrupted(run.config)
        raise


@contextmanager
def _backend(
    config: SweepConfig, pending: list[PlannedRun], tell: Callable[[str], None]
) -> Iterator[Callable[[list[PlannedRun]], None]]:
    """The function that runs them until each has ended or failed."""
    if not pending:
        yield lambda _: None
    elif config.backend == "dask":
        from feedbackhook.experiments.sweep.dask import connected

        with connected(config, tell) as cluster:
            yield cluster.run_all
    else:
        check_device(pending[0].resolved)
        yield lambda runs: pool.run_all(runs, pool.workers(config, runs), tell)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder within the block; the lock ends with the process."""
    from filelock import FileLock, Timeout

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ConfigError(
            f"another sweep is at work in {folder}: wait for it to end, or choose another output"
        ) from error
    finally:
        if made and {path.name for path in folder.iterdir()} <= {".lock"}:  # nothing was run
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def _named(dataset: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"{error} (no run was started; you can also leave {dataset} out of datasets)"
        ) from error


class _Monitor:
    """Report every second the states of the runs, read from their folders, and the runs that seem to hang."""

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        progress: Callable[[dict[str, RunResult | None]], None] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._runs, self._progress, self._say = runs, progress, tell
        self._touched: dict[str, tuple[int, float]] = {}  # by run: its time, and when that was first seen
        self._named: dict[str, int] = {}  # by run: the touch after which its holder was named
        self._known: dict[str, RunResult | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def states(self) -> dict[str, RunResult | None]:
        for run in self._runs:
            known = self._known.get(run.name)
            if known is None or not known.ended:
                self._known[run.name] = run.folder.result()
        return dict(self._known)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            self._tell()

    def _tell(self) -> None:
        states = self.states()
        self._name_the_still(states)
        if self._progress is not None:
            self._progress(states)

    def _name_the_still(self, states: dict[str, RunResult | None]) -> None:
        """Name each process that holds a run folder and has not touched it for long.

        Only this machine's clock is used: another machine's, or a file server's, may be off.
        """
        now = time.monotonic()
        for run in self._runs:
            state = states[run.name]
            if state is None or state.status != "running":
                continue
            touched = run.folder.touched()
            known, since = self._touched.get(run.name, (None, now))
            if known != touched:
                since = now
            self._touched[run.name] = (touched, since)
            if now - since < _STILL or self._named.get(run.name) == touched:
                continue
            if (other := holder(run.folder.path)) is not None:
                self._named[run.name] = touched
                minutes = (now - since) / 60
                self._say(
                    f"{run.name}: {other} has not touched its folder for {minutes:.0f} minutes; if it hangs, "
                    "kill it there, and the run resumes from its checkpoint"
                )

    def __enter__(self) -> None:
        self._tell()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tell()
