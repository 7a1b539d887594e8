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
        with Recorder(run.folder.path, append=True) as recorder:
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
    # without the last layer, and without what is not a number
    assert first["angle"] == ((42.0 + 62.0) / 2 + 30.0) / 2


def with_angles(folder: Path, *angles: tuple[float, float, float]) -> pd.DataFrame:
    """The points of a finished run of three layers, by their angles at each step."""
    (run, *_) = left(tiny(folder, conditions=["uSF"]))
    leave_run(run.config, [(90.0, 90.0), (20.0, 20.0)], 1)
    with Recorder(run.folder.path, append=True) as recorder:
        for step, of_layers in enumerate(angles):
            for depth, angle in enumerate(of_layers):
                recorder.add(step, 0, "gradient_angle", angle, f"layer{depth}", depth)
    return points(collect(folder))


def test_a_frozen_last_layer_is_the_last(tmp_path: Path) -> None:
    (angle,) = with_angles(tmp_path, (40.0, 50.0, math.nan), (50.0, 60.0, math.nan))["angle"]
    assert angle == 50.0


def test_a_run_whose_gradients_vanish_has_no_angle_and_stays_in_the_table(tmp_path: Path) -> None:
    """As after step 0 of a network that sign-symmetric feedback without normalization has killed."""
    dead = (math.nan, math.nan, 0.0)
    made = with_angles(tmp_path, (40.0, 50.0, 0.0), dead, dead)
    assert made["angle"].isna().tolist() == [True]
    found = rank_correlations(made)
    assert found[["runs", "with_angle"]].to_numpy().tolist() == [[1, 0]]
    with pytest.raises(NothingToDraw, match="in half of the recorded steps of each layer"):
        draw(made)


def test_a_panel_says_how_many_of_its_runs_are_drawn(folder: Path) -> None:
    made = points(collect(folder))
    made.loc[0, "angle"] = math.nan
    (axes,) = draw(made).axes
    assert axes.get_title() == "digits\n2 of 3 runs"


def test_the_rank_correlation_of_each_dataset() -> None:
    made = pd.DataFrame(
        {"dataset": ["a"] * 4 + ["b"] * 2, "angle": [10.0, 20, 30, 40, 1, 2], "error": [1.0, 2, 4, 3, 1, 2]}
    )
    found = rank_correlations(made).set_index("dataset")
    assert found.loc["a", "correlation"] == pytest.approx(0.8)
    assert found.loc["a", ["runs", "with_angle"]].tolist() == [4, 4]
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
