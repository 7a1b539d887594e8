"""The page about the paper's claims says what the committed runs show."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import yaml

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
        ("brSF+BN+BM concordance=1", "mnist", 1.6, "redrawing the magnitudes costs too little"),
        ("frSF+BN+BM concordance=0.75", "mnist", 3.0, "three quarters of the signs"),
        ("brSF+BN+BM concordance=0.75", "cifar10", 25.0, "three quarters cost a redrawn V"),
        ("brSF+BN+BM concordance=0", "cifar10", 67.0, "With no agreeing sign it does better"),
        ("frSF+BN+BM concordance=0.25", "flowers17", 50.0, "A fixed V with a quarter of the signs is worse"),
        ("uSF+BN+BM Bottom", "cifar10", 40.0, "uSF.BN.BM loses nothing"),
        ("uSF+BN", "cifar10", 20.0, "are more than ten points above the paper"),
        ("brSF+BN+BM concordance=0.25", "flowers17", 80.0, "brSF does far better here than in the paper"),
        ("uSF+BM", "cifar10", 90.0, "Either of BN and BM is enough"),
        ("RndF+BN", "mnist", 1.5, "Random feedback gains from BN"),
        ("RndF+BN+BM Top", "mnist", 1.4, "RndF.BN.BM is better than its last layer alone"),
        ("SGD", "lfw", 60.0, "plain SGD, whose angle is 0, does no better"),
        ("NuSF", "cifar10", 25.0, "On CIFAR-10 it does not"),
        ("uSF", "phoneme", 30.0, "The phonemes hardly tell rules apart"),
        ("RndF Bottom", "mnist", 3.0, "Random feedback needs a last layer"),
        ("RndF+BN+BM", "flowers17", 80.0, "and only there"),
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
    found = made_of(cells, points).random_magnitudes_equal_sgd()
    assert (found.verdict, found.untold) == (evidence.HOLDS, ["phoneme"])
    cells.loc[(cells["condition"] == "frSF+BN+BM concordance=1") & (cells["sweep"] == "mnist"), "best"] = 2.0
    found = made_of(cells, points).random_magnitudes_equal_sgd()
    assert (found.verdict, found.fails) == (evidence.IN_PART, ["mnist"])


def test_verdicts_in_words() -> None:
    verdicts = {
        evidence.HOLDS: evidence.Conclusion(["mnist"], [], ["phoneme"]),
        evidence.IN_PART: evidence.Conclusion(["mnist"], ["lfw"], []),
        evidence.DOES_NOT: evidence.Conclusion([], ["lfw"], ["phoneme"]),
        evidence.CANNOT_TELL: evidence.Conclusion([], [], ["phoneme"]),
    }
    assert {found.verdict for found in verdicts.values()} == set(verdicts)
    assert all(found.verdict == word for word, found in verdicts.items())


def test_a_sweep_whose_core_conditions_are_alike_tells_nothing(
    tables: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    cells, points = tables
    made = made_of(cells, points)
    assert [s for s in made.sweeps if not made.tells(s)] == ["phoneme"]
    both = cells["condition"].str.contains(r"BN\+BM") & (cells["sweep"] == "lfw")
    cells.loc[both, "best"] = 50.0
    made = made_of(cells, points)
    assert [s for s in made.sweeps if not made.tells(s)] == ["lfw", "phoneme"]


def test_a_network_in_which_the_conclusions_held_stops_the_page(
    tables: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    changed = {**trials().resnet20, "frSF+BM concordance=1": 20.5}
    made = evidence.Evidence(*tables, replace(trials(), resnet20=changed))
    with pytest.raises(evidence.NotBorneOut, match="contradicts 1 and 3"):
        evidence.page(made)


@pytest.mark.parametrize("sweep", evidence.SOURCES)
def test_the_runs_are_of_the_versions_that_the_page_names(sweep: str) -> None:
    """Also the devices."""
    configs = sorted((ROOT / "analysis/runs/evidence" / sweep).glob("*/config.yaml"))
    provenance = [yaml.load(file.read_bytes(), yaml.CSafeLoader)["provenance"] for file in configs]
    found = {(each["versions"]["torch"][:4], each["machine"].get("gpu")) for each in provenance}
    assert found == {("2.14", None) if sweep == "phoneme" else ("2.11", "NVIDIA H200")}


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
    verdicts = [conclusion().verdict for conclusion in conclusions]
    words = ("none", "one", "two", "three", "four", "five", "six", "seven")
    whole, part = (words[verdicts.count(verdict)] for verdict in (evidence.HOLDS, evidence.IN_PART))
    datasets, telling = words[len(made.sweeps)], words[sum(map(made.tells, made.sweeps))]
    assert made.resnet_contradicts()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"The paper's conditions on {datasets} datasets" in readme
    said = f"{whole} of its four conclusions hold on the {telling} that tell rules apart, {part} in part"
    assert f"{said}; a ResNet-20 contradicts two" in readme
    page = (ROOT / "docs/evidence.md").read_text()
    said = f"{whole} of four conclusions hold on the {telling} datasets that tell rules apart, {part} in part"
    assert said in page
    assert f"gradient angle on {datasets} datasets" in page
