"""Send the rows of a run to an experiment tracker: trackio or wandb."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

__all__ = ["Row", "Tracker", "TrackerName"]

TrackerName = Literal["trackio", "wandb"]
Row: TypeAlias = tuple[str, int, int, "str | None", "int | None", str, float]
"""A row of the table: run, step, epoch, layer, depth, metric, value."""


class Tracker:
    """One run of trackio or wandb; its project is named after the folder that holds the run folder.

    Nothing leaves the machine: trackio writes to its own folder (`trackio show` opens it), and wandb writes
    `wandb/offline-run-*` into the run folder (`wandb sync` uploads it) unless the environment variable
    `WANDB_MODE` says otherwise. A run that resumes continues the tracker's run, in which steps that are
    repeated appear twice.

    Args:
        package: which tracker.
        folder: the run folder.
        run: the name of the run; a few digits after it tell runs of the same name in other folders apart.
        settings: what the tracker shows as the run's configuration.

    Raises:
        ImportError: the tracker is not installed.
    """

    def __init__(
        self, package: TrackerName, folder: Path, run: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._package = package
        number = sha256(str(folder).encode()).hexdigest()[:8]
        name, project = f"{run}-{number}", folder.parent.name or "runs"
        shared = {"project": project, "name": name, "config": dict(settings or {}), "resume": "allow"}
        module = _imported(package)
        if package == "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            quiet = module.Settings(silent=True, console="off")
            self._run = module.init(**shared, id=number, dir=str(folder), mode=mode, settings=quiet)
            self._run.define_metric("*", step_metric="step")  # its own steps must not go back
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                self._run = module.init(**shared, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, rows: Iterable[Row]) -> None:
        """Send rows, those of one step together; a metric of a layer is named METRIC/LAYER."""
        steps: dict[tuple[int, int], dict[str, float]] = {}
        for _, step, epoch, layer, _, metric, value in rows:
            name = metric if layer is None else f"{metric}/{layer}"
            steps.setdefault((step, epoch), {})[name] = value
        for (step, epoch), values in steps.items():
            if self._package == "wandb":
                self._run.log({**values, "step": step, "epoch": epoch})
            else:
                self._run.log({**values, "epoch": epoch}, step=step)

    def close(self) -> None:
        """End the tracker's run, after all rows have been written."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            self._run.finish()


def _imported(package: TrackerName) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"tracking={package!r} needs {package}: pip install 'feedbackhook[{package}]'"
        ) from error
