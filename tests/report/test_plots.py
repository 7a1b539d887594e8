"""Figures from the table alone: which lines they hold, with which colors and labels."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import pandas
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from feedbackhook.report.plots import (
    FIGURES,
    QUANTITIES,
    accuracy_and_angle,
    draw_all,
    error_against_epoch,
    layer_heat_map,
    layers_against_epoch,
)
from feedbackhook.store.recorder import Recorder, read


def angles_against_epoch(table: pandas.DataFrame) -> Figure:
    return layers_against_epoch(table, "weight_angle")


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


def test_a_single_step_is_drawn_as_points(tmp_path: Path) -> None:
    rows = table(tmp_path)
    axes = angles_against_epoch(rows[rows.step == 0]).axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert [list(point.get_ydata()) for point in points] == [[40], [41], [42]]


def test_many_layers_have_a_scale_of_depth_in_place_of_names(tmp_path: Path) -> None:
    figure = angles_against_epoch(table(tmp_path, layers=20))
    axes, bar = figure.axes
    assert legend(axes) == []
    assert "depth" in bar.get_ylabel()
    assert bar.get_ylim() == (-0.5, 19.5)
    rows = table(tmp_path / "without the first", layers=20)
    assert angles_against_epoch(rows[rows.layer != "layer0"]).axes[1].get_ylim() == (0.5, 19.5)
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


def test_a_value_that_is_not_finite_is_left_out_and_the_figure_says_so(tmp_path: Path) -> None:
    rows = table(tmp_path)
    assert error_against_epoch(rows).get_supxlabel() == ""
    rows.loc[(rows.metric == "test_error") & (rows.epoch == 3), "value"] = math.inf
    figure = error_against_epoch(rows)
    longest = max(lines(figure.axes[0]), key=lambda line: line[1][0])
    assert longest[0] == [0, 1, 2]
    assert figure.get_supxlabel() == "without 1 value that is not a number"


def watched(
    folder: Path, layers: int = 3, steps: int = 8, ends: bool = True, run: str = "run"
) -> pandas.DataFrame:
    """A run of two steps an epoch, with every quantity of each layer before each step."""
    with Recorder(folder / run) as recorder:
        for step in range(steps):
            for depth in reversed(range(layers)):
                for place, metric in enumerate(QUANTITIES):
                    value = 10 * place + depth + step / 10 if "angle" in metric else 0.5 + depth / 10
                    recorder.add(step, step // 2 + 1, metric, value, f"layer{depth}", depth)
            recorder.add(step, step // 2 + 1, "gradient_angle", 77.0)
            if ends and step % 2 == 0:
                recorder.add(step, step // 2, "test_accuracy", 50.0 + step)
                recorder.add(step, step // 2, "test_error", 50.0 - step)
        for depth in range(layers):
            recorder.add(0, 1, "expected_weight_angle", 30.0 + depth, f"layer{depth}", depth)
    return read(folder)


def test_steps_are_placed_within_their_epoch(tmp_path: Path) -> None:
    axes = layers_against_epoch(watched(tmp_path), "error_angle").axes[0]
    xs, ys = lines(axes)[1]
    assert xs == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert ys[:3] == pytest.approx([11, 11.1, 11.2])
    assert axes.get_xlabel() == "epoch"


def test_where_no_epoch_ends_are_told_the_axis_is_the_step(tmp_path: Path) -> None:
    axes = layers_against_epoch(watched(tmp_path, ends=False), "error_angle").axes[0]
    assert lines(axes)[0][0] == list(range(8))
    assert axes.get_xlabel() == "step"
    assert axes.get_title() == "Error angle against step"


@pytest.mark.parametrize("metric", QUANTITIES)
def test_every_quantity_has_its_unit_and_what_it_is_read_against(tmp_path: Path, metric: str) -> None:
    axes = layers_against_epoch(watched(tmp_path), metric).axes[0]
    assert ("°" in axes.get_ylabel()) == ("angle" in metric)
    dotted = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    other = {"weight_angle": [90, 31], "norm_ratio": [1], "sign_agreement": [0.5]}
    assert dotted == pytest.approx(other.get(metric, [90]))
    assert (axes.get_yscale() == "log") == (metric == "norm_ratio")


def test_a_heat_map_has_a_row_a_layer_from_input_to_output_and_a_column_a_step(tmp_path: Path) -> None:
    figure = layer_heat_map(watched(tmp_path, layers=12), "error_angle")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer{depth}" for depth in range(12)]
    values = axes.collections[0].get_array().reshape(12, 8)
    assert values[5].tolist() == pytest.approx([15 + step / 10 for step in range(8)])
    assert "°" in bar.get_ylabel()
    assert axes.get_xlabel() == "step"


def test_a_heat_map_of_sixty_layers_and_many_steps_is_legible(tmp_path: Path) -> None:
    figure = layer_heat_map(watched(tmp_path, layers=60, steps=400), "error_angle")
    axes = figure.axes[0]
    assert axes.collections[0].get_array().size <= 60 * 120
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 60
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(boxes))


def test_accuracy_stands_above_the_mean_angle_of_the_layers(tmp_path: Path) -> None:
    upper, lower = accuracy_and_angle(watched(tmp_path)).axes
    assert lines(upper)[0] == ([0, 1, 2, 3], [50, 52, 54, 56])
    xs, ys = lines(lower)[0]
    assert xs == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert ys[:2] == pytest.approx([21, 21.1])  # without the network's own row, 77
    assert "mean of 3 layers" in lower.get_ylabel()
    assert upper.get_ylabel() == "test accuracy [%]"


def test_layers_of_unknown_depth_come_last_and_none_is_lost(tmp_path: Path) -> None:
    rows = watched(tmp_path, layers=4)
    rows.loc[rows["layer"] == "layer1", "depth"] = pandas.NA
    labels = [label.get_text() for label in layer_heat_map(rows, "error_angle").axes[0].get_yticklabels()]
    assert labels == ["layer0", "layer2", "layer3", "layer1"]
    rows["depth"] = pandas.NA
    assert len(layer_heat_map(rows, "error_angle").axes[0].get_yticklabels()) == 4
    assert len(legend(layers_against_epoch(rows, "error_angle").axes[0])) == 4


def test_an_epoch_that_has_not_ended_goes_on_at_the_pace_of_the_last(tmp_path: Path) -> None:
    rows = watched(tmp_path)
    rows = rows[~(rows["metric"].str.startswith("test") & (rows["step"] > 4))]
    assert lines(layers_against_epoch(rows, "error_angle").axes[0])[0][0] == [step / 2 for step in range(8)]


def test_accuracy_and_angle_share_one_clock(tmp_path: Path) -> None:
    rows = watched(tmp_path)
    upper, lower = accuracy_and_angle(rows[rows["metric"] != "test_error"]).axes
    assert lines(upper)[0][0] == [0, 1, 2, 3]
    assert lines(lower)[0][0][:3] == [0, 0.5, 1]


def test_all_figures_are_drawn_and_what_is_missing_is_named(tmp_path: Path) -> None:
    rows = watched(tmp_path)
    written, missing = draw_all(rows, tmp_path / "all", formats=("png", "svg"))
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in FIGURES if name != "checks" for kind in ("png", "svg")
    }
    assert missing == {"checks": "the table holds no checks: set record.check_every"}
    written, missing = draw_all(rows[rows.metric != "gradient_angle"], tmp_path / "some")
    assert set(missing) == {"gradient_angle", "gradient_angle_map", "accuracy_and_angle", "checks"}
    assert {path.stem for path in written} == set(FIGURES) - set(missing)


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
