"""Write the page about the paper's claims on real data, and its tables and figure, from the committed runs.

    python analysis/evidence.py

Reads the runs in analysis/runs (evidence, flowers17_validation, cifar10_epochs, cifar10_rates and resnet20)
and writes analysis/results/liao2016. The page's numbers and verdicts are computed here; its sentences are
in evidence.md.jinja.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonargparse import auto_cli

from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import error_and_angle
from feedbackhook.report.aggregate import SweepTable, sweep_table
from feedbackhook.report.runs import collect
from feedbackhook.report.tables import write

HERE = Path(__file__).parent
HOLDS, IN_PART, DOES_NOT, CANNOT_TELL = "holds", "holds in part", "does not hold", "cannot be told"
FULL = ("uSF+BN+BM", "brSF+BN+BM concordance=1", "frSF+BN+BM concordance=1")
HALF = ("brSF+BN+BM concordance=0.5", "frSF+BN+BM concordance=0.5")
CORE = ("SGD", "BN", "BN+BM", "uSF", "NuSF", "uSF+BN+BM", *FULL[1:], *HALF, "RndF", "RndF+BN+BM")
"""The conditions of every sweep."""
NATURAL = ("cifar10", "flowers17", "lfw", "caltech101", "scene15")
"""The sweeps on images of things."""
SLOW = ("uSF+BN", "RndF+BN", "brSF+BN+BM concordance=0.75")
"""Conditions with errors far above the paper's on CIFAR-10, for which a larger learning rate was tried."""
ABOVE = ("RndF", "RndF+BM", "RndF+BN+BM Bottom", "BM2", "BM3")
"""Others with errors far above the paper's on CIFAR-10."""
BELOW = tuple(f"{rule}+BN+BM concordance={c}" for rule in ("brSF", "frSF") for c in ("0.25", "0"))
"""Conditions with errors far below the paper's on CIFAR-10."""


@dataclass(frozen=True)
class Source:
    """One sweep of the evidence.

    Args:
        title: name of the dataset on the page.
        test: number of its test images.
        paper: its column in the paper's tables; None for a stand-in, which has none.
        margin: difference from the paper, in points, from which the page explains a cell.
    """

    title: str
    test: int
    paper: str | None
    margin: float = 5.0


SOURCES = {
    "mnist": Source("MNIST", 10_000, "MNIST", 2.0),
    "cifar10": Source("CIFAR-10 (JPEG)", 10_000, "CIFAR-10", 2.0),
    "flowers17": Source("Flowers17", 340, "Flowers17"),
    "lfw": Source("LFW-ID", 400, "LFW-ID"),
    "caltech101": Source("Caltech101", 949, "Caltech101"),
    "scene15": Source("15 scenes", 2_985, None),
    "phoneme": Source("phonemes", 1_169, None),
}


def read_cells(folder: Path) -> pd.DataFrame:
    """Return a row for each sweep and condition in ``folder``.

    Columns: `sweep`, `condition`, the errors `best` and `chosen` in percent (see
    :class:`feedbackhook.report.aggregate.SweepTable`), which are missing if any run is, `low` and `high`, the
    ends of the 95% interval of `best` over seeds (missing with one seed), `paper` (missing if it has none),
    `difference`, the `epoch` of the best error and the number of `epochs`, and the numbers of `seeds`,
    `runs`, `ended`, `pruned`, `diverged` and `missing` runs.
    """
    published = error_rates()
    parts = []
    for name, source in SOURCES.items():
        if not (folder / name).is_dir():
            continue
        table = sweep_table(folder / name)
        cells = complete(table).assign(epochs=table.manifest.epochs).rename(columns={"best_epoch": "epoch"})
        column = published[source.paper] if source.paper else pd.Series(dtype=float)
        paper = cells["condition"].map(column)
        counts = ["epoch", "epochs", "seeds", "runs", "ended", "pruned", "diverged", "missing"]
        errors = {"best_error": "best", "best_low": "low", "best_high": "high", "chosen_error": "chosen"}
        part = cells[["condition", *errors, *counts]].assign(sweep=name, paper=paper)
        parts.append(part.rename(columns=errors))
    cells = pd.concat(parts, ignore_index=True)
    cells["difference"] = cells["best"] - cells["paper"]
    return cells[["sweep", "condition", "best", "low", "high", "chosen", "paper", "difference", *counts]]


