"""The page about the paper's claims says what the committed runs show."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "analysis"))
import evidence  # noqa: E402

RESULTS = ROOT / "analysis/results/liao2016"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evidence")
    evidence.main(output=output)
    return output


def test_the_page_and_its_tables_are_those_of_the_runs(rebuilt: Path) -> None:
    """All but pictures, which depend on the version of matplotlib."""
    texts = [path.relative_to(rebuilt) for path in rebuilt.rglob("*") if path.suffix in (".md", ".csv")]
    assert Path("README.md") in texts
    assert len(texts) > 6
    for path in texts:
        assert (RESULTS / path).read_text() == (rebuilt / path).read_text(), path
    pictures = {path.relative_to(rebuilt) for path in rebuilt.rglob("*.png")}
    assert pictures == {path.relative_to(RESULTS) for path in RESULTS.rglob("*.png")}


@cache
def trials() -> evidence.Trials:
    return evidence.read_trials(ROOT / "analysis/runs")


def made_of(cells: pd.DataFrame, points: pd.DataFrame) -> evidence.Evidence:
    return evidence.Evidence(cells, points, trials())


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_csv(RESULTS / "cells.csv"), pd.read_csv(RESULTS / "error_and_angle.csv")


@pytest.mark.parametrize(
    ("condition", "sweep", "error", "sentence"),
    [
        ("uSF", "cifar10", 30.0, "uSF alone learns on no images"),
        ("frSF+BN+BM concordance=0.5", "lfw", 99.0, "fixed feedback is better than redrawn"),
        ("brSF+BN+BM concordance=1", "mnist", 1.6, "redrawn magnitudes cost nothing"),
        ("frSF+BN+BM concordance=0.75", "mnist", 3.0, "three quarters of the signs"),
        ("brSF+BN+BM concordance=0.75", "cifar10", 25.0, "three quarters cost a redrawn V"),
        ("brSF+BN+BM concordance=0", "cifar10", 90.0, "opposed signs are no worse than half"),
        ("frSF+BN+BM concordance=0.25", "flowers17", 50.0, "a quarter of the signs is worse than half"),
        ("uSF+BN+BM Bottom", "cifar10", 40.0, "uSF.BN.BM loses nothing"),
        ("uSF+BN", "cifar10", 20.0, "are far off"),
        ("brSF+BN+BM concordance=0.25", "flowers17", 80.0, "does far better here than in the paper"),
        ("uSF", "phoneme", 30.0, "The phonemes hardly tell rules apart"),
        ("RndF Bottom", "mnist", 3.0, "Random feedback leaves the last layer"),
        ("RndF+BN+BM", "flowers17", 80.0, "Random feedback alone is far worse"),
        ("NuSF", "mnist", 30.0, "On MNIST, NuSF and random feedback do without"),
    ],
)
def test_a_sentence_that_the_runs_do_not_bear_out_stops_the_page(
    tables: tuple[pd.DataFrame, pd.DataFrame], condition: str, sweep: str, error: float, sentence: str
) -> None:
    cells, points = tables
    evidence.page(made_of(cells, points))
    changed = (cells["condition"] == condition) & (cells["sweep"] == sweep)
    assert changed.sum() == 1
    cells.loc[changed, "best"] = error
    with pytest.raises(evidence.NotBorneOut, match=sentence):
        evidence.page(made_of(cells, points))


def test_a_verdict_follows_the_cells(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    cells, points = tables
    made = made_of(cells, points)
    holds, tried = made.random_magnitudes_equal_sgd()
    assert evidence.verdict(holds, tried) == evidence.HOLDS
    cells.loc[(cells["condition"] == "frSF+BN+BM concordance=1") & (cells["sweep"] == "mnist"), "best"] = 2.0
    made = made_of(cells, points)
    holds, tried = made.random_magnitudes_equal_sgd()
    assert set(tried) - set(holds) == {"mnist"}
    assert evidence.verdict(holds, tried) == evidence.IN_PART
    assert evidence.verdict([], tried) == evidence.DOES_NOT
    assert evidence.verdict([], []) == evidence.CANNOT_TELL


def test_a_difference_is_two_standard_errors() -> None:
    """Of 10,000 images, 1.00% and 1.30% are 100 and 130 errors: a standard error of 15.1; 30.2 for two."""
    cells = pd.DataFrame(
        {"sweep": "mnist", "condition": ["a", "b", "c"], "best": [1.0, 1.30, 1.31], "paper": float("nan")}
    )
    made = made_of(cells, pd.DataFrame())
    assert made.alike("mnist", "a", "b")
    assert made.worse("mnist", "c", than="a")
    assert not made.worse("mnist", "a", than="c")


def test_the_pages_that_tell_of_it_count_as_it_does() -> None:
    """The README and docs/evidence.md say how many conclusions hold on how many datasets."""
    made = made_of(*(pd.read_csv(RESULTS / name) for name in ("cells.csv", "error_and_angle.csv")))
    conclusions = (
        made.magnitudes_do_not_matter,
        made.signs_matter,
        made.random_magnitudes_equal_sgd,
        made.normalization_is_indispensable,
    )
    verdicts = [evidence.verdict(*conclusion()) for conclusion in conclusions]
    words = ("none", "one", "two", "three", "four", "five", "six", "seven")
    whole, part = (words[verdicts.count(verdict)] for verdict in (evidence.HOLDS, evidence.IN_PART))
    datasets = words[len(made.sweeps)]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"The paper's conditions on {datasets} datasets" in readme
    assert f"{whole} of its four conclusions hold on all {datasets}, {part} in part" in readme
    page = (ROOT / "docs/evidence.md").read_text()
    assert f"{whole} of four conclusions hold on all {datasets} datasets, {part} in part" in page
    assert f"gradient angle on {datasets} datasets" in page
