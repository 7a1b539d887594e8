"""The checks of runs on a sweep's page and in figures, and the marks of conditions beside controls."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from support.pages import Parsed
from support.run_folders import leave_run
from support.sweeps import left

import feedbackhook
from feedbackhook import Recorder
from feedbackhook.experiments.config import SweepConfig, SweepModelConfig, SweepProtocolConfig
from feedbackhook.experiments.sweep.controls import BOTH
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.checks import draw_checks, last_checks
from feedbackhook.report.errors import NothingToDraw
from feedbackhook.report.html.page import page
from feedbackhook.report.tables import as_markdown

LAYERS = ["conv<1>", "fc"]
ERRORS = {"SGD": 5.0, "RndF": 40.0, BOTH: 30.0}


def record(folder: Path, step: int, floor: float) -> None:
    """Checks of two layers, the first of them with this floor, and its angle accordingly."""
    with Recorder(folder, append=True) as recorder:
        for depth, layer in enumerate(LAYERS):
            values = {"floor": (floor if depth == 0 else 50.0, 1.0), "growth": (3.0, 1 / 2**-23)}
            values["angle"] = (math.nan if depth == 0 and floor < 1 else 70.0, 89.0)
            for kind, (value, threshold) in values.items():
                recorder.add(step, 1, f"check_{kind}", value, layer, depth)
                recorder.add(step, 1, f"check_{kind}_threshold", threshold, layer, depth)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    runs = left(
        SweepConfig(
            ["SGD", "RndF"],
            ["digits"],
            model=SweepModelConfig("liao2016/mnist"),
            protocol=SweepProtocolConfig(epochs=1, lr_factors=[1.0, 0.1], seeds=1),
            controls=True,
            output=str(folder),
        )
    )
    for run in runs:
        worse = 0 if run.lr_factor == 1 else 9
        error = ERRORS[run.condition] + worse
        leave_run(run.config, [(90.0, 90.0), (error, error)], 1)
        if run.condition == "RndF":
            record(run.folder.path, 0, 7.0)
            record(run.folder.path, 10, 0.01)
    return folder


def test_the_last_checks_have_the_verdicts_of_their_thresholds(sweep: Path) -> None:
    table = feedbackhook.read(sweep)
    checks = last_checks(table[table["run"] == "digits-RndF-rate1-seed0"])
    assert set(checks["step"]) == {10}
    verdicts = checks.set_index(["layer", "kind"])[["verdict", "outcome"]].apply(tuple, axis=1).to_dict()
    assert verdicts == {
        (LAYERS[0], "floor"): ("at the floor", "fails"),
        (LAYERS[0], "angle"): ("undefined", "undefined"),
        (LAYERS[0], "growth"): ("steady", "passes"),
        (LAYERS[1], "floor"): ("resolved", "passes"),
        (LAYERS[1], "angle"): ("aligned", "passes"),
        (LAYERS[1], "growth"): ("steady", "passes"),
    }
    assert last_checks(table[table["metric"] == "test_error"]).empty


def test_the_page_has_a_table_of_verdicts_for_the_best_run(sweep: Path) -> None:
    html = page(sweep)
    assert "Can these angles be trusted?" in html
    assert "at the floor <small>1 of 2 layers" in html
    assert "undefined <small>1 of 2 layers" in html
    assert "digits-RndF-rate1-seed0: each layer" in html
    assert "digits-RndF-rate0.1-seed0: each layer" not in html
    assert "conv&lt;1&gt;" in html
    assert "conv<1>" not in html.partition("<script")[0]
    assert Parsed(html).headings[-1] == "Left out"


def test_a_condition_that_is_not_better_than_the_control_is_marked(sweep: Path) -> None:
    table = sweep_table(sweep)
    cells = table.cells.set_index("condition")
    assert cells["control"].to_dict() == {"SGD": False, "RndF": False, BOTH: True}
    assert cells["not_better"].to_dict() == {"SGD": False, "RndF": True, BOTH: False}
    text = as_markdown(table)
    assert f"○ not better than {BOTH}, in which no error signal passes below the classifier." in text
    assert "| RndF | 40.00 ▼ ○ |" in text
    assert f"| {BOTH} | 30.00 ▼ |" in text
    html = page(sweep)
    assert "40.00 ▼ ○" in html


def test_the_figure_names_layers_checks_and_verdicts(sweep: Path) -> None:
    table = feedbackhook.read(sweep)
    figure = draw_checks(table[table["run"] == "digits-RndF-rate1-seed0"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == LAYERS
    assert "at the floor" in " ".join(text.get_text() for text in axes.texts)
    with pytest.raises(NothingToDraw, match=r"set record\.check_every"):
        draw_checks(pd.DataFrame(columns=table.columns))
