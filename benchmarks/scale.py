"""How long do `feedbackhook table` and `report` take for ten thousand runs, and how much memory?

Makes the run folders of a sweep of the paper's conditions, with random curves of 65 epochs instead of
training, and runs both commands on them, each in a separate process.

    python benchmarks/scale.py
    python benchmarks/scale.py --runs 500

Also times what `feedbackhook sweep` does before its first run: plan it, find the finished runs, compare
configurations. Adds a row per command to benchmarks/results/scale.csv. The folders are kept and reused.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from common import RESULTS
from jsonargparse import auto_cli

from feedbackhook import Recorder
from feedbackhook.experiments.config import RunConfig, SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.stored import write_config
from feedbackhook.experiments.sweep.grid import check, ended, plan
from feedbackhook.experiments.sweep.manifest import write
from feedbackhook.liao2016.published import error_rates
from feedbackhook.store.run_folder import RunFolder, RunResult

EPOCHS, STEPS_PER_EPOCH = 65, 500
LAYERS = ("conv1", "conv2", "fc1", "fc2")
ANGLES = ("weight_angle", "error_angle", "sign_agreement", "norm_ratio")
ERRORS = (
    "train_loss",
    "train_error",
    "val_loss",
    "val_error",
    "test_loss",
    "test_error",
    "test_accuracy",
)


def main(runs: int = 10_000, folder: Path = Path("runs/scale")) -> None:
    """Make the run folders, measure and print.

    Args:
        runs: Number of run folders, rounded up to a multiple of conditions and learning rates.
        folder: Folder in which to make them, with a subfolder for each number of runs.
    """
    conditions = list(error_rates().index)
    seeds = -(-runs // (len(conditions) * 5))
    config = SweepConfig(
        conditions, ["digits"], protocol=SweepProtocolConfig(seeds=seeds), output=str(folder / f"{runs}")
    )
    planned = plan(config)
    made = joblib.Parallel(n_jobs=-1)(joblib.delayed(_leave)(run.config, i) for i, run in enumerate(planned))
    write(config, planned)
    print(f"{len(planned)} runs in {config.output}, {sum(made)} of them new")
    rows = []
    for command in ("table", "report"):
        seconds, peak = _measured([sys.executable, "-m", "feedbackhook", command, config.output])
        rows.append({"runs": len(planned), "command": command, "seconds": seconds, "peak_mb": peak})
        print(f"{command}: {seconds:.1f} s, {peak:.0f} MB")
    for name, work in {
        "plan": lambda: plan(config),
        "ended": lambda: [*map(ended, planned)],
        "check": lambda: check(planned),
    }.items():
        began = time.perf_counter()
        work()
        rows.append(
            {"runs": len(planned), "command": f"sweep: {name}", "seconds": time.perf_counter() - began}
        )
        print(f"sweep, {name}: {rows[-1]['seconds']:.1f} s")
    report = Path(config.output, "report.html").stat().st_size / 1e6
    print(f"report.html: {report:.1f} MB")
    path = RESULTS / "scale.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame()
    known = known[known["runs"] != len(planned)] if len(known) else known
    table = pd.concat([known, pd.DataFrame(rows)]).sort_values("runs", kind="stable")
    table.to_csv(path, index=False, float_format="%.1f")


def _leave(config: RunConfig, number: int) -> bool:
    """Make a run folder with random curves; return False if it exists."""
    folder = RunFolder(str(config.output))
    if folder.result() is not None:
        return False
    rng = np.random.default_rng(number)
    final = rng.uniform(1, 30)
    with Recorder(folder.path) as recorder:
        for epoch in range(EPOCHS + 1):
            step = epoch * STEPS_PER_EPOCH
            error = final + (90 - final) * np.exp(-epoch / 8) + rng.normal(0, 0.1)
            for name in ERRORS:
                recorder.add(step, epoch, name, 100 - error if name == "test_accuracy" else error)
            for depth, layer in enumerate(LAYERS):
                for name in ANGLES:
                    recorder.add(step, epoch, name, 45 + rng.normal(), layer, depth)
    write_config(folder, resolve(config))
    folder.write_result(
        RunResult(folder.path, "finished", None, EPOCHS, EPOCHS * STEPS_PER_EPOCH, error, error, EPOCHS)
    )
    return True


def _measured(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the peak memory in megabytes of a command."""
    began = time.perf_counter()
    process = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command[2:])} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


if __name__ == "__main__":
    auto_cli(main)
