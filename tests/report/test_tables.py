"""A sweep's table, from runs whose errors are written by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from support.run_folders import leave_run
from support.sweeps import left

from feedbackhook.cli import main
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.liao2016.published import error_rates
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.tables import as_markdown, draw, write
from feedbackhook.store.errors import StoreError
from feedbackhook.store.run_folder import RunResult

CONDITIONS = ["SGD", "uSF", "RndF", "uSF+BM2 Top"]
# by condition, rate and seed: (test error, error on what is held out) after each epoch, the untrained first
CURVES: dict[tuple[str, float, int], list[tuple[float, float]]] = {
    ("SGD", 1.0, 0): [(0.01, 0.01), (20.0, 9.0), (10.0, 12.0)],
    ("SGD", 0.1, 0): [(90.0, 90.0), (30.0, 8.0), (40.0, 10.0)],
    ("SGD", 1.0, 1): [(90.0, 90.0), (14.0, 7.0), (15.0, 6.0)],
    ("SGD", 0.1, 1): [(90.0, 90.0), (16.0, 7.0), (17.0, 7.5)],
    ("uSF", 1.0, 0): [(88.0, 90.0)],  # diverged in its first epoch
    ("uSF", 0.1, 0): [(88.0, 90.0), (70.0, 70.0), (75.0, 69.0)],
    ("uSF", 1.0, 1): [(89.0, 90.0)],
    ("uSF", 0.1, 1): [(89.0, 90.0)],
    ("RndF", 1.0, 0): [(90.0, 90.0), (9.0, 9.0), (11.0, 10.0)],
    ("RndF", 0.1, 0): [(90.0, 90.0), (12.0, 8.0), (13.0, 9.0)],
    ("RndF", 1.0, 1): [(90.0, 90.0), (9.0, 9.0), (11.0, 10.0)],
    ("uSF+BM2 Top", 1.0, 0): [(90.0, 90.0), (9.0, 9.0), (9.0, 9.0)],
    ("uSF+BM2 Top", 0.1, 0): [(90.0, 90.0), (9.0, 9.0), (9.0, 9.0)],
    ("uSF+BM2 Top", 1.0, 1): [(90.0, 90.0), (9.0, 9.0), (9.0, 9.0)],
    ("uSF+BM2 Top", 0.1, 1): [(90.0, 90.0), (9.0, 9.0), (9.0, 9.0)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rates and two seeds of two epochs on MNIST; RndF's fourth run has failed."""
    path = tmp_path / "sweep"
    protocol = SweepProtocolConfig(epochs=2, lr_factors=[1.0, 0.1], seeds=2)
    config = SweepConfig(CONDITIONS, ["MNIST"], protocol=protocol, output=str(path))
    for run in left(config):
        curve = CURVES.get((run.condition, run.lr_factor, run.seed))
        if curve is not None:
            leave_run(run.config, curve, 2)
    return path


def cell(folder: Path, condition: str) -> pd.Series:
    cells = sweep_table(folder).cells
    return cells[cells["condition"] == condition].iloc[0]


def test_best_is_the_smallest_test_error_over_epochs_and_rates_of_each_seed(folder: Path) -> None:
    sgd = cell(folder, "SGD")
    assert sgd["best_error"] == pytest.approx((10 + 14) / 2)  # not the untrained network's 0.01
    assert (sgd["lr_factor"], sgd["best_epoch"], sgd["seeds"]) == (1.0, 2, 2)
    # t of one degree of freedom times the standard error of 10 and 14, on the scale of logits at their mean
    half = 12.706 * 0.02 / (0.12 * 0.88)
    logits = [math.log(sgd[f"best_{end}"] / (100 - sgd[f"best_{end}"])) for end in ("low", "error", "high")]
    assert [logits[1] - logits[0], logits[2] - logits[1]] == pytest.approx([half, half], rel=1e-4)


def test_chosen_does_not_look_at_the_test_set(folder: Path) -> None:
    # seed 0: 8.0 at rate 0.1 in epoch 1, which tests at 30; seed 1: 6.0 at rate 1 in epoch 2, at 15
    assert cell(folder, "SGD")["chosen_error"] == pytest.approx((30 + 15) / 2)


