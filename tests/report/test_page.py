"""What a sweep's page holds."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.pages import CONDITIONS, FAILED, FOLDER, REASON, UNSTARTED, Parsed, csv, make
from support.run_folders import leave_run

from feedbackhook import Recorder
from feedbackhook.cli import main
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import ConfigError, RunConfig, SweepConfig
from feedbackhook.experiments.stored import check_same
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.html import vega
from feedbackhook.report.html.cells import shade
from feedbackhook.report.html.page import page, write
from feedbackhook.report.tables import MARKS

if TYPE_CHECKING:
    pass


@pytest.fixture(scope="module")
def parsed(html: str) -> Parsed:
    return Parsed(html)


def test_the_sections_come_in_order_and_the_page_says_what_it_is(parsed: Parsed) -> None:
    assert parsed.headings == [
        "sweep",
        "Which rule comes closest to backprop?",
        "Error by condition and dataset",
        "Paired tests",
        "Error against concordance",
        "Learning curves",
        "Alignment by layer",
        "How it was run",
        "Runs",
        "Left out",
    ]
    elements = dict(parsed.elements)
    assert elements["html"] == {"lang": "en"}
    names = {attributes.get("name"): attributes for tag, attributes in parsed.elements if tag == "meta"}
    assert names["viewport"]["content"] == "width=device-width, initial-scale=1"
    assert all("scope" in attributes for tag, attributes in parsed.elements if tag == "th")
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in parsed.elements if tag == "a"]
    assert {link[1:] for link in links} <= set(ids)


def test_nothing_is_asked_of_the_network(html: str, parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "import " not in html[html.rindex("<script") :]
    assert "default-src 'none'" in html  # so that a browser refuses what these lines may have missed


def test_the_grid_holds_the_numbers_marks_and_colours_of_the_table(folder: Path, parsed: Parsed) -> None:
    cells = sweep_table(folder).cells
    assert len(parsed.cells) == len(cells) == 12
    for cell in cells.to_dict("records"):
        star = "" if cell["ended"] == cell["runs"] else " *"
        text = f"{cell['best_error']:.2f}{MARKS[cell['class_of_best']]}{star}"
        assert parsed.cells[cell["condition"], cell["dataset"]] == text
    assert sum(text.endswith("*") for text in parsed.cells.values()) == 2
    errors = parsed.texts["errors"]
    for cell in cells.to_dict("records"):
        for name in ("best", "chosen"):
            assert f"[{cell[f'{name}_low']:.2f}, {cell[f'{name}_high']:.2f}]" in errors
        assert f"chosen {cell['chosen_error']:.2f}" in errors
    sgd = cells.iloc[0]
    assert f"paper 0.67 ({sgd['difference']:+.2f})" in errors
    assert "3 of 4 runs" in errors
    shown = {attributes["style"] for _, attributes in parsed.elements if "data-condition" in attributes}
    best = cells.pivot(index="condition", columns="dataset", values="best_error")
    assert shown == {f"background: {shade(points)}" for points in (best - best.loc["SGD"]).to_numpy().flat}


def test_the_summary_says_what_was_run_and_how_to_run_it_again(folder: Path, parsed: Parsed) -> None:
    summary = " ".join(parsed.texts["summary"].split())
    assert "48 runs are planned: 46 finished, 1 failed, 1 not started. 2 of them are left out" in summary
    for words in ("Epochs 2", "0.0005 × 1, 0.1", "Seeds 0, 1", "Batch size 100", "Validation images 10%"):
        assert words in summary
    assert f"feedbackhook sweep {folder}/sweep.yaml --output {folder}-again" in summary
    assert "they differ between runs" in summary
    assert "2.8.0+other in 1 run MNIST-SGD-rate1-seed0" in summary


def test_runs_of_the_same_origin_are_not_said_to_differ(tmp_path: Path) -> None:
    for run in make(tmp_path, ["SGD", "BN"], ["MNIST"], epochs=1, lr_factors=1):
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    summary = Parsed(page(tmp_path)).texts["summary"]
    assert "the same in all runs" in summary
    assert "differ" not in summary
    assert "All of them are in the results" in summary


def test_the_summary_tells_of_other_batch_sizes(tmp_path: Path) -> None:
    make(tmp_path, ["uSF+BM"], ["MNIST"], epochs=4, lr_factors=1)
    assert "100; uSF+BM also 100, 500 after epoch 3" in Parsed(page(tmp_path)).texts["summary"]


def test_names_and_reasons_are_text_and_nothing_else(html: str, parsed: Parsed) -> None:
    assert "<script>window" not in html
    assert [tag for tag, _ in parsed.elements].count("script") == 4
    assert REASON in parsed.texts["left-out"]
    assert "<b>old<b>: not planned by this sweep" in parsed.texts["left-out"]
    assert REASON in parsed.texts["runs"]
    assert set(csv(parsed, "runs")["dataset"]) == {"MNIST", FOLDER}


def test_whatever_is_left_out_is_named(folder: Path, parsed: Parsed) -> None:
    missing = sweep_table(folder).missing
    assert set(missing) == {FAILED, UNSTARTED, "<b>old<b>"}
    for run, reason in missing.items():
        assert f"{run}: {reason}" in parsed.texts["left-out"]


def test_each_run_has_its_configuration_and_a_command_that_repeats_it(
    folder: Path, parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = parsed.texts["runs"]
    planned = plan(stored(folder))
    for run in planned:
        assert run.name in details
    run = next(run for run in planned if run.name == "MNIST-frSF+BN+BM-concordance=0.5-rate0.1-seed1")
    assert (run.folder.path / "config.yaml").read_text() in details
    name, *arguments = shlex.split(
        next(line for line in details.splitlines() if f"{run.name}/config" in line)
    )
    given: list[RunConfig] = []

    def keep(config: RunConfig, **_: Any) -> None:
        given.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("feedbackhook.experiments.training.run.train", keep)
    assert name == "feedbackhook"
    assert main(arguments) == 2
    assert given[0].output == f"{run.folder.path}-again"
    check_same(run.folder, given[0])  # which leaves out where it goes


def test_the_command_of_the_sweep_is_that_sweep_in_another_folder(
    folder: Path, parsed: Parsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [shlex.split(line) for line in parsed.texts["summary"].splitlines() if "sweep.yaml" in line]
    given: list[SweepConfig] = []
    monkeypatch.setattr(
        "feedbackhook.experiments.sweep.run.sweep", lambda config, *_: given.append(config) or {}
    )
    for line in lines:
        assert main(line[1:]) == 0
    again, on = given
    assert again.output == f"{folder}-again"
    assert on == stored(folder)
    assert [run.name for run in plan(again)] == [run.name for run in plan(on)]


def test_the_concordance_curve_is_the_tables_and_the_papers(folder: Path, parsed: Parsed) -> None:
    points = csv(parsed, "concordance")
    ours = points[points["source"] == "measured"]
    cells = sweep_table(folder).cells.set_index(["dataset", "condition"])
    for series, concordance, condition in (
        ("brSF+BN+BM", 0.5, CONDITIONS[2]),
        ("brSF+BN+BM", 1.0, CONDITIONS[3]),  # which says nothing of it
        ("frSF+BN+BM", 1.0, CONDITIONS[5]),
    ):
        for dataset in ("MNIST", FOLDER):
            where = (ours["series"] == series) & (ours["concordance"] == concordance)
            point = ours[where & (ours["dataset"] == dataset)].iloc[0]
            cell = cells.loc[(dataset, condition)]
            for name, column in (("error", "best_error"), ("low", "best_low"), ("high", "best_high")):
                assert point[name] == pytest.approx(cell[column], rel=1e-3)
    theirs = points[points["source"] != "measured"]
    assert set(theirs["dataset"]) == {"MNIST"}
    assert len(theirs) == 10
    fixed = theirs[theirs["series"] == "frSF+BN+BM"].set_index("concordance")["error"]
    assert fixed[0.25] == error_rates().loc["frSF+BN+BM concordance=0.25", "MNIST"]
    assert f"There is no published curve for {FOLDER}." in parsed.texts["over-concordance"]


@pytest.mark.parametrize(
    ("conditions", "known"),
    [(["SGD", "uSF"], "none."), (["SGD", "frSF", "brSF"], "only 1.")],
)
def test_fewer_than_two_concordances_have_no_curve_and_a_sentence(
    tmp_path: Path, conditions: list[str], known: str
) -> None:
    for run in make(tmp_path, conditions, ["MNIST"], epochs=1, lr_factors=1):
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    parsed = Parsed(page(tmp_path))
    assert f"it needs two concordances, and the sweep has {known}" in parsed.texts["over-concordance"]
    assert "concordance" not in json.loads(parsed.texts["specifications"])


def test_the_curves_are_those_of_the_runs_and_best_is_the_tables_rate(folder: Path, parsed: Parsed) -> None:
    runs, points = csv(parsed, "runs"), csv(parsed, "curves")
    factor = sweep_table(folder).cells.set_index(["dataset", "condition"])["lr_factor"]
    for run in runs.to_dict("records"):
        assert run["best"] == (factor[run["dataset"], run["condition"]] == run["lr_factor"])
    assert points["r"].nunique() == 46
    one = points[points["r"] == runs.index[runs["run"] == "MNIST-SGD-rate0.1-seed0"][0]]
    stored = sweep_table(folder).cells
    assert one["epoch"].tolist() == [0, 1, 2]
    assert one["test_error"].tolist()[0] == 90.0
    assert one["test_error"].min() >= stored["best_low"].min()


def test_the_angles_are_those_of_the_runs(folder: Path, parsed: Parsed) -> None:
    angles, layers = csv(parsed, "angles"), csv(parsed, "layers")
    assert layers["layer"].tolist() == ["conv1", "fc2"]
    last = angles[(angles["epoch"] == 2) & (angles["l"] == 1)]
    assert set(last["error_angle"].dropna()) == {78.0}
    assert set(last["weight_angle"]) == {46.0}
    assert angles.loc[angles["l"] == 0, "error_angle"].isna().all()
    note = parsed.texts["layers"]
    assert "have no point: 32." in note  # one layer, two epochs, sixteen runs
    assert "Without error angles: MNIST-brSF+BN+BM-concordance=0.5-rate1-seed0" in note


def test_axes_are_labelled_with_their_units(parsed: Parsed) -> None:
    titles = {
        name: [_axis(chart, "x"), _axis(chart, "y")]
        for name, chart in json.loads(parsed.texts["specifications"]).items()
        if name != "cells"  # whose axes are names
    }
    assert titles == {
        "concordance": ["concordance (probability of the same sign)", "best test error [%]"],
        "test_error": ["epoch", "test error [%]"],
        "train_error": ["epoch", "training error [%]"],
        "weight_angle": ["epoch", "weight angle [°]"],
        "error_angle": ["epoch", "error angle [°]"],
    }


def _axis(chart: dict[str, Any], axis: str) -> str:
    encodings = [layer["encoding"] for layer in chart.get("layer", [chart])]
    title: str = next(encoding[axis]["title"] for encoding in encodings if axis in encoding)
    return title


def test_conditions_have_their_rules_colours_and_no_two_look_alike() -> None:
    names = list(error_rates().index)
    rules = [Condition.parse(name).feedback or theme.BACKPROP for name in names]
    looks = dict(zip(names, vega.looks(rules), strict=True))
    assert len(set(looks.values())) == len(names)
    assert looks["SGD"][0] == theme.RULES[theme.BACKPROP].color
    assert looks["brSF+BN+BM"][0] == theme.RULES["brSF"].color


def test_long_curves_are_thinned_and_it_is_said(tmp_path: Path) -> None:
    runs = make(tmp_path, ["uSF"], ["MNIST"], epochs=300, lr_factors=1)
    leave_run(runs[0].config, [(90.0, 90.0), *((float(e), 5.0) for e in range(1, 301))], 300)
    parsed = Parsed(page(tmp_path))
    epochs = csv(parsed, "curves")["epoch"]
    assert len(epochs) == 100
    assert (epochs.min(), epochs.max()) == (0, 300)
    assert set(np.diff(epochs)) == {3, 4}
    assert "up to 301 epochs, of which at most 100 are drawn" in parsed.texts["learning"]
    assert csv(parsed, "angles").groupby("l").size().tolist() == [30, 30]


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    runs = make(tmp_path, ["SGD", "BN", "BN+BM"], ["MNIST"], epochs=1, lr_factors=1)
    for run in runs:
        leave_run(run.config, [(90.0, 90.0), (5.0, 5.0)], 1)
    part = runs[0].folder.path / "metrics" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    (runs[1].folder.path / "status.json").write_text("{")
    parsed = Parsed(page(tmp_path))
    assert "3 runs are planned: 2 finished, 1 damaged. 2 of them" in " ".join(parsed.texts["summary"].split())
    assert "part-00000.parquet" in parsed.texts["left-out"]
    assert "status.json is damaged" in parsed.texts["left-out"]
    assert "status.json is damaged" in parsed.texts["runs"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_sweep_of_which_no_run_has_ended_says_so_by_name(tmp_path: Path, begun: bool) -> None:
    runs = make(
        tmp_path / "sweep", ["SGD", "frSF", "frSF concordance=0.5"], ["MNIST"], epochs=2, lr_factors=1
    )
    if begun:
        leave_run(runs[0].config, [(90.0, 90.0)], 2, "running")
    parsed = Parsed(page(tmp_path / "sweep"))
    assert "None of them has ended" in parsed.texts["summary"]
    assert "No learning curves" in parsed.texts["learning"]
    assert "No alignment angles" in parsed.texts["layers"]
    assert "no run with a concordance has an error" in parsed.texts["over-concordance"]
    assert set(parsed.cells.values()) == {"- *"}
    for run in runs:
        why = "running after 0 epochs" if begun and run == runs[0] else "not started"
        assert f"{run.name}: {why}" in parsed.texts["left-out"]


def test_the_command_writes_the_page(
    folder: Path, html: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "report.html"
    for option in ("-o", "--output"):
        assert main(["report", str(folder), option, str(path)]) == 0
        assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8") == html
    assert main(["report", str(folder), "-o", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "nothing: ["], ids=repr)
def test_what_is_no_sweep_is_one_clear_error(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ("holds no sweep" if content is None else "manifest.json is damaged") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_without_altair_the_extra_to_install_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("page", "charts", "vega"):
        monkeypatch.delitem(sys.modules, f"feedbackhook.report.html.{module}")
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main(["report", str(folder)]) == 2
    assert "pip install 'feedbackhook[analysis]'" in capsys.readouterr().err


def test_500_runs_of_65_epochs_stay_below_5_megabytes(tmp_path: Path) -> None:
    conditions = ["SGD", "BN+BM", "uSF+BN+BM", *CONDITIONS[2:], "RndF", "RndF+BN+BM", "uSF"]
    runs = make(tmp_path / "sweep", conditions, ["MNIST"], epochs=65, lr_factors=5, seeds=10)
    first, *others = runs
    leave_run(first.config, [(90.1, 90.0), *((1234 / (e + 17), 5.0) for e in range(65))], 65)
    rng = np.random.default_rng(0)
    with Recorder(first.folder.path, append=True) as recorder:
        for epoch, depth in np.ndindex(65, 5):
            for metric in ("weight_angle", "error_angle"):
                recorder.add(epoch, epoch, metric, rng.uniform(10, 99), f"stages.{depth}.conv", depth)
    for run in others:
        shutil.copytree(first.folder.path, run.folder.path)
    path = write(tmp_path / "sweep", tmp_path / "report.html")
    assert len(runs) == 500
    assert csv(Parsed(path.read_text(encoding="utf-8")), "angles")["r"].nunique() == 500
    assert path.stat().st_size < 5e6
