"""What a sweep's page says first, the drawing of its cells, its tests, and how it is watched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.pages import Parsed, make
from support.run_folders import leave_run

from feedbackhook.cli import main
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.html.answer import answer
from feedbackhook.report.html.cells import SCALE, bases, grid, shade
from feedbackhook.report.html.page import Renewal, page
from feedbackhook.report.html.pairs import paired_tests
from feedbackhook.report.html.watch import watch

ERRORS = {"SGD": (4.0, 8.0), "BN": (2.0, 9.0), "uSF": (90.0, 50.0), "frSF": (3.0, 9.5), "RndF": (1.0, 30.0)}


def leave(folder: Path, errors: dict[str, tuple[float, ...]], seeds: int = 1) -> Path:
    """A sweep with these errors by condition, on as many of two datasets as there are."""
    datasets = ["MNIST", "CIFAR10"][: len(next(iter(errors.values())))]
    for run in make(folder, list(errors), datasets, epochs=2, lr_factors=1, seeds=seeds):
        error = errors[run.condition][datasets.index(run.dataset)] + run.seed / 8
        leave_run(run.config, [(90.0, 90.0), (2 * error, 50.0), (error, 40.0)], 2)
    return folder


def test_the_answer_is_the_best_rule_beside_the_best_backprop_over_datasets(tmp_path: Path) -> None:
    found = answer(sweep_table(leave(tmp_path, ERRORS)))
    assert (found.best, found.backprop) == ("frSF", "BN")  # 6.25 beside 70 and 15.5; 5.5 beside 6
    assert found.difference == pytest.approx(6.25 - 5.5)
    assert [(row["best"], row["backprop"]) for row in found.by_dataset] == [("RndF", "BN"), ("frSF", "SGD")]
    assert "frSF has the smallest test error, 6.25%, as a mean over 2 datasets" in found.sentences[0]
    shown = Parsed(page(tmp_path)).texts["answer"]
    assert "+0.75 points of test error: frSF against BN" in " ".join(shown.split())
    assert "There is one seed" in shown


def test_a_control_counts_neither_as_a_rule_nor_as_backprop(tmp_path: Path) -> None:
    table = sweep_table(leave(tmp_path, ERRORS))
    for name in ("BN", "frSF"):
        table.manifest.conditions[name] = replace(table.manifest.conditions[name], control=True)
    found = answer(table)
    assert (found.best, found.backprop) == ("RndF", "SGD")


@pytest.mark.parametrize(
    ("errors", "why"),
    [
        ({"SGD": (4.0,)}, "no condition with a rule beside backprop"),
        ({"uSF": (4.0,)}, "no condition with backprop"),
    ],
)
def test_without_a_rule_or_backprop_there_is_no_answer(
    errors: dict[str, tuple[float, ...]], why: str, tmp_path: Path
) -> None:
    found = answer(sweep_table(leave(tmp_path, errors)))
    assert found.best is None
    assert why in found.sentences[0]


def test_a_condition_without_an_error_on_every_dataset_is_not_compared_and_named(tmp_path: Path) -> None:
    leave(tmp_path, ERRORS)
    (tmp_path / "CIFAR10-frSF-rate1-seed0" / "status.json").write_text("{")
    found = answer(sweep_table(tmp_path))
    assert found.best == "RndF"
    assert found.sentences[-1] == "Without an error on every dataset, and so not compared: frSF."


def test_colors_grow_with_the_distance_and_bear_black_text() -> None:
    colors = [np.array(list(bytes.fromhex(shade(points)[1:]))) for points in SCALE]
    middle = SCALE.index(0)
    distances = [np.abs(color - colors[middle]).sum() for color in colors]
    assert np.all(np.diff(distances[middle:]) > 0)
    assert np.all(np.diff(distances[: middle + 1]) < 0)
    assert shade(31) == shade(99) == shade(30)
    for color in colors:  # contrast by WCAG 2.1, with #1b1b1b
        linear = ((color / 255 + 0.055) / 1.055) ** 2.4
        assert (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / (((27 / 255 + 0.055) / 1.055) ** 2.4 + 0.05) > 4.5


def test_the_curve_of_a_cell_is_the_mean_of_its_runs_on_a_logarithmic_scale(tmp_path: Path) -> None:
    rows = grid(sweep_table(leave(tmp_path, {"SGD": (2.0,), "uSF": (8.0,)}, seeds=2)))
    low, high = rows[0]["cells"][0]["curve_range"]
    assert (low, high) == pytest.approx((2 + 1 / 16, 90))
    curve = [tuple(map(float, point.split(","))) for point in rows[1]["cells"][0]["curve"].split()]
    errors = [90, 16 + 1 / 8, 8 + 1 / 16]
    expected = [30 * (1 - np.log(error / low) / np.log(high / low)) for error in errors]
    assert curve == [pytest.approx((50 * epoch, y), rel=1e-3, abs=1e-3) for epoch, y in enumerate(expected)]
    assert rows[0]["cells"][0]["reference_curve"] is None
    assert rows[1]["cells"][0]["reference_curve"] == rows[0]["cells"][0]["curve"]


def test_without_the_reference_cells_are_colored_by_their_distance_from_the_smallest(tmp_path: Path) -> None:
    table = sweep_table(leave(tmp_path, {"BN": (2.0, 9.0), "uSF": (1.0, 50.0)}))
    assert bases(table) == ({"CIFAR10": 9.0, "MNIST": 1.0}, "the smallest error of each dataset")
    assert grid(table)[1]["cells"][1]["color"] == shade(41)


def test_paired_tests_are_corrected_for_the_number_of_pairs(tmp_path: Path) -> None:
    leave(tmp_path, {name: errors[:1] for name, errors in ERRORS.items()}, seeds=6)
    tests = paired_tests(sweep_table(tmp_path))
    assert tests["count"] == 4
    assert {row["p"] for row in tests["rows"]} == {2 / 2**6}
    assert {row["corrected"] for row in tests["rows"]} == {4 * 2 / 2**6}
    assert "no difference shown (corrected p = 0.12)" in Parsed(page(tmp_path)).texts["tests"]


def test_too_few_pairs_for_a_test_are_said(tmp_path: Path) -> None:
    tests = paired_tests(sweep_table(leave(tmp_path, ERRORS)))
    assert tests["rows"] == []
    assert "the sweep has 2 for each condition" in tests["notes"][0]


def test_a_watched_page_is_renewed_until_all_runs_have_ended(tmp_path: Path) -> None:
    folder, path = leave(tmp_path / "sweep", {"SGD": (4.0,), "uSF": (8.0,)}), tmp_path / "report.html"
    status = folder / "MNIST-uSF-rate1-seed0" / "status.json"
    ended = status.read_text()
    status.write_text(ended.replace("finished", "running"))
    waits, lines = [], []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        shown = Parsed(path.read_text(encoding="utf-8"))
        refresh = {a["content"] for tag, a in shown.elements if a.get("http-equiv") == "refresh"}
        assert refresh == {"150"}
        assert "1 of 2 runs have ended" in shown.texts["answer"]
        assert "renewed every 2.5 minutes" in shown.texts["answer"]
        status.write_text(ended)

    watch(folder, path, 2.5, lines.append, wait)
    assert waits == [150]
    assert "1 of 2 runs have ended" in lines[0]
    assert lines[1] == "2 of 2 runs have ended: the page is final"
    assert path.read_text(encoding="utf-8") == page(folder)


def test_an_interrupt_leaves_a_page_that_does_not_ask_for_another(tmp_path: Path) -> None:
    make(tmp_path / "sweep", ["SGD"], ["MNIST"], epochs=2, lr_factors=1)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(tmp_path / "sweep", tmp_path / "report.html", 1, lambda _: None, stop)
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' in page(tmp_path / "sweep", Renewal(1, "now"))


def test_the_command_watches_a_sweep_that_is_over_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = leave(tmp_path / "sweep", {"SGD": (4.0,), "uSF": (8.0,)})
    assert main(["report", str(folder), "--watch", "1"]) == 0
    assert capsys.readouterr().out == "2 of 2 runs have ended: the page is final\n"
    assert (folder / "report.html").exists()
    assert main(["report", str(folder), "--watch", "0"]) == 2
    assert "watch" in capsys.readouterr().err