def test_a_diverged_run_is_in_the_mean_with_what_it_reached(folder: Path) -> None:
    usf = cell(folder, "uSF")
    assert usf["best_error"] == pytest.approx((70 + 89) / 2)
    assert usf["chosen_error"] == pytest.approx((75 + 89) / 2)
    assert (usf["runs"], usf["ended"], usf["diverged"]) == (4, 4, 3)


def test_the_papers_error_stands_beside_ours(folder: Path) -> None:
    table = sweep_table(folder)
    assert table.cells["paper_error"].tolist()[:3] == [0.67, 88.65, 1.81]
    assert cell(folder, "SGD")["difference"] == pytest.approx(12 - 0.67)
    assert math.isnan(cell(folder, "uSF+BM2 Top")["paper_error"])
    # ours in order: RndF, SGD, uSF; the paper's: SGD, RndF, uSF
    assert table.rank_correlation == {"MNIST": (pytest.approx(0.5), 3)}


def test_cells_are_classed_at_three_points_from_sgd(folder: Path) -> None:
    cells = sweep_table(folder).cells.set_index("condition")
    assert cells["class_of_best"].tolist() == ["alike", "worse", "better", "better"]  # 12 - 9 is three points
    assert cells["class_of_paper"].tolist()[:3] == ["alike", "worse", "alike"]
    assert pd.isna(cells["class_of_paper"].iloc[3])


def test_runs_that_are_in_no_mean_are_named(folder: Path) -> None:
    table, markdown = sweep_table(folder), as_markdown(sweep_table(folder))
    assert table.missing == {"MNIST-RndF-rate0.1-seed1": "not started"}
    assert "- MNIST-RndF-rate0.1-seed1: not started" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| RndF |"))
    assert "9.00 ▲ *" in row
    assert "3 of 4 *" in row
    assert "| uSF | 79.50 ▼ |" in markdown
    assert "4, 3 diverged" in markdown


def test_a_note_on_a_dataset_stands_below_its_tables(tmp_path: Path) -> None:
    def shown(*datasets: str) -> list[str]:
        output = tmp_path / "-".join(datasets)
        left(SweepConfig(["SGD"], list(datasets), output=str(output)))
        return as_markdown(sweep_table(output)).splitlines()

    note = f"TIMIT-80: {DATASETS['TIMIT-80'].note}"
    assert "61 phones" in note
    lines = shown("TIMIT-80")
    assert lines.index(note) > lines.index("## TIMIT-80")
    assert lines[lines.index(note) - 2].startswith("| SGD |")
    assert shown("MNIST", "TIMIT-80").count(note) == 2  # below what is best of all, and its own
    assert not any("ours" in line for line in shown("MNIST", "Caltech101"))


@pytest.mark.parametrize("status", ["failed", "running", "interrupted"])
def test_what_a_run_reached_before_it_stopped_is_not_taken_for_its_result(folder: Path, status: str) -> None:
    run = next(run for run in plan(stored(folder)) if run.name == "MNIST-RndF-rate0.1-seed1")
    leave_run(run.config, [(90.0, 90.0), (1.0, 1.0)], 2, status)
    assert cell(folder, "RndF")["best_error"] == 9.0
    assert run.name in sweep_table(folder).missing


def test_a_condition_of_which_nothing_has_ended_has_no_figure(folder: Path) -> None:
    for run in plan(stored(folder)):
        if run.condition == "SGD":
            run.folder.write_result(RunResult(run.folder.path, "failed", "disk full"))
    table = sweep_table(folder)
    sgd = cell(folder, "SGD")
    assert math.isnan(sgd["best_error"])
    assert (sgd["runs"], sgd["ended"]) == (4, 0)
    assert table.cells["class_of_best"].isna().all()  # nothing to be three points from
    assert "| SGD | - * |" in as_markdown(table)
    assert table.missing["MNIST-SGD-rate1-seed0"] == "failed after 0 epochs: disk full"
    draw(table)


def test_a_damaged_run_is_named_and_in_no_mean(folder: Path) -> None:
    part = folder / "MNIST-SGD-rate1-seed0" / "metrics" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    assert "part-00000.parquet" in sweep_table(folder).missing["MNIST-SGD-rate1-seed0"]
    sgd = cell(folder, "SGD")
    assert (sgd["best_error"], sgd["ended"]) == ((30 + 14) / 2, 3)


