"""The last error of runs against their mean gradient angle."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from support.run_folders import leave_run
from support.sweeps import left, tiny

from feedbackhook.cli import main
from feedbackhook.report.error_and_angle import draw, points, rank_correlations
from feedbackhook.report.plots import NothingToDraw
from feedbackhook.report.runs import collect
from feedbackhook.store.recorder import Recorder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six runs, of which two by backprop have no angle, and one of the others diverged."""
    runs = left(tiny(tmp_path / "sweep"))
    for number, run in enumerate(runs):
        diverged = number == 5
        leave_run(
            run.config,
            [(90.0, 90.0), (30.0 + number, 30.0), *([] if diverged else [(20.0 + number, 20.0)])],
            2,
        )
        if run.condition == "SGD":
            continue
        with Recorder(run.folder.path) as recorder:
            for step, angle in ((10, 40.0), (20, 60.0)):
                recorder.add(step, step // 10, "gradient_angle", angle + number, "conv1", 0)
                recorder.add(step, step // 10, "gradient_angle", math.nan if step == 10 else 30.0, "fc1", 1)
                recorder.add(step, step // 10, "gradient_angle", 0.0, "fc2", 2)  # the last layer
    return tmp_path / "sweep"


def test_each_finished_run_is_a_point(folder: Path) -> None:
    made = points(collect(folder)).set_index("run")
    assert len(made) == 3
    assert set(made["rule"]) == {"uSF", "brSF"}
    first = made.loc["digits-uSF-rate1-seed0"]
    assert (first["error"], first["dataset"], first["condition"]) == (22.0, "digits", "uSF")
    assert (
        first["angle"] == (42.0 + 62.0 + 30.0) / 3
    )  # without the last layer, and without what is not a number


def test_the_rank_correlation_of_each_dataset() -> None:
    made = pd.DataFrame(
        {"dataset": ["a"] * 4 + ["b"] * 2, "angle": [10.0, 20, 30, 40, 1, 2], "error": [1.0, 2, 4, 3, 1, 2]}
    )
    found = rank_correlations(made).set_index("dataset")
    assert found.loc["a", "correlation"] == pytest.approx(0.8)
    assert found.loc["a", "runs"] == 4
    assert math.isnan(found.loc["b", "correlation"])


def test_a_panel_for_each_dataset_and_a_color_for_each_rule(folder: Path) -> None:
    made = points(collect(folder))
    figure = draw(pd.concat([made, made.assign(dataset="npz:data/other.npz")]))
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.partition("\n")[0] for title in titles] == ["digits", "other.npz"]
    assert all("3 runs" in title for title in titles)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["uSF", "brSF"]
    offsets = [offset for each in figure.axes[0].collections for offset in each.get_offsets().tolist()]
    assert sorted(offsets) == sorted(made[["angle", "error"]].to_numpy().tolist())


def test_nothing_to_draw(folder: Path) -> None:
    made = points(collect(folder))
    with pytest.raises(NothingToDraw, match=r"set record\.gradient_angle_every"):
        draw(made[:0])


def test_the_command_draws_what_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures"
    names = ["--figures", "[error,error_and_angle]", "--formats", "[png]", "--output", str(figures)]
    assert main(["plot", str(folder), *names]) == 0
    assert sorted(path.name for path in figures.iterdir()) == ["error.png", "error_and_angle.png"]
    capsys.readouterr()
    assert main(["plot", str(folder), "--figures", "[error_and_angel]"]) == 2
    assert "there is no figure 'error_and_angel'; did you mean 'error_and_angle'" in capsys.readouterr().err
