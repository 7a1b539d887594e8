"""Write the page that has every rule beside backprop, and its table, from the committed runs.

    python analysis/every_rule.py

Reads analysis/runs/rules and writes analysis/results/rules. The page's numbers and verdicts are computed
here; its sentences are in every_rule.md.jinja. A sweep that is not there, or a run that has not ended, is
left out and said to be missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from evidence import NotBorneOut
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonargparse import auto_cli

from feedbackhook.liao2016.published import error_rates
from feedbackhook.report import error_and_angle
from feedbackhook.report.runs import Runs, describe
from feedbackhook.store import manifest

HERE = Path(__file__).parent
BACKPROP = "BN+BM"
TEMPLATE = "every_rule.md.jinja"


@dataclass(frozen=True)
class Source:
    """One sweep.

    Args:
        title: name of the dataset on the page.
        training: number of its training images, without those held out.
        test: number of its test images.
        epochs: number of epochs.
    """

    title: str
    training: int
    test: int
    epochs: int


SOURCES = {"digits": Source("digits", 1_293, 360, 15), "mnist": Source("MNIST", 9_000, 10_000, 3)}

FAMILIES = {
    "Backprop": (BACKPROP,),
    "The signs of W": (
        "uSF+BN+BM",
        "NuSF+BN+BM",
        "uSF-SN+BN+BM",
        "uSF-init+BN+BM",
        "sign-symmetry+BN+BM",
        "brSF+BN+BM concordance=1",
        "frSF+BN+BM concordance=1",
        "frSF+BN+BM concordance=0.5",
    ),
    "W, changed": (
        "angle+BN+BM degrees=45",
        "angle+BN+BM degrees=75",
        "noise+BN+BM",
        "sparse+BN+BM",
        "quantized+BN+BM",
        "svd+BN+BM",
    ),
    "Random": ("FA+BN+BM", "RndF+BN+BM", "low_rank+BN+BM", "toeplitz+BN+BM"),
    "Direct": ("DFA+BN+BM", "DFA+BN+BM shared=True", "sDFA+BN+BM", "DRTP+BN+BM"),
}
"""The conditions, in the order of the page."""
ORDER = [condition for family in FAMILIES.values() for condition in family]

BIOTORCH = {
    BACKPROP: 0.91,
    "FA+BN+BM": 1.7,
    "DFA+BN+BM": 1.61,
    "uSF+BN+BM": 0.94,
    "brSF+BN+BM concordance=1": 0.91,
    "frSF+BN+BM concordance=1": 0.97,
}
"""Sanfiz and Akrout 2021, test errors of LeNet on MNIST in percent: 60,000 training images, 100 epochs, SGD
with momentum, neither Batch Normalization nor Batch Manhattan."""


def read_cells(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row for each sweep and condition in ``folder``, and one for each run.

    Columns of a cell: `sweep`, `condition`, the test error after the last epoch in percent as the mean over
    seeds (`last`) and its `lowest` and `highest`, the mean of each seed's `best` epoch, `angle` (the mean
    gradient angle in degrees, see :func:`feedbackhook.report.error_and_angle.points`), `weight_angle` (of V
    and W in degrees after the last step, the mean over layers but the first, which sends no error on), and
    the numbers of runs that were `planned`, that `ended`, and of those that `diverged` (in no mean).
    """
    cells, points = [], []
    for sweep in SOURCES:
        if not (folder / sweep).is_dir():
            continue
        plan = manifest.read(folder / sweep)
        found = describe(path for run in plan.runs if (path := folder / sweep / run.name).is_dir())
        runs = found.runs.merge(error_and_angle.points(found)[["run", "angle"]], how="left")
        runs = runs.join(_weight_angles(found), on="run")
        points.append(runs.assign(sweep=sweep))
        planned = pd.Series([run.condition for run in plan.runs]).value_counts()
        for condition in sorted(planned.index, key=ORDER.index):
            of = runs[runs["condition"] == condition]
            angles = of.loc[of["status"] == "finished", ["angle", "weight_angle"]].mean().to_dict()
            counts = error_cell(of, int(planned[condition]))
            cells.append({"sweep": sweep, "condition": condition, **counts, **angles})
    columns = ["sweep", "run", "condition", "seed", "status", "last_error", "best_error", "angle"]
    ordered = ["sweep", "condition", *ERRORS, "angle", "weight_angle", *COUNTS]
    return pd.DataFrame(cells)[ordered], pd.concat(points, ignore_index=True)[[*columns, "weight_angle"]]


ERRORS = ("last", "lowest", "highest", "best")
COUNTS = ("planned", "ended", "diverged")


def error_cell(of: pd.DataFrame, planned: int) -> dict[str, float]:
    """Return the `ERRORS` and `COUNTS` of the runs of one condition: see :func:`read_cells`."""
    errors = of[of["status"] == "finished"]
    return {
        "last": errors["last_error"].mean(),
        "lowest": errors["last_error"].min(),
        "highest": errors["last_error"].max(),
        "best": errors["best_error"].mean(),
        "planned": planned,
        "ended": len(of),
        "diverged": int((of["status"] == "diverged").sum()),
    }


def is_complete(cell: Mapping[str, Any] | None) -> bool:
    """Whether all planned runs of a cell have ended, and none has diverged."""
    return cell is not None and cell["ended"] == cell["planned"] and not cell["diverged"]