def test_the_markdown_of_several_datasets_begins_with_the_grid(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(epochs=1, lr_factors=1)
    config = SweepConfig(["SGD", "BN"], ["MNIST", "CIFAR10"], protocol=protocol, output=str(tmp_path))
    for error, run in zip(
        [1.0, 30.0, 5.0, 20.0], sorted(left(config), key=lambda r: r.condition), strict=True
    ):
        leave_run(run.config, [(90.0, 90.0), (error, error)], 1)
    markdown = as_markdown(sweep_table(tmp_path))
    lines = markdown.splitlines()
    assert "| condition | MNIST | CIFAR10 |" in lines
    assert "| SGD | 5.00 (0.67) | 20.00 (22.73) |" in lines
    assert "| BN | 1.00 ▲ (0.52) | 30.00 ▼ (16.75) |" in lines
    assert "interval" not in markdown  # one seed has none


def test_the_files_hold_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(folder), "--output", str(folder / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(folder / "out" / "table.png")
    assert (folder / "out" / "table.md").read_text() in out
    cells = pd.read_csv(folder / "out" / "table.csv")
    assert cells["best_error"].tolist() == pytest.approx(sweep_table(folder).cells["best_error"].tolist())
    assert mpl.image.imread(folder / "out" / "table.png").std() > 0.01
    again = write(sweep_table(folder), folder / "again")
    assert again[0].read_text() == (folder / "out" / "table.md").read_text()


def test_the_figure_shows_the_cells_and_their_colors(folder: Path) -> None:
    figure = draw(sweep_table(folder))
    ours, theirs = figure.axes
    assert [text.get_text() for text in ours.texts] == ["12.00", "79.50 ▼", "9.00 ▲ *", "9.00 ▲"]
    assert [text.get_text() for text in theirs.texts] == ["0.67", "88.65 ▼", "1.81", "-"]
    assert [label.get_text() for label in ours.get_yticklabels()] == CONDITIONS
    assert figure.legends[0].get_texts()[-1].get_text() == "* some runs are missing"
    colors = ours.collections[0].get_facecolors().tolist()
    assert colors[0] != colors[1] != colors[2] == colors[3]


def test_data_that_the_paper_does_not_have_stand_alone(tmp_path: Path) -> None:
    config = SweepConfig(
        ["SGD"], ["digits"], protocol=SweepProtocolConfig(1, lr_factors=1), output=str(tmp_path)
    )
    leave_run(left(config)[0].config, [(90.0, 90.0), (5.0, 5.0)], 1)
    table = sweep_table(tmp_path)
    assert len(draw(table).axes) == 1
    assert table.rank_correlation == {}


def test_a_copy_of_a_run_is_named_and_takes_no_other_runs_place(folder: Path) -> None:
    run = folder / "MNIST-SGD-rate1-seed0"
    shutil.copytree(run, folder / "old")
    shutil.copytree(run, folder / "aside" / run.name)
    table = sweep_table(folder)
    assert cell(folder, "SGD")["ended"] == 4
    assert table.missing["old"] == "not planned by this sweep"


@pytest.mark.parametrize("content", [None, "[3]", "{", '{"version": 1}'], ids=repr)
def test_what_is_no_sweep_is_one_clear_error(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main(["table", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("feedbackhook: error:")
    assert error.count("\n") == 1
    with pytest.raises(StoreError, match="holds no sweep" if content is None else "manifest.json is damaged"):
        sweep_table(tmp_path)


def test_a_typo_and_a_run_are_told_from_a_folder_that_holds_no_sweep(folder: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        sweep_table(folder / "nowhere")
    with pytest.raises(StoreError, match=f"but is a run of the one in {folder}"):
        sweep_table(folder / "MNIST-SGD-rate1-seed0")


def test_the_papers_table_is_whole() -> None:
    paper = error_rates()
    assert paper.shape == (39, 15)
    assert int(paper.notna().sum().sum()) == 531  # 543 with SGD and uSF+BN twice on six datasets
    assert all(Condition.parse(name).name == name for name in paper.index)
    # means over the 15 datasets that the paper prints
    for condition, mean in {"SGD": 53.31, "BN+BM": 45.35, "uSF": 89.88, "uSF+BN+BM": 45.99}.items():
        assert paper.loc[condition].mean() == pytest.approx(mean, abs=0.006)
