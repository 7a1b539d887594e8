"""A real scheduler and worker processes of dask on the loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed

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


def wait_until(condition: Callable[[], bool]) -> None:
    """However slow the machine is: only the test runner sets a limit."""
    while not condition():
        time.sleep(0.05)
