"""Learning rates are pruned by successive halving, and what goes on is not changed by it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from support.run_folders import leave_run
from support.sweeps import left, tiny

from feedbackhook.experiments.config import ConfigError, DataConfig, SweepProtocolConfig
from feedbackhook.experiments.sweep.grid import PlannedRun, plan
from feedbackhook.experiments.sweep.pruning import run_in_stages, share_trained
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.tables import as_markdown
from feedbackhook.store.recorder import read

FIVE = SweepProtocolConfig(epochs=6, lr_factors=5, lr_pruning=[1, 3])


def by_hand(folder: Path) -> list[PlannedRun]:
    """A sweep of one condition at five rates, whose runs a `Trainer` leaves."""
    return left(tiny(folder, conditions=["SGD"], protocol=FIVE))


class Trainer:
    """A stand-in for training: it leaves run folders with given errors.

    Args:
        errors: of each run, by its rate, after each epoch; a run diverges where they end.
    """

    def __init__(self, errors: dict[float, list[float]]) -> None:
        self.errors, self.stages, self.fails = errors, list[list[float]](), set[float]()

    def __call__(self, runs: list[PlannedRun]) -> None:
        self.stages.append([run.lr_factor for run in runs])
        for run in runs:
            epochs = run.until or run.config.protocol.epochs
            curve = [90.0, *self.errors[run.lr_factor]][: epochs + 1]
            status = "diverged" if len(curve) <= epochs else "paused" if run.until else "finished"
            if run.lr_factor in self.fails:
                status, curve = "failed", curve[:1]
            leave(run, curve, status)


def leave(run: PlannedRun, curve: list[float], status: str) -> None:
    """Leave a run folder in place of the one that was there."""
    if run.folder.path.exists():
        shutil.rmtree(run.folder.path)
    leave_run(run.config, [(error, error) for error in curve], len(curve) - 1, status)


def statuses(runs: list[PlannedRun]) -> dict[float, str]:
    return {run.lr_factor: result.status for run in runs if (result := run.folder.result())}


def test_the_worse_half_ends_at_each_epoch(tmp_path: Path) -> None:
    errors = {100.0: [50.0] * 6, 1.0: [30.0] * 6, 0.1: [10.0] * 6, 0.01: [60.0] * 6}
    errors[10.0] = [20.0, 20.0, 40.0, 1.0, 1.0, 1.0]
    runs, train = by_hand(tmp_path), Trainer(errors)
    run_in_stages(runs, [1, 3], train)
    assert train.stages == [[100.0, 10.0, 1.0, 0.1, 0.01], [10.0, 1.0, 0.1], [1.0, 0.1]]
    assert statuses(runs) == {
        100.0: "pruned",
        10.0: "pruned",  # by its error after epoch 3, not by its best
        1.0: "finished",
        0.1: "finished",
        0.01: "pruned",
    }
    reason = next(run.folder.result() for run in runs if run.lr_factor == 10.0)
    assert reason is not None
    assert (
        reason.reason == "its validation error after epoch 3 was 40.00%, with the best learning rate 10.00%"
    )
    assert share_trained(runs, [1, 3]) == (1 * 5 + 2 * 3 + 3 * 2) / 30
    again = Trainer(errors)
    run_in_stages(runs, [1, 3], again)
    assert again.stages == []


def test_runs_that_tie_go_on_together(tmp_path: Path) -> None:
    errors = dict.fromkeys([100.0, 10.0, 1.0, 0.1], [90.0] * 6) | {0.01: [91.0] * 6}
    train = Trainer(errors)
    run_in_stages(by_hand(tmp_path), [1, 3], train)
    assert [len(stage) for stage in train.stages] == [5, 4, 4]


@pytest.mark.parametrize("nothing", [[], [math.nan] * 6], ids=["diverged", "nan"])
def test_a_run_without_an_error_is_worse_than_all_others(tmp_path: Path, nothing: list[float]) -> None:
    errors = {100.0: nothing, 10.0: nothing, 1.0: [20.0] * 6, 0.1: [30.0] * 6, 0.01: [40.0] * 6}
    runs, train = by_hand(tmp_path), Trainer(errors)
    run_in_stages(runs, [1, 3], train)
    assert train.stages[1:] == [[1.0, 0.1, 0.01], [1.0, 0.1]]
    assert statuses(runs)[100.0] == ("diverged" if not nothing else "pruned")


def test_a_failed_run_is_not_tried_twice_in_one_sweep_but_by_the_next(tmp_path: Path) -> None:
    errors = {100.0: [5.0] * 6, 10.0: [20.0] * 6, 1.0: [30.0] * 6, 0.1: [40.0] * 6, 0.01: [50.0] * 6}
    runs, train = by_hand(tmp_path), Trainer(errors)
    train.fails = {100.0}
    run_in_stages(runs, [1, 3], train)
    assert train.stages == [[100.0, 10.0, 1.0, 0.1, 0.01], [10.0, 1.0, 0.1], [10.0, 1.0]]
    assert statuses(runs)[100.0] == "failed"
    put_right = Trainer(errors)
    run_in_stages(runs, [1, 3], put_right)
    assert put_right.stages == [[100.0]] * 3
    assert statuses(runs)[100.0] == "finished"


def test_each_condition_and_seed_is_compared_by_itself(tmp_path: Path) -> None:
    config = tiny(tmp_path, protocol=replace(FIVE, lr_factors=[1.0, 0.1], seeds=2))
    runs = left(config)
    better = {(run.condition, run.seed): (i % 2) for i, run in enumerate(runs[::4])}

    def run_all(stage: list[PlannedRun]) -> None:
        for run in stage:
            good = (run.lr_factor == 1.0) == bool(better.get((run.condition, run.seed), 0))
            curve = [90.0, *[10.0 if good else 20.0] * (run.until or 6)]
            leave(run, curve, "paused" if run.until else "finished")

    run_in_stages(runs, [1], run_all)
    for run in runs:
        good = (run.lr_factor == 1.0) == bool(better.get((run.condition, run.seed), 0))
        result = run.folder.result()
        assert result is not None
        assert result.status == ("finished" if good else "pruned"), run.name


def test_the_runs_that_go_on_are_those_of_the_full_grid_to_the_last_bit(tmp_path: Path) -> None:
    data = DataConfig(size=16, val_fraction=0.2, train_images=400, test_images=100)
    two_learn = [1.0, 0.3, 1e-6]
    full = replace(FIVE, epochs=3, batch_size=20, lr_factors=two_learn, lr_pruning=[])
    config = tiny(tmp_path / "full", conditions=["frSF+BM"], data=data, protocol=full, workers=2)
    pruned = replace(config, protocol=replace(full, lr_pruning=[2]), output=str(tmp_path / "pruned"))
    sweep(config)
    results = sweep(pruned)
    assert sorted(result.status for result in results.values()) == ["finished", "finished", "pruned"]
    for name, result in results.items():
        rows, of_full = read(result.folder), read(tmp_path / "full" / name)
        if result.status == "pruned":
            of_full = of_full[of_full["epoch"] <= 2]
            assert (result.epoch, (result.folder / "checkpoint.pt").exists()) == (2, True)
        order = ["step", "epoch", "metric", "layer"]
        pd.testing.assert_frame_equal(
            rows.sort_values(order, ignore_index=True),
            of_full.sort_values(order, ignore_index=True),
            check_exact=True,
        )
    assert sweep(pruned) == results  # nothing is run again


def test_a_pruned_run_is_in_no_mean_and_is_not_missing(tmp_path: Path) -> None:
    errors = {1.0: [30.0] * 6, 0.1: [10.0] * 6, 0.01: [60.0] * 6}
    errors |= {100.0: [1.0] + [50.0] * 5, 10.0: [0.5] + [49.0] * 5}
    runs = by_hand(tmp_path)
    run_in_stages(runs, [3], Trainer(errors))
    table = sweep_table(tmp_path)
    (cell,) = table.cells.to_dict("records")
    assert (cell["runs"], cell["ended"], cell["pruned"], cell["missing"]) == (5, 3, 2, 0)
    assert cell["best_error"] == 0.5
    assert table.missing == {}
    assert table.pruned == {run.name for run in runs if run.lr_factor in (100.0, 0.01)}
    text = as_markdown(table)
    assert "After epochs 1 and 3, the half of the learning rates" in text
    assert "5, 2 pruned" in text
    assert " *" not in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"protocol": replace(FIVE, lr_pruning=[6])}, r"must be epochs before the last of 6.*not \[6\]"),
        ({"protocol": replace(FIVE, lr_pruning=[0])}, r"not \[0\]"),
        ({"protocol": replace(FIVE, lr_pruning=[3, 1])}, r"in ascending order, not \[3, 1\]"),
        ({"protocol": replace(FIVE, lr_pruning=[1, 1])}, r"not \[1, 1\]"),
        ({"protocol": FIVE, "data": DataConfig()}, "set data.val_fraction to more than 0"),
    ],
    ids=["last", "zero", "descending", "twice", "no-validation"],
)
def test_what_cannot_be_pruned_is_refused(tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, **given))
