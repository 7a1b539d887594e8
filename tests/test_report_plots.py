"""Figures from the table alone: which lines they hold, with which colours and labels."""

from __future__ import annotations

import io
import math
from pathlib import Path

import matplotlib as mpl
import pandas
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from feedbackhook.recorder import Recorder, read
from feedbackhook.report.plots import angles_against_epoch, error_against_epoch


def table(folder: Path, runs: int = 1, layers: int = 3) -> pandas.DataFrame:
    for run in range(runs):
        with Recorder(folder / f"run{run}") as recorder:
            for epoch in range(4):
                recorder.add(epoch, epoch, "test_error", 80 / (epoch + 1) + run)
                if epoch:
                    recorder.add(epoch, epoch, "train_error", 60 / epoch)
                # written from the output to the input, since the order of rows says nothing
                for depth in reversed(range(layers)):
                    recorder.add(epoch, epoch, "weight_angle", 40 + depth + epoch, f"layer{depth}", depth)
    return read(folder)


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """x and y of the lines drawn from data."""
    drawn = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]


def legend(axes: Axes) -> list[str]:
    box = axes.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_error_is_drawn_for_test_and_training(tmp_path: Path) -> None:
    axes = error_against_epoch(table(tmp_path)).axes[0]
    assert sorted(lines(axes)) == [
        ([0, 1, 2, 3], [80.0, 40.0, 80 / 3, 20.0]),
        ([1, 2, 3], [60.0, 30.0, 20.0]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "error [%]")
    assert legend(axes) == ["test", "training"]


def test_error_of_several_runs_is_told_apart_by_colour(tmp_path: Path) -> None:
    axes = error_against_epoch(table(tmp_path, runs=3)).axes[0]
    assert len(lines(axes)) == 6
    solid = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 4]
    assert len({to_rgb(line.get_color()) for line in solid}) == 3
    assert {"run0", "run1", "run2"} < set(legend(axes))


def test_angles_are_a_line_a_layer_from_input_to_output(tmp_path: Path) -> None:
    axes = angles_against_epoch(table(tmp_path)).axes[0]
    assert lines(axes) == [([0, 1, 2, 3], [40.0 + d, 41.0 + d, 42.0 + d, 43.0 + d]) for d in range(3)]
    assert legend(axes) == ["layer0", "layer1", "layer2"]
    assert "°" in axes.get_ylabel()
    right_angle = [line for line in axes.lines if list(line.get_ydata()) == [90, 90]]
    assert [line.get_linestyle() for line in right_angle] == [":"]
    assert axes.get_ylim()[1] > 90


def test_many_layers_have_a_scale_of_depth_in_place_of_names(tmp_path: Path) -> None:
    figure = angles_against_epoch(table(tmp_path, layers=20))
    axes, bar = figure.axes
    assert legend(axes) == []
    assert "depth" in bar.get_ylabel()
    assert len({line.get_color() for line in axes.lines if len(line.get_xdata()) == 4}) == 20


def test_angles_of_several_runs_are_their_mean(tmp_path: Path) -> None:
    rows = table(tmp_path, runs=2, layers=1)
    rows.loc[(rows.run == "run1") & (rows.metric == "weight_angle"), "value"] += 10
    axes = angles_against_epoch(rows).axes[0]
    assert lines(axes)[0] == ([0, 1, 2, 3], [45.0, 46.0, 47.0, 48.0])


def test_an_angle_beyond_90_degrees_stays_in_the_picture(tmp_path: Path) -> None:
    rows = table(tmp_path)
    rows.loc[rows.metric == "weight_angle", "value"] += 110
    assert angles_against_epoch(rows).axes[0].get_ylim()[1] > 155


def test_a_value_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    rows = table(tmp_path)
    rows.loc[(rows.metric == "test_error") & (rows.epoch == 3), "value"] = math.inf
    longest = max(lines(error_against_epoch(rows).axes[0]), key=lambda line: line[1][0])
    assert longest[0] == [0, 1, 2]


@pytest.mark.parametrize("draw", [error_against_epoch, angles_against_epoch])
def test_a_figure_is_drawn_without_global_state(tmp_path: Path, draw: object) -> None:
    before = dict(mpl.rcParams)
    assert callable(draw)
    figure = draw(table(tmp_path))
    assert png(figure).startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", [error_against_epoch, angles_against_epoch])
def test_a_table_without_the_metric_is_an_error(tmp_path: Path, draw: object) -> None:
    rows = table(tmp_path)
    assert callable(draw)
    with pytest.raises(ValueError, match="the table holds no"):
        draw(rows[rows.metric == "norm_ratio"])