def is_worse(one: float, other: float, images: int) -> bool:
    """Whether one error in percent is above another by more than two standard errors of the difference
    between two rates, as independent binomial samples of so many images each."""
    a, b = one / 100, other / 100
    return a - b > 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / images)


def borne_out(text: str, holds: bool, template: str) -> str:
    """Return ``text``, a sentence of the page that ``template`` makes.

    Raises:
        NotBorneOut: ``holds`` is false: the sentence must be changed.
    """
    if not holds:
        raise NotBorneOut(f"the runs do not bear this out: {text!r}; change it in {template}")
    return text


def render(template: str, **values: object) -> str:
    """Return the page that a template of this folder makes of these values."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values, isnan=math.isnan, nan=math.nan)


def _weight_angles(runs: Runs) -> pd.Series:
    """The mean over layers after the last step; missing if a layer has none then."""
    rows = runs.rows(of_layers=["weight_angle"])
    rows = rows[(rows["depth"] > 0) & (rows["step"] == rows.groupby("run")["step"].transform("max"))]
    mean = rows.groupby("run")["value"].agg(lambda values: values.mean(skipna=False))
    return mean.rename("weight_angle")


class Results:
    """What the runs say.

    Args:
        cells: the first table of :func:`read_cells`.
        points: the second.
    """

    def __init__(self, cells: pd.DataFrame, points: pd.DataFrame) -> None:
        self.cells, self.points = cells, points
        self.sweeps = list(dict.fromkeys(cells["sweep"]))
        self._rows = {(row["sweep"], row["condition"]): row for row in cells.to_dict("records")}

    def value(self, sweep: str, condition: str, what: str = "last") -> float:
        """A column of a cell; NaN if no run of it has ended."""
        row = self._rows.get((sweep, condition))
        return math.nan if row is None or not row["ended"] else float(row[what])

    def missing(self, sweep: str) -> int:
        """How many runs of a sweep have not ended."""
        of = self.cells[self.cells["sweep"] == sweep]
        return int((of["planned"] - of["ended"]).sum())

    def known(self, sweep: str, *conditions: str) -> bool:
        """Whether all runs of these conditions have ended, and none has diverged."""
        rows = [self._rows.get((sweep, condition)) for condition in conditions]
        return all(is_complete(row) for row in rows)

    def worse(self, sweep: str, condition: str, than: str = BACKPROP) -> bool:
        """Whether the error after the last epoch is higher by more than two standard errors of the difference
        between two rates, as independent binomial samples of the test images times the seeds."""
        images = SOURCES[sweep].test * min(
            int(self._rows[(sweep, name)]["ended"]) for name in (condition, than)
        )
        return is_worse(self.value(sweep, condition), self.value(sweep, than), images)

    def alike(self, sweep: str, *conditions: str) -> bool:
        """Whether none of these is worse than another."""
        return not any(self.worse(sweep, one, other) for one in conditions for other in conditions)

    def against_backprop(self, sweep: str, worse: bool) -> list[str]:
        """The rules that are worse than backprop, or those that are not, of those whose runs have ended."""
        return [
            condition
            for condition in ORDER[1:]
            if self.known(sweep, condition, BACKPROP) and self.worse(sweep, condition) == worse
        ]

    def spread(self, sweep: str, conditions: Iterable[str], what: str = "angle") -> float:
        """The largest difference between two of these cells."""
        values = [self.value(sweep, condition, what) for condition in conditions]
        return max(values) - min(values)

    def angle_correlation(self, sweep: str) -> tuple[float, int]:
        """Spearman's correlation of gradient angle and last error over the complete cells of a sweep without
        backprop, and their number."""
        of = self.cells[(self.cells["sweep"] == sweep) & (self.cells["condition"] != BACKPROP)]
        of = of[(of["ended"] == of["planned"]) & of["angle"].notna()]
        return float(of["angle"].corr(of["last"], method="spearman")), len(of)

    def beside_biotorch(self, sweep: str) -> list[dict[str, object]]:
        """The conditions that BioTorch has too: our error and theirs, and both minus those of backprop."""
        return [
            {
                "condition": condition,
                "ours": self.value(sweep, condition),
                "theirs": theirs,
                "our_gap": self.value(sweep, condition) - self.value(sweep, BACKPROP),
                "their_gap": theirs - BIOTORCH[BACKPROP],
            }
            for condition, theirs in BIOTORCH.items()
            if self.known(sweep, condition, BACKPROP)
        ]

    def claim(self, text: str, holds: bool) -> str:
        """Return ``text``, a sentence of the page.

        Raises:
            NotBorneOut: ``holds`` is false: the sentence must be changed.
        """
        return borne_out(text, holds, TEMPLATE)


def page(results: Results) -> str:
    """Return the page as Markdown.

    Raises:
        NotBorneOut: one of its sentences claims more than the runs show.
    """
    return render(
        TEMPLATE,
        r=results,
        sources=SOURCES,
        families=FAMILIES,
        biotorch=BIOTORCH,
        paper=error_rates()["MNIST"].to_dict(),
        backprop=BACKPROP,
    )


def main(runs: Path = HERE / "runs/rules", output: Path = HERE / "results/rules") -> None:
    """Write the page.

    Args:
        runs: folder of the sweeps `digits` and `mnist`.
        output: folder to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    cells, points = read_cells(runs)
    cells.to_csv(output / "cells.csv", index=False, float_format="%.6g")
    points.to_csv(output / "runs.csv", index=False, float_format="%.6g")
    (output / "README.md").write_text(page(Results(cells, points)), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
