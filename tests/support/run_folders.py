"""Run folders with errors of one's own, as a run would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from feedbackhook import Recorder
from feedbackhook.experiments.config import RunConfig
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.stored import write_config
from feedbackhook.store.run_folder import RunFolder, RunResult


def leave_run(
    config: RunConfig, curve: Sequence[tuple[float, float]], epochs: int, status: str | None = None
) -> Path:
    """A run with (test error, error on what is held out) after each epoch, the untrained network's first."""
    folder = RunFolder(str(config.output))
    with Recorder(folder.path, append=True) as recorder:
        for epoch, (test, held_out) in enumerate(curve):
            recorder.add(10 * epoch, epoch, "test_error", test)
            recorder.add(10 * epoch, epoch, "val_error", held_out)
            recorder.add(10 * epoch, epoch, "train_error", 0.0)
            for depth, layer in enumerate(("conv1", "fc2")):
                recorder.add(10 * epoch, epoch, "weight_angle", 45.0 + depth, layer, depth)
    write_config(folder, resolve(config))
    trained = [test for test, _ in curve[1:]] or [curve[0][0]]
    folder.write_result(
        RunResult(
            folder.path,
            status or ("finished" if len(curve) == epochs + 1 else "diverged"),  # type: ignore[arg-type]
            epoch=len(curve) - 1,
            last_error=curve[-1][0],
            best_error=min(trained),
        )
    )
    return folder.path