def complete(table: SweepTable) -> pd.DataFrame:
    """Return the cells of a table, without the errors of those that lack a run."""
    cells = table.cells.copy()
    errors = ["best_error", "best_low", "best_high", "chosen_error", "best_epoch"]
    cells.loc[cells["missing"] > 0, errors] = math.nan
    return cells


@dataclass(frozen=True)
class Trials:
    """What was tried beside the sweeps: best test errors in percent.

    Args:
        flowers17: of BN+BM on Flowers17 without a held-out tenth, by the number of training images: 680, or
            1,020 with the validation images.
        cifar10: on CIFAR-10 after 65 epochs, by condition.
        cifar10_rates: on CIFAR-10 at the learning rate above those that pruning left, by condition.
        resnet20: of a ResNet-20 on CIFAR-10, by condition; NaN if a run is missing.
    """

    flowers17: Mapping[int, float]
    cifar10: Mapping[str, float]
    cifar10_rates: Mapping[str, float]
    resnet20: Mapping[str, float]


def read_trials(folder: Path) -> Trials:
    """Read `flowers17_validation`, `cifar10_epochs`, `cifar10_rates` and `resnet20` in ``folder``."""

    def errors(name: str, by: str) -> dict[str, float]:
        cells = complete(sweep_table(folder / name))
        return dict(cells.set_index(by)["best_error"].astype(float))

    flowers17 = errors("flowers17_validation", "dataset")
    return Trials(
        {int(dataset.rpartition("-")[2]): error for dataset, error in flowers17.items()},
        errors("cifar10_epochs", "condition"),
        errors("cifar10_rates", "condition"),
        errors("resnet20", "condition"),
    )


@dataclass(frozen=True)
class Conclusion:
    """Where one of the paper's conclusions holds.

    Args:
        holds: the sweeps where it does.
        fails: those where it does not.
        untold: those that tell no rules apart.
    """

    holds: list[str]
    fails: list[str]
    untold: list[str]

    @property
    def verdict(self) -> str:
        """In words: it holds on all sweeps that tell rules apart, on some, on none, or there is none."""
        if not (self.holds or self.fails):
            return CANNOT_TELL
        return IN_PART if self.holds and self.fails else HOLDS if self.holds else DOES_NOT


def higher(one: float, other: float, images: int) -> bool:
    """Whether an error is higher than another, both in percent of this number of test images, by more than
    two standard errors of the difference of two independent binomial samples."""
    a, b = one / 100, other / 100
    return a - b > 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / images)


class NotBorneOut(ValueError):
    """A sentence of the page claims more than the runs show."""


