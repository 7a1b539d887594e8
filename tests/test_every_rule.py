"""The page with every rule beside backprop says what the committed runs show."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from feedbackhook.experiments.conditions import Condition

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "analysis"))
import every_rule  # noqa: E402

RESULTS = ROOT / "analysis/results/rules"
FIXED = (
    *("uSF", "NuSF", "brSF", "frSF", "RndF", "FA", "uSF-SN", "uSF-init", "sign-symmetry"),
    *("angle", "noise", "sparse", "quantized", "low_rank", "toeplitz", "svd"),
)
DIRECT = ("DFA", "sDFA", "DRTP")


def test_the_page_and_its_tables_are_those_of_the_runs(tmp_path: Path) -> None:
    every_rule.main(output=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "cells.csv", "runs.csv"}
    for path in tmp_path.iterdir():
        assert (RESULTS / path.name).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_recipe_has_the_conditions_of_the_page(name: str) -> None:
    recipe = yaml.safe_load((ROOT / f"recipes/rules/{name}.yaml").read_text())
    assert sorted(recipe["conditions"]) == sorted(every_rule.ORDER)
    assert recipe["protocol"]["epochs"] == every_rule.SOURCES[name].epochs
    for condition in recipe["conditions"]:
        parsed = Condition.parse(condition)
        assert (parsed.batch_norm, parsed.manhattan) == (True, 1)


def test_the_page_has_every_fixed_and_direct_rule() -> None:
    shown = {Condition.parse(condition).feedback for condition in every_rule.ORDER}
    assert shown - {None} == {*FIXED, *DIRECT}


def cells(**errors: float) -> pd.DataFrame:
    """Complete cells of `mnist` with these errors in %, by condition without BN and BM; all others 1%."""
    rows = [
        {
            "sweep": "mnist",
            "condition": c,
            "last": errors.get(c.removesuffix("+BN+BM"), 1 + i / 1e9),
            "angle": i,
        }
        for i, c in enumerate(every_rule.ORDER)
    ]
    table = pd.DataFrame(rows).assign(planned=3, ended=3, diverged=0, weight_angle=30.0)
    return table.assign(lowest=table["last"], highest=table["last"], best=table["last"])


def made(table: pd.DataFrame) -> every_rule.Results:
    return every_rule.Results(table, pd.DataFrame())


@pytest.mark.parametrize(
    ("condition", "error", "sentence"),
    [("NuSF+BN+BM", 3.0, "uSF, NuSF and uSF-SN do alike"), ("BN+BM", 0.5, "its own error is higher")],
)
def test_a_sentence_that_the_runs_do_not_bear_out_stops_the_page(
    condition: str, error: float, sentence: str
) -> None:
    table = cells()
    assert "BioTorch |" in every_rule.page(made(table))
    table.loc[table["condition"] == condition, "last"] = error
    with pytest.raises(every_rule.NotBorneOut, match=sentence):
        every_rule.page(made(table))


def test_a_difference_is_two_standard_errors_of_all_seeds() -> None:
    """Of 30,000 images, 1.00% and 1.16% are 300 and 348 errors: a standard error of 25.3; 50.6 for two."""
    results = made(cells(FA=1.16, DFA=1.17))
    assert results.against_backprop("mnist", worse=True) == ["DFA+BN+BM"]
    assert len(results.against_backprop("mnist", worse=False)) == len(every_rule.ORDER) - 2
    assert not results.worse("mnist", "BN+BM", than="DFA+BN+BM")
    assert results.alike("mnist", "BN+BM", "FA+BN+BM")
    assert not results.alike("mnist", "BN+BM", "DFA+BN+BM")


def test_a_cell_with_a_missing_run_is_compared_with_nothing_and_counted() -> None:
    table = cells(FA=50.0)
    table.loc[table["condition"] == "FA+BN+BM", "ended"] = 2
    results = made(table)
    assert results.missing("mnist") == 1
    assert not results.known("mnist", "FA+BN+BM")
    assert results.against_backprop("mnist", worse=True) == []
    assert "FA+BN+BM" not in {row["condition"] for row in results.beside_biotorch("mnist")}
    assert "| 10,000 | 1 |" in every_rule.page(results)


def test_what_biotorch_has_too_is_compared_by_its_distance_from_backprop() -> None:
    rows = {row["condition"]: row for row in made(cells(FA=3.0)).beside_biotorch("mnist")}
    assert rows["FA+BN+BM"]["our_gap"] == 2.0
    assert rows["FA+BN+BM"]["their_gap"] == pytest.approx(0.79)
