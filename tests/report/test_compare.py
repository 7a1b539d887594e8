"""Configurations compared over seeds: intervals, paired tests, and too few runs said to be too few."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.run_folders import leave_run
from support.sweeps import left

from feedbackhook.cli import main
from feedbackhook.experiments.config import (
    OptimizerConfig,
    ProtocolConfig,
    RunConfig,
    SweepConfig,
    SweepProtocolConfig,
)
from feedbackhook.report.compare import compare
from feedbackhook.report.errors import ReportError
from feedbackhook.report.runs import collect
from feedbackhook.report.statistics import Interval, holm, interval, paired_test, percent_interval

A = [5.0, 5.5, 6.0, 4.5, 5.2, 5.9, 6.4]
B = [7.0, 7.7, 8.9, 6.1, 5.1, 8.0, 9.0]


def test_an_interval_is_students() -> None:
    mean, low, high = interval(A)
    expected = stats.ttest_1samp(A, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(A))
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("of", [interval, percent_interval])
def test_one_value_has_no_interval_and_none_no_mean(of: Callable[..., Interval]) -> None:
    assert of([3.0]).mean == 3.0
    assert math.isnan(of([3.0]).low)
    assert math.isnan(of([]).mean)


@pytest.mark.parametrize(
    "errors", [[3.0, 90.6], [80.0, 99.0], [0.0, 0.2], [99.9, 100.0], [0.0, 100.0], [0.0, 0.0, 1e-12]], ids=str
)
def test_an_interval_of_errors_lies_within_0_and_100_and_holds_their_mean(errors: list[float]) -> None:
    mean, low, high = percent_interval(errors)
    assert 0 <= low < mean < high <= 100
    student = interval(errors)
    assert student.low < 0 or student.high > 100  # or this would test nothing


@pytest.mark.parametrize("error", [0.0, 37.5, 100.0])
def test_errors_that_do_not_vary_have_an_interval_without_width(error: float) -> None:
    assert percent_interval([error] * 3) == pytest.approx((error, error, error))


def test_an_interval_of_errors_is_students_on_the_scale_of_logits() -> None:
    mean, low, high = percent_interval(B)
    share, logits = mean / 100, [math.log(end / (100 - end)) for end in (low, mean, high)]
    half = stats.t.ppf(0.975, 6) * stats.sem(B) / 100 / (share * (1 - share))
    assert np.diff(logits) == pytest.approx([half, half])


def test_what_is_no_percentage_has_no_such_interval() -> None:
    with pytest.raises(ValueError, match="between 0 and 100, but these go from -1 to 3"):
        percent_interval([3.0, -1.0])


SAMPLES = 2_000
DEVIATION = math.sqrt(0.95 * 0.05 / SAMPLES)  # of a coverage of 95% that is measured on so many samples


def coverage(of: Callable[..., Interval], samples: np.ndarray, mean: float) -> float:
    return float(np.mean([low <= mean <= high for _, low, high in map(of, samples)]))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_cover_95_percent_of_the_time(seeds: int) -> None:
    """Normal errors whose spread is small beside their mean, for which the logit is a straight line and the
    interval exact."""
    samples = np.random.default_rng(seeds).normal(20, 0.01, (SAMPLES, seeds))
    assert coverage(percent_interval, samples, 20) == pytest.approx(0.95, abs=5 * DEVIATION)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_skewed_errors_near_0_are_covered_better_than_by_students(seeds: int) -> None:
    """Errors of a beta distribution, of mean 10 and deviation 6.5, whose long end is above."""
    samples = 100 * np.random.default_rng(seeds).beta(2, 18, (SAMPLES, seeds))
    assert coverage(percent_interval, samples, 10) > coverage(interval, samples, 10)


def test_the_paired_test_is_wilcoxons_with_its_effect() -> None:
    test = paired_test(A, B)
    assert test.p == pytest.approx(stats.wilcoxon(A, B, method="exact").pvalue)
    assert test.p == pytest.approx(2 * 2 / 2**7)  # of 128 signings, two are at least as far on either side
    assert test.effect == pytest.approx((1 - 27) / 28)  # one pair of rank 1 against ranks 2 to 7
    assert test.difference == pytest.approx(np.median(np.subtract(A, B)))
    assert (test.pairs, test.differing) == (7, 7)
    assert paired_test(B, A).effect == pytest.approx(26 / 28)


def test_too_few_pairs_that_differ_have_no_p() -> None:
    assert paired_test(A[:5], B[:5]).p is None
    assert paired_test(A[:6], B[:6]).p is not None
    assert paired_test(A[:6], [*B[:5], A[5]]).p is None  # six pairs, five of which differ
    tied = paired_test(A, A)
    assert (tied.p, tied.effect, tied.difference, tied.differing) == (None, None, 0.0, 0)


@pytest.mark.parametrize(
    "p_values", [[0.04], [0.01, 0.04, 0.03], [0.5, 0.6], [0.02, 0.02, 0.9, 0.001, 0.02]], ids=str
)
def test_holms_p_is_that_of_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """Marcus, Peritz and Gabriel (1976): a hypothesis is rejected if each set of hypotheses that holds it is,
    here by the smallest p of the set times its size."""
    places = range(len(p_values))
    sets = [c for size in places for c in itertools.combinations(places, size + 1)]
    of_set = {each: min(1.0, len(each) * min(p_values[place] for place in each)) for each in sets}
    closed = [max(p for each, p in of_set.items() if place in each) for place in places]
    assert holm(p_values) == pytest.approx(closed, rel=1e-12)


def test_errors_that_differ_by_rounding_are_ties() -> None:
    assert paired_test([0.1 + 0.2], [0.3]).differing == 0


def leave(root: Path, condition: str, errors: list[float], **given: float) -> None:
    for seed, error in enumerate(errors):
        output = root / f"{condition}-{given.get('lr', '')}-{seed}".replace(" ", "-")
        config = RunConfig(
            condition, protocol=ProtocolConfig(epochs=2, seed=seed, threads=1), output=str(output)
        )
        config.optimizer = OptimizerConfig(**given)  # type: ignore[arg-type]
        leave_run(config, [(90.0, 90.0), (error, 1.0), (error + 1, 1.0)], 2)


def test_configurations_are_compared_over_seeds(tmp_path: Path) -> None:
    leave(tmp_path, "SGD", A)
    leave(tmp_path, "uSF+BN", B)
    found = compare(collect(tmp_path))
    means = found.means.set_index("configuration")
    assert means.loc["SGD", "best_mean"] == pytest.approx(np.mean(A))
    assert means.loc["SGD", "final_mean"] == pytest.approx(np.mean(A) + 1)
    assert means.loc["uSF+BN", "best_high"] == pytest.approx(percent_interval(B).high)
    assert means["runs"].tolist() == [7, 7]
    best = found.tests[found.tests["error"] == "best"].iloc[0]
    assert (best["first"], best["second"], best["pairs"]) == ("uSF+BN", "SGD", 7)
    assert best["verdict"] == "SGD has a lower error than uSF+BN (p = 0.031)"


def test_pairs_share_their_seed_whatever_the_order(tmp_path: Path) -> None:
    leave(tmp_path, "SGD", A)
    leave(tmp_path, "uSF", [a + 1 for a in A[:3]])
    test = compare(collect(tmp_path)).tests.iloc[0]
    assert (test["pairs"], test["difference"]) == (3, pytest.approx(1))
    assert test["verdict"] == "too few runs"


def test_no_difference_is_not_taken_for_one(tmp_path: Path) -> None:
    leave(tmp_path, "SGD", A)
    leave(tmp_path, "uSF", [a + (-1) ** i * (i + 1) / 10 for i, a in enumerate(A)])
    assert compare(collect(tmp_path)).tests.iloc[0]["verdict"].startswith("no difference shown (p = ")


def test_learning_rates_are_beside_each_other_only_when_asked(tmp_path: Path) -> None:
    leave(tmp_path, "SGD", A[:1], lr=0.1)
    leave(tmp_path, "SGD", A[:1], lr=0.01)
    runs = collect(tmp_path)
    names = compare(runs, rates=True).means["configuration"].tolist()
    assert sorted(names) == ["SGD, learning rate 0.01", "SGD, learning rate 0.1"]
    found = compare(runs)
    assert found.means[["configuration", "rates"]].to_numpy().tolist() == [["SGD", 2]]
    assert len(found.tests) == 0


def leave_sweep(path: Path, val_fraction: float = 0.1, seeds: int = 2) -> Path:
    """Four conditions at two rates: the rate 1 tests better, and 0.1 is better on what is held out."""
    names = ["uSF+BN", "SGD", "frSF+BN", "brSF+BN"]
    config = SweepConfig(names, ["digits", "MNIST"], output=str(path))
    config.data.val_fraction = val_fraction
    config.protocol = SweepProtocolConfig(epochs=2, lr_factors=[1.0, 0.1], seeds=seeds)
    for run in left(config):
        test = 10 + names.index(run.condition) + run.seed / 8 + (5 if run.lr_factor == 0.1 else 0)
        leave_run(run.config, [(90.0, 90.0), (test + 1, 60.0), (test, 20 * run.lr_factor + run.seed)], 2)
    return path


@pytest.mark.parametrize(("val_fraction", "rate", "error"), [(0.1, 5e-5, 15), (0.0, 5e-4, 10)])
def test_conditions_are_compared_at_the_rate_chosen_for_each_and_against_the_first(
    val_fraction: float, rate: float, error: float, tmp_path: Path
) -> None:
    found = compare(collect(leave_sweep(tmp_path / "sweep", val_fraction)))
    assert found.chosen_by.startswith("validation error" if val_fraction else "best test error, which")
    assert found.means["learning_rate"].tolist() == pytest.approx([rate] * 8)
    on_digits = found.means[found.means["dataset"] == "digits"]
    assert on_digits["configuration"].tolist() == ["uSF+BN", "SGD", "frSF+BN", "brSF+BN"]  # as in the sweep
    assert on_digits["best_mean"].tolist() == pytest.approx([error + k + 1 / 16 for k in range(4)])
    assert found.tests["second"].tolist() == ["uSF+BN"] * 6
    assert found.tests["pairs"].tolist() == [4] * 6


def test_a_rate_that_lacks_seeds_is_not_chosen(tmp_path: Path) -> None:
    folder = leave_sweep(tmp_path / "sweep")
    (folder / "digits-SGD-rate0.1-seed1" / "status.json").write_text("{")
    means = compare(collect(folder)).means.set_index(["dataset", "configuration"])
    assert means.loc[("digits", "SGD"), ["learning_rate", "runs"]].tolist() == [5e-4, 2]


def test_any_configuration_or_each_two_can_be_tested(tmp_path: Path) -> None:
    runs = collect(leave_sweep(tmp_path / "sweep"))
    assert set(compare(runs, against="SGD").tests["second"]) == {"SGD"}
    assert len(compare(runs, against="all").tests) == 2 * 6
    with pytest.raises(ReportError, match="no configuration has this name; did you mean 'frSF\\+BN', 'brSF"):
        compare(runs, against="FRSF+BN")


def test_too_few_runs_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave_sweep(tmp_path / "sweep")
    assert main(["compare", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "oo few" in line] == [
        "Too few runs for every test: a test needs 6 pairs of runs, on the same data with the same seed, "
        "whose errors differ, and there are at most 4."
    ]
    rows = [line.split()[0] for line in lines if line.strip().endswith(")") and "digits" in line]
    assert rows == ["uSF+BN", "SGD", "frSF+BN", "brSF+BN"]
    assert main(["compare", str(folder), "--rates", "true"]) == 0
    assert "frSF+BN, learning rate 5e-05" in capsys.readouterr().out


def test_tests_that_can_be_made_have_their_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(leave_sweep(tmp_path / "sweep", seeds=6))]) == 0
    out = capsys.readouterr().out
    assert "minus uSF+BN, on the same data with the same seed: Wilcoxon" in out
    assert "p is corrected for 3 tests of each error (Holm)" in out
    smallest = 2 / 2**12  # of 12 pairs that all point one way, times three tests
    assert out.count(f"uSF+BN has a lower error than SGD (corrected p = {3 * smallest:.2g})") == 2
    assert "oo few" not in out


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    leave(tmp_path / "first", "SGD", A[:1])
    leave(tmp_path / "second", "SGD", A[:1])
    with pytest.raises(
        ReportError, match="first/SGD--0 and second/SGD--0 have the same configuration and se"
    ):
        compare(collect(tmp_path))


def test_a_run_without_an_error_is_refused_by_name(tmp_path: Path) -> None:
    config = RunConfig("SGD", protocol=ProtocolConfig(epochs=2, threads=1), output=str(tmp_path / "run"))
    leave_run(config, [(math.nan, math.nan)], 2)
    with pytest.raises(ReportError, match="run has no test error"):
        compare(collect(tmp_path))


def test_the_command_prints_means_tests_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "SGD", A)
    leave(tmp_path, "uSF+BN", B)
    (tmp_path / "SGD--0" / "status.json").write_text("{")
    assert main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    mean, low, high = percent_interval(A[1:])
    assert f"{mean:.2f} ({low:.2f} to {high:.2f})" in out
    assert "left out: SGD--0" in out
    assert "uSF+BN" in out
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