class Evidence:
    """What the runs say.

    Args:
        cells: what :func:`read_cells` returns.
        points: what :func:`feedbackhook.report.error_and_angle.points` returns for the same runs, with the
            column `sweep`.
        trials: what was tried beside them.
    """

    def __init__(self, cells: pd.DataFrame, points: pd.DataFrame, trials: Trials) -> None:
        self.cells, self.points, self.trials = cells, points, trials
        self.sweeps = list(dict.fromkeys(cells["sweep"]))
        by_cell = cells.set_index(["sweep", "condition"])
        self._best, self._paper = by_cell["best"].to_dict(), by_cell["paper"].to_dict()

    def best(self, sweep: str, condition: str) -> float:
        """The best test error in percent; NaN if no run of the cell has ended."""
        return float(self._best.get((sweep, condition), math.nan))

    def paper(self, sweep: str, condition: str) -> float:
        """The paper's error in percent; NaN if it has none."""
        return float(self._paper.get((sweep, condition), math.nan))

    def worse(self, sweep: str, condition: str, than: str) -> bool:
        """Whether a condition's error is higher than another's on the sweep's test images; see `higher`.
        Seeds are not in it."""
        return higher(self.best(sweep, condition), self.best(sweep, than), SOURCES[sweep].test)

    def alike(self, sweep: str, one: str, other: str) -> bool:
        """Whether neither of two errors is worse than the other."""
        return not (self.worse(sweep, one, other) or self.worse(sweep, other, one))

    def least_difference(self, sweep: str) -> float:
        """The smallest difference, in points, that counts as one near SGD's error."""
        error = self.best(sweep, "SGD") / 100
        return 200 * math.sqrt(2 * error * (1 - error) / SOURCES[sweep].test)

    def tells(self, sweep: str) -> bool:
        """Whether a sweep tells rules apart: two of the core conditions with BN and BM differ."""
        both = [name for name in CORE if "+BN+BM" in name and name in self.known_conditions(sweep)]
        return any(self.worse(sweep, one, other) for one in both for other in both)

    def known_conditions(self, sweep: str) -> set[str]:
        """The conditions that have an error in a sweep."""
        return {c for s, c in self._best if s == sweep and not math.isnan(self.best(s, c))}

    def known(self, *conditions: str) -> list[str]:
        """The sweeps in which all these conditions have an error."""
        return [s for s in self.sweeps if not any(math.isnan(self.best(s, c)) for c in conditions)]

    def images(self, *conditions: str) -> list[str]:
        """The sweeps on images in which all these conditions have an error."""
        return [s for s in self.known(*conditions) if s != "phoneme"]

    def claim(self, text: str, holds: bool) -> str:
        """Return ``text``, a sentence of the page.

        Raises:
            NotBorneOut: ``holds`` is false: the sentence must be changed.
        """
        if not holds:
            raise NotBorneOut(f"the runs do not bear this out: {text!r}; change it in evidence.md.jinja")
        return text

    def angle_correlations(self) -> list[dict[str, object]]:
        """Return Spearman's correlation of angle and last error over the runs of each sweep that have an
        angle: over `all` of them, and over those `with_both` Batch Normalization and Batch Manhattan; the
        numbers of `runs` and of `runs_with_both`, and of runs `without` an angle."""
        found = []
        for sweep, planned in self.points.groupby("sweep", sort=False):
            both = planned[planned["condition"].str.contains(r"BN\+BM")]
            (of_all,), (of_both,) = (
                error_and_angle.rank_correlations(part).to_dict("records") for part in (planned, both)
            )
            found.append(
                {
                    "sweep": sweep,
                    "all": of_all["correlation"],
                    "with_both": of_both["correlation"],
                    "runs": of_all["with_angle"],
                    "runs_with_both": of_both["with_angle"],
                    "without": of_all["runs"] - of_all["with_angle"],
                }
            )
        return sorted(found, key=lambda row: self.sweeps.index(str(row["sweep"])))

    # What the page's sentences say

    def lowest(self, condition: str) -> float:
        """The smallest error of a condition over the sweeps on images."""
        return min(self.best(s, condition) for s in self.images(condition))

    def usf_fails(self) -> bool:
        return self.lowest("uSF") > 85  # the most frequent of ten classes is 11% of MNIST

    def all_diverged(self, condition: str) -> list[str]:
        """The sweeps in which all runs of a condition diverged."""
        cells = self.cells[self.cells["condition"] == condition]
        return cells[cells["diverged"] == cells["runs"]]["sweep"].tolist()

    def either_helps_usf(self) -> bool:
        """Whether BN alone and BM alone are better than neither for uSF on each dataset of images."""
        one = ("uSF+BN", "uSF+BM")
        return all(self.worse(s, "uSF", than=name) for s in self.images("uSF", *one) for name in one)

    def bn_helps_random_feedback(self) -> bool:
        """Whether BN alone is better than neither for random feedback on each dataset of images."""
        return all(self.worse(s, "RndF", than="RndF+BN") for s in self.images("RndF", "RndF+BN"))

    def bm_hurts_random_feedback(self) -> list[str]:
        """The sweeps in which BM alone is worse than neither for random feedback."""
        return [s for s in self.known("RndF", "RndF+BM") if self.worse(s, "RndF+BM", than="RndF")]

    def everywhere_worse(self, condition: str, than: str) -> bool:
        return all(self.worse(s, condition, than) for s in self.images(condition, than))

    def everywhere_alike(self, one: str, other: str) -> bool:
        return all(self.alike(s, one, other) for s in self.images(one, other))

    def behind(self, condition: str, other: str, sweeps: Iterable[str]) -> list[float]:
        """By how many points the errors of a condition are above those of another, sorted."""
        return sorted(self.best(s, condition) - self.best(s, other) for s in sweeps)

    def natural(self) -> list[str]:
        """The sweeps on images of things."""
        return [s for s in self.sweeps if s in NATURAL]

    def bn_and_bm_help_random_feedback(self) -> bool:
        return all(self.worse(s, "RndF", than="RndF+BN+BM") for s in self.natural())

    def validation_images_explain(self) -> bool:
        """Whether BN+BM comes within the margin of the paper's Flowers17 with the validation images, and only
        with them."""
        paper, margin = self.paper("flowers17", "BN+BM"), SOURCES["flowers17"].margin
        without, images = self.trials.flowers17[680], self.trials.flowers17[1020]
        return abs(images - paper) <= margin < abs(without - paper)

    def flowers17_steps_are_small(self) -> bool:
        """Whether BN+BM's errors on Flowers17 with more and more images are alike, one by one."""
        errors = [self.best("flowers17", "BN+BM"), self.trials.flowers17[680], self.trials.flowers17[1020]]
        images = SOURCES["flowers17"].test
        return not any(higher(one, other, images) for one, other in itertools.pairwise(errors))

    def phonemes_alike(self) -> bool:
        """Whether all core conditions but one are within a point of SGD on the phonemes."""
        cells = self.cells[self.cells["sweep"] == "phoneme"]
        cells = cells[cells["condition"].isin(CORE)]
        far = cells[(cells["best"] - self.best("phoneme", "SGD")).abs() >= 1]
        return far["condition"].tolist() == ["brSF+BN+BM concordance=0.5"]

    def seeds(self, sweep: str) -> int:
        """The number of seeds in each cell of a sweep."""
        (number,) = self.cells.loc[self.cells["sweep"] == sweep, "seeds"].unique()
        return int(number)

    def apart(self, sweep: str, one: str, other: str) -> bool:
        """Whether the 95% interval over seeds of one condition's error is above that of another."""
        cells = self.cells[self.cells["sweep"] == sweep].set_index("condition")
        return bool(cells.loc[one, "low"] > cells.loc[other, "high"])

    def half_widths(self, sweep: str) -> pd.Series:
        """Half of the widths of the 95% intervals over seeds, in points, by condition."""
        cells = self.cells[self.cells["sweep"] == sweep].set_index("condition")
        return (cells["high"] - cells["low"]) / 2

    def epochs_explain(self, condition: str) -> bool:
        """Whether 65 epochs bring a condition on CIFAR-10 more than half of the way to the paper's error."""
        paper, ours = self.paper("cifar10", condition), self.best("cifar10", condition)
        return ours - self.trials.cifar10[condition] > (ours - paper) / 2

    def by_share(self, sweep: str, rule: str) -> list[float]:
        """The best errors of a rule with BN and BM at concordance 1, 0.75, 0.5, 0.25 and 0."""
        return [self.best(sweep, f"{rule}+BN+BM concordance={c}") for c in ("1", "0.75", "0.5", "0.25", "0")]

    def with_shares(self) -> list[str]:
        """The sweeps with all concordances."""
        return [s for s in self.sweeps if not any(map(math.isnan, self.by_share(s, "brSF")))]

    def complete_sweeps(self) -> list[str]:
        """The sweeps with all conditions of MNIST's, which are the paper's."""
        conditions = self.cells[self.cells["sweep"] == "mnist"]["condition"]
        return self.known(*conditions)

    def steep_in_the_middle(self, sweep: str) -> bool:
        """Whether a quarter of opposed signs costs less than a point, and half of them more than five if V is
        redrawn."""
        redrawn, fixed = self.by_share(sweep, "brSF"), self.by_share(sweep, "frSF")
        return all(errors[1] - errors[0] < 1 for errors in (redrawn, fixed)) and redrawn[2] - redrawn[0] > 5

    def none_beats_half(self) -> bool:
        """Whether redrawn feedback with no agreeing signs is better than with half of them on Flowers17 and
        CIFAR-10."""
        none, half = (f"brSF+BN+BM concordance={c}" for c in ("0", "0.5"))
        return all(self.worse(s, half, than=none) for s in ("flowers17", "cifar10"))

    def fixed_quarter_is_worse(self) -> bool:
        """Whether fixed feedback with a quarter of agreeing signs is worse than with half on images."""
        return self.everywhere_worse("frSF+BN+BM concordance=0.25", "frSF+BN+BM concordance=0.5")

    def random_feedback_needs_its_last_layer(self) -> bool:
        """Whether random feedback does not learn images with a frozen last layer."""
        frozen = ("RndF Bottom", "RndF+BN+BM Bottom")
        return all(self.best(s, name) > 80 for s in self.images(*frozen) for name in frozen)

    def signs_need_no_last_layer(self) -> bool:
        """Whether uSF+BN+BM is not worse on images with a frozen last layer."""
        frozen, trained = "uSF+BN+BM Bottom", "uSF+BN+BM"
        return not any(self.worse(s, frozen, trained) for s in self.images(frozen, trained))

    def hidden_layers_learn_by_random_feedback(self) -> bool:
        """Whether RndF+BN+BM is better than its last layer alone on images."""
        return self.everywhere_worse("RndF+BN+BM Top", "RndF+BN+BM")

    def difference(self, sweep: str, condition: str) -> float:
        """Our error less the paper's, in points."""
        return self.best(sweep, condition) - self.paper(sweep, condition)

    def differences(self, sweep: str, conditions: Iterable[str]) -> list[float]:
        """Our errors less the paper's, sorted."""
        return sorted(self.difference(sweep, condition) for condition in conditions)

    def smallest_rates_go_on(self) -> bool:
        """Whether of the slow conditions only the two smallest learning rates were trained to the end on
        CIFAR-10."""
        points = self.points[self.points["sweep"] == "cifar10"].groupby("condition")["learning_rate"]
        two = sorted(self.points["learning_rate"].unique())[:2]
        return all(sorted(points.get_group(condition)) == two for condition in SLOW)

    def larger_rates_do_worse(self) -> bool:
        """Whether the slow conditions do worse on CIFAR-10 at the rate above those that pruning left."""
        images = SOURCES["cifar10"].test
        return all(higher(self.trials.cifar10_rates[c], self.best("cifar10", c), images) for c in SLOW)

    def resnet_needs_signs(self) -> bool:
        """Whether half of the signs cost a ResNet-20 at least ten points more than the paper's network."""
        ours, full, half = self.trials.resnet20, "frSF{} concordance=1", "frSF{} concordance=0.5"
        cost = ours[half.format("+BM")] - ours[full.format("+BM")]
        papers = self.best("cifar10", half.format("+BN+BM")) - self.best("cifar10", full.format("+BN+BM"))
        return cost > papers + 10

    def random_beats_half(self) -> bool:
        """Whether random feedback with BM is ten points better than frSF at concordance 0.5, in a ResNet-20
        and in the paper's network."""
        names, half = ("RndF+BM", "frSF+BM concordance=0.5"), "frSF+BN+BM concordance=0.5"
        ours = self.trials.resnet20[names[0]] < self.trials.resnet20[names[1]] - 10
        return ours and self.best("cifar10", "RndF+BN+BM") < self.best("cifar10", half) - 10

    def resnet_contradicts(self) -> bool:
        """Whether with all signs agreeing the three kinds of magnitudes differ in a ResNet-20, pairwise, and
        the random ones are worse than SGD: the opposite of conclusions 1 and 3."""
        ours, images = self.trials.resnet20, SOURCES["cifar10"].test
        full = [ours[name.replace("+BN", "")] for name in FULL]
        apart = all(higher(max(pair), min(pair), images) for pair in itertools.combinations(full, 2))
        return apart and all(higher(error, ours["SGD"], images) for error in full)

    def still_learning(self, sweep: str) -> bool:
        """Whether the best epoch is the last one of every core cell with an error of less than 85%."""
        cells = self.cells[(self.cells["sweep"] == sweep) & (self.cells["best"] < 85)]
        cells = cells[cells["condition"].isin(CORE)]
        return bool((cells["epoch"] == cells["epochs"]).all())

    def angle_ranks(self, least: float) -> bool:
        """Whether angle and error of the runs with BN and BM have at least this rank correlation on each of
        the datasets of images."""
        rows = [row for row in self.angle_correlations() if row["sweep"] != "phoneme"]
        return all(float(str(row["with_both"])) >= least for row in rows)

    def nusf_is_worse_than_its_angle(self, *sweeps: str) -> bool:
        """Whether some run with NuSF has a smaller angle than a run with BN and BM that has at most nine
        tenths of its error."""
        return all(self._beaten_at_a_larger_angle("NuSF", sweep) for sweep in sweeps)

    def _beaten_at_a_larger_angle(self, condition: str, sweep: str) -> bool:
        points = self.points[self.points["sweep"] == sweep]
        both = points[points["condition"].str.contains(r"BN\+BM")]
        return any(
            ((both["angle"] > run.angle) & (both["error"] < 0.9 * run.error)).any()
            for run in points[points["condition"] == condition].itertuples()
        )

    # The paper's four conclusions

    def _conclusion(self, conditions: Iterable[str], holds: Callable[[str], bool]) -> Conclusion:
        known = self.known(*conditions)
        told = [s for s in known if self.tells(s)]
        by_outcome = {outcome: [s for s in told if holds(s) is outcome] for outcome in (True, False)}
        return Conclusion(by_outcome[True], by_outcome[False], [s for s in known if s not in told])

    def magnitudes_do_not_matter(self) -> Conclusion:
        """All signs agree: uniform, redrawn and fixed random magnitudes do alike."""
        return self._conclusion(FULL, lambda s: all(self.alike(s, a, b) for a in FULL for b in FULL))

    def signs_matter(self) -> Conclusion:
        """Half of the signs agree: worse than all, for redrawn and for fixed magnitudes."""
        pairs = list(zip(HALF, FULL[1:], strict=True))
        return self._conclusion(
            [*FULL, *HALF], lambda s: all(self.worse(s, half, full) for half, full in pairs)
        )

    def random_magnitudes_equal_sgd(self) -> Conclusion:
        """All signs agree, random magnitudes: no worse than SGD."""
        return self._conclusion(
            ["SGD", *FULL], lambda s: not any(self.worse(s, full, "SGD") for full in FULL[1:])
        )

    def normalization_is_indispensable(self) -> Conclusion:
        """Without Batch Normalization and Batch Manhattan: uSF, NuSF and random feedback are all worse than
        with both."""
        pairs = (("uSF", "uSF+BN+BM"), ("NuSF", "uSF+BN+BM"), ("RndF", "RndF+BN+BM"))
        return self._conclusion(
            {name for pair in pairs for name in pair},
            lambda s: all(self.worse(s, alone, both) for alone, both in pairs),
        )


