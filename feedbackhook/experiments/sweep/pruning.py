"""Prune learning rates by successive halving (Jamieson and Talwalkar, AISTATS 2016).

All runs train to an epoch and pause. The learning rates of each condition, dataset, procedure and seed are
then compared by validation error, and the worse half ends. A run that goes on is bit for bit what it would
have been without the pause, on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from feedbackhook.experiments.stored import store_errors
from feedbackhook.experiments.sweep.grid import PlannedRun, done
from feedbackhook.store.recorder import read


def run_in_stages(
    runs: Sequence[PlannedRun], epochs: Sequence[int], run_all: Callable[[list[PlannedRun]], None]
) -> None:
    """Run all runs that are not done, with a comparison of learning rates after each of these epochs.

    Args:
        runs: the planned runs of a sweep.
        epochs: in ascending order; empty: no run is pruned.
        run_all: trains runs until each has ended, paused or failed.
    """
    alive, failed = _groups(runs), set[str]()
    for epoch in (*epochs, None):
        stage = [replace(run, until=epoch) for group in alive for run in group]
        pending = [run for run in stage if run.name not in failed and not done(run)]
        if pending:
            run_all(pending)
        failed |= {run.name for run in pending if _status(run) == "failed"}  # the next sweep tries them again
        if epoch is not None:
            alive = [_halved(group, epoch) for group in alive]


def share_trained(runs: Sequence[PlannedRun], epochs: Sequence[int]) -> float:
    """Return the share of all epochs of the runs that is trained if no two runs tie and none diverges."""
    planned = trained = 0
    for group in _groups(runs):
        last, left = group[0].config.protocol.epochs, len(group)
        planned += last * left
        for first, after in itertools.pairwise([0, *epochs, last]):
            trained += left * (after - first)
            left = math.ceil(left / 2)
    return trained / planned


def _groups(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs that differ only in their learning rate, together."""
    groups: dict[tuple[str, str, str, int], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.condition, run.procedure.name, run.seed), []).append(run)
    return list(groups.values())


def _halved(group: Sequence[PlannedRun], epoch: int) -> list[PlannedRun]:
    """The better half of the runs by validation error after an epoch; the others end as `pruned`.

    A run that ties with the last of the better half goes on too. A run without an error, since it diverged or
    failed before, is worse than all others; it stays what it is.
    """
    errors = {run.name: _val_error(run, epoch) for run in group}
    limit = sorted(errors.values())[math.ceil(len(group) / 2) - 1]
    best = min(errors.values())
    kept = []
    for run in group:
        if errors[run.name] <= limit:
            kept.append(run)
        else:
            _prune(run, epoch, errors[run.name], best)
    return kept


def _val_error(run: PlannedRun, epoch: int) -> float:
    """The validation error of a run after an epoch; infinite if it has none."""
    with store_errors():
        result = run.folder.result()
        if result is None or result.epoch < epoch:
            return math.inf
        rows = read(run.folder.path)
    (error,) = rows[(rows["metric"] == "val_error") & (rows["epoch"] == epoch)]["value"]
    return float(error) if math.isfinite(error) else math.inf


def _status(run: PlannedRun) -> str | None:
    with store_errors():
        result = run.folder.result()
    return None if result is None else result.status


def _prune(run: PlannedRun, epoch: int, error: float, best: float) -> None:
    """End a run as `pruned`, unless it has ended already."""
    with store_errors():
        result = run.folder.result()
    if result is None or result.ended or result.epoch < epoch:
        return
    reason = (
        f"its validation error after epoch {epoch} was {error:.2f}%, with the best learning rate {best:.2f}%"
    )
    run.folder.write_result(replace(result, status="pruned", reason=reason))
    if run.config.record.weights != "all":
        run.folder.remove_checkpoint()
