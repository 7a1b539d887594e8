"""Running what a sweep's plan says and has not ended, on this machine or on a cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from feedbackhook.experiments.config import ConfigError, SweepConfig
from feedbackhook.experiments.data import load as data
from feedbackhook.experiments.resolve import check_device, resolve
from feedbackhook.experiments.sweep import local as pool
from feedbackhook.experiments.sweep.grid import PlannedRun, check, ended, plan, shrink
from feedbackhook.experiments.sweep.worker import keep_interrupted
from feedbackhook.experiments.training.stopping import stoppable
from feedbackhook.experiments.training.summary import describe_runs
from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.locks import holder
from feedbackhook.store.run_folder import RunResult

logger = logging.getLogger(__name__)

_POLL = 1.0  # seconds
_STILL = 300.0  # seconds after which a process that has not touched its run's folder is named


def sweep(
    config: SweepConfig,
    progress: Callable[[dict[str, RunResult | None]], None] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> dict[str, RunResult]:
    """Run what has not ended in worker processes, and give the results by name, in the order of :func:`plan`.

    Finished and diverged runs are left as they are, all others go on from their checkpoints. A run that fails
    is kept as `failed` with its reason and stops no other; the next sweep tries it again. A run whose process
    is killed goes on from its checkpoint in a new one, and one whose process ends three times is kept as
    `failed`. If the sweep is interrupted (Ctrl-C or SIGTERM), its runs stop with it, as `interrupted`, and
    the next one goes on. If it is killed, they stop as well, but for those on a cluster whose scheduler goes
    on: there the next sweep waits for what the first had asked for.

    A run whose folder another process holds makes way for the others and is tried again; a process that does
    not touch its run's folder for five minutes is named.

    Args:
        config: the sweep.
        progress: called every second with how each run stands, by name; None is one not yet begun.
        tell: called with lines for a person: at once with what there is to do and where; with counts,
            network and rules of each dataset; with the address of a cluster's dashboard; and with what
            stands still.

    Raises:
        ConfigError: the sweep's configuration is wrong, a folder holds runs of another one, data are not
            there, or the cluster cannot be used.
    """
    runs = plan(config)
    config = shrink(config)
    monitor = _Monitor(runs, progress, tell)
    with stoppable(), _alone(Path(config.output)):
        check(runs)
        pending = [run for run in runs if not ended(run)]
        _announce(config, runs, pending, tell)
        with _backend(config, pending, tell) as run_all:
            for dataset in {run.dataset: run for run in pending}.values():
                with _named(dataset.dataset):
                    images = data.load(resolve(dataset.config).data)  # decodes what is not in the cache yet
                on_it = [resolve(run.config) for run in pending if run.dataset == dataset.dataset]
                # on a cluster each worker has its own device
                device = f"; {on_it[0].protocol.device}" if config.backend == "joblib" else ""
                for line in describe_runs(on_it, images):
                    tell(f"{line}{device}")
            _write(config)
            with monitor, _interrupted_at_the_end(pending):
                run_all(pending)
    states, nothing = monitor.states(), "nothing of it could be kept"
    return {run.name: states[run.name] or RunResult(run.folder.path, "failed", nothing) for run in runs}


def _announce(
    config: SweepConfig,
    runs: Sequence[PlannedRun],
    pending: Sequence[PlannedRun],
    tell: Callable[[str], None],
) -> None:
    """Say what there is to do, where, and how to go on after an interruption."""
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
        device = resolve(pending[0].config).protocol.device
        where = f"{count} at a time on this machine ({device})"
    elif cluster.slurm is not None:
        where = f"in {cluster.jobs} {'job' if cluster.jobs == 1 else 'jobs'} of SLURM"
    else:
        where = f"on the cluster at {cluster.address}"
    tell(f"running {where}; if this stops, rerun the same command to resume")


@contextmanager
def _interrupted_at_the_end(pending: Sequence[PlannedRun]) -> Iterator[None]:
    """An interruption leaves no run `running`: not one whose process had no time to say so, either."""
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
    """What runs them until each has ended or failed."""
    if not pending:
        yield lambda _: None
    elif config.backend == "dask":
        from feedbackhook.experiments.sweep.dask import connected

        with connected(config, tell) as cluster:
            yield cluster.run_all
    else:
        check_device(resolve(pending[0].config))
        yield lambda runs: pool.run_all(runs, pool.workers(config, runs), tell)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other sweep is at work in the folder; the lock ends with the process."""
    from filelock import FileLock, Timeout

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ConfigError(
            f"another sweep is at work in {folder}: wait for it, or give another output"
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
        raise ConfigError(f"{error} (nothing was run; or leave {dataset} out of datasets)") from error


def _write(config: SweepConfig) -> None:
    path = Path(config.output) / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


class _Monitor:
    """Tells each second how the runs stand, from their folders, and which of them stand still."""

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        progress: Callable[[dict[str, RunResult | None]], None] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._runs, self._progress, self._say = runs, progress, tell
        self._touched: dict[str, tuple[int, float]] = {}  # by run: when it was, and when that was first seen
        self._named: dict[str, int] = {}  # by run: of which touch its holder has been named
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
        """Name each process that holds a run's folder and has not touched it for long.

        By this machine's clock alone: that of another, or of a file server, may say something else.
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
                    "end it there, and the run goes on from its checkpoint"
                )

    def __enter__(self) -> None:
        self._tell()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tell()