def page(evidence: Evidence) -> str:
    """Return the page as Markdown.

    Raises:
        NotBorneOut: one of its sentences claims more than the runs show.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("evidence.md.jinja").render(
        e=evidence,
        sources=SOURCES,
        conditions=CORE,
        slow=SLOW,
        published_means=error_rates().mean(axis=1),
        FULL=FULL,
        HALF=HALF,
        unexplained_above=ABOVE,
        unexplained_below=BELOW,
        more={
            sweep: part["condition"][~part["condition"].isin(CORE)].tolist()
            for sweep, part in evidence.cells.groupby("sweep", sort=False)
        },
        off=off(evidence.cells),
        ranks=rank_correlations(evidence.cells),
        isnan=math.isnan,
    )


def rank_correlations(cells: pd.DataFrame) -> dict[str, float]:
    """Return Spearman's correlation of our best errors with the paper's, by sweep, where it has three."""
    both = cells.dropna(subset=["best", "paper"])
    return {
        sweep: float(part["best"].corr(part["paper"], method="spearman"))
        for sweep, part in both.groupby("sweep", sort=False)
        if len(part) > 2
    }


def off(cells: pd.DataFrame) -> list[dict[str, object]]:
    """Return the cells that differ from the paper by more than the margin of their dataset."""
    margin = cells["sweep"].map({name: source.margin for name, source in SOURCES.items()})
    return cells[cells["difference"].abs() > margin].to_dict("records")


def main(runs: Path = HERE / "runs/evidence", output: Path = HERE / "results/liao2016") -> None:
    """Write the page.

    Args:
        runs: folder of the sweeps.
        output: folder to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    cells = read_cells(runs)
    cells.to_csv(output / "cells.csv", index=False, float_format="%.6g")
    found = collect(runs)
    points = error_and_angle.points(found)
    folders = found.runs.set_index("run")["folder"]
    points.insert(0, "sweep", [Path(folders[run]).parent.name for run in points["run"]])
    points.to_csv(output / "error_and_angle.csv", index=False, float_format="%.6g")
    error_and_angle.write(found, output)
    for name in dict.fromkeys(cells["sweep"]):
        write(sweep_table(runs / name), output / name)
    write(sweep_table(runs.parent / "resnet20"), output / "resnet20")
    evidence = Evidence(cells, points, read_trials(runs.parent))
    (output / "README.md").write_text(page(evidence), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
