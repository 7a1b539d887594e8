"""The charts of a sweep's page: their data as CSV, and what they leave out.

The data have short columns and are kept apart from the specifications, since charts share them and 500 runs
must fit on a page of 5 MB: long runs are thinned out, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from feedbackhook.report import theme
from feedbackhook.report.aggregate import SweepTable, base_lr
from feedbackhook.report.html import vega
from feedbackhook.report.html.vega import ANGLES, ERRORS, Select
from feedbackhook.report.tables import MARKS
from feedbackhook.store.manifest import Manifest, ManifestRun, Published

__all__ = ["Section", "alignment", "concordance", "curves", "heat_map"]

_MEASURED = "measured"

# rows of all runs together, and epochs of one run: 50,000 and 75,000 rows take about 1 and 1.5 MB
_CURVE_ROWS, _CURVE_EPOCHS = 50_000, 100
_ANGLE_ROWS, _ANGLE_EPOCHS = 75_000, 30


class Section(NamedTuple):
    """Charts about one question.

    Args:
        charts: Vega-Lite specifications by name. The first one has the controls, and the others follow it:
            their parameters have the same names.
        data: the CSV texts that they name.
        notes: sentences on what the charts leave out and why, or why there is no chart.
        errors: whether they show errors, whose axis may be logarithmic.
    """

    charts: dict[str, dict[str, Any]]
    data: dict[str, str]
    notes: list[str]
    errors: bool = False


def concordance(table: SweepTable) -> Section:
    """Chart the best test error against concordance, with the published curves."""
    plan = table.manifest
    if all(condition.series is None for condition in plan.conditions.values()):
        return Section({}, {}, ["No curve: this sweep defines its conditions itself."])
    conditions = {name: given for name, given in plan.conditions.items() if given.concordance is not None}
    values = {name: given.concordance for name, given in conditions.items()}
    if (count := len(set(values.values()))) < 2:
        known = f"only {next(iter(values.values())):g}" if count else "none"
        return Section({}, {}, [f"No curve: it needs two concordances, and the sweep has {known}."])
    cells = table.cells[table.cells["condition"].isin(list(conditions))]
    if cells["best_error"].isna().all():
        return Section({}, {}, ["No curve: no run with a concordance has an error."])
    points = _points(cells, plan)
    datasets = list(plan.datasets)
    notes = []
    if plan.published is not None and (drawn := points[points["source"] != _MEASURED]["dataset"].tolist()):
        notes.append(f"Dashed: the curves of {plan.published.label}.")
        if without := [name for name in datasets if name not in drawn]:
            notes.append(f"There is no published curve for {', '.join(without)}.")
    notes += [
        f"{cell['condition']} on {cell['dataset']} has no point: none of its runs is in the table."
        for cell in cells[cells["best_error"].isna()].to_dict("records")
    ]
    rules = {str(given.series): str(given.rule) for given in conditions.values()}
    chart = vega.over_concordance(points, rules).add_params(
        Select("dataset", "Dataset", datasets).parameter()
    )
    specification = vega.specification(chart, "Best test error against concordance", _floor(points["error"]))
    return Section({"concordance": specification}, {"concordance": _csv(points)}, notes, errors=True)


def curves(table: SweepTable) -> Section:
    """Chart test and training error against the epoch, filtered by dataset, condition and learning rate."""
    plan = table.manifest
    rows, notes = _finite(_rows(table, ERRORS))
    if rows.empty:
        return Section({}, {}, ["No learning curves: no run that has ended has an error."])
    rows, thinned = _thin(rows, _CURVE_ROWS, _CURVE_EPOCHS)
    wide = _wide(rows, ERRORS, plan.runs, "epoch")
    names = list(table.cells["condition"].unique())
    rules = {name: plan.conditions[name].rule or theme.BACKPROP for name in names}
    factors = [f"{factor:.15g}" for factor in sorted({run.lr_factor for run in plan.runs}, reverse=True)]
    rates = [f"{base_lr(plan.runs)} × {factor}" for factor in factors]
    selects = [
        Select("dataset", "Dataset", list(plan.datasets)),
        Select("condition", "Condition", ["all", *names]),
        Select("lr_factor", "Learning rate", ["best", "all", *factors], ["best of each cell", "all", *rates]),
    ]
    charts: dict[str, dict[str, Any]] = {}
    for metric, label in ERRORS.items():
        if wide[metric].isna().all():
            notes.append(f"No run has a {label.partition(' [')[0]}.")
            continue
        chart = vega.over_epochs(metric, label, int(wide["epoch"].max()), rules, legend=not charts)
        chart = chart.add_params(*(select.parameter(bound=not charts) for select in selects))
        charts[metric] = vega.specification(chart, f"{label} against epoch", _floor(wide[metric]))
    data = {"runs": _csv(_described(table)), "curves": _csv(wide)}
    return Section(charts, data, [*notes, *thinned], errors=True)


def alignment(table: SweepTable) -> Section:
    """Chart weight and error angle of each layer against the epoch, for one run at a time.

    The rows of the table must hold these angles.
    """
    planned = table.manifest.runs
    rows, undefined = _finite(_rows(table, ANGLES))
    if rows.empty:
        return Section({}, {}, ["No alignment angles: no run that has ended has one."])
    rows, thinned = _thin(rows, _ANGLE_ROWS, _ANGLE_EPOCHS)
    rows = rows.assign(l=rows.groupby(["depth", "layer"], dropna=False, observed=True).ngroup())
    layers = rows[["l", "depth", "layer"]].drop_duplicates().sort_values("l")
    wide = _wide(rows, ANGLES, planned, "epoch", "l")
    notes = ["A point is the mean over the measured steps of an epoch.", *thinned]
    notes += [f"{note} The first layer passes no error on, so it has no error angle." for note in undefined]
    patched, backprop = _by_patch(table)
    if backprop:
        notes.append(f"Without feedback weights, so without angles: {', '.join(backprop)}.")
    places = [int(place) for place in wide["r"].unique()]
    best = _described(table)["best"].to_list()
    first = next((place for place in places if best[place]), places[0])
    select = Select("run", "Run", places, [planned[place].name for place in places], first)
    charts: dict[str, dict[str, Any]] = {}
    for metric, label in ANGLES.items():
        having = {planned[place].name for place in wide.loc[wide[metric].notna(), "r"].unique()}
        if without := [name for name in patched if name not in having]:
            notes.append(f"Without {label.partition(' [')[0]}s: {', '.join(without)}.")
        if having:
            chart = vega.of_layers(
                metric,
                label,
                int(wide["epoch"].max()),
                list(layers["layer"]),
                (wide[metric].min(), wide[metric].max()),
            ).add_params(select.parameter(bound=not charts))
            charts[metric] = vega.specification(chart, f"{label} of each layer against epoch")
    return Section(charts, {"angles": _csv(wide), "layers": _csv(layers)}, notes)


def heat_map(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return the chart of the grid, to be saved as a figure, and its data as CSV.

    Args:
        rows: those of :func:`feedbackhook.report.html.cells.grid`.
    """
    shown = [
        {
            "row": row,
            "condition": of_condition["condition"],
            "column": column,
            "dataset": cell["dataset"],
            "text": f"{cell['best_error']:.2f}{MARKS.get(cell['class_of_best'], '')}",
            "color": cell["color"],
        }
        for row, of_condition in enumerate(rows)
        for column, cell in enumerate(of_condition["cells"])
        if cell["color"] is not None
    ]
    specification = vega.heat_map("Best test error [%] by condition and dataset")
    return specification, _csv(pd.DataFrame(shown))


def _floor(errors: pd.Series) -> float | None:
    """The smallest error on a logarithmic axis: half the smallest that is not 0; None if all are 0."""
    positive = errors[errors > 0]
    return float(f"{positive.min() / 2:.2g}") if len(positive) else None


def _points(cells: pd.DataFrame, plan: Manifest) -> pd.DataFrame:
    """The measured and the published points of error against concordance."""
    columns = ["dataset", "series", "source", "concordance", "error", "low", "high"]
    conditions = [plan.conditions[name] for name in cells["condition"]]
    ours = cells.rename(columns={"best_error": "error", "best_low": "low", "best_high": "high"}).assign(
        series=[condition.series for condition in conditions],
        concordance=[condition.concordance for condition in conditions],
        source=_MEASURED,
    )
    theirs = pd.DataFrame(_published_points(plan.published), columns=columns)
    return pd.concat([part for part in (ours[columns].dropna(subset="error"), theirs) if len(part)])


def _published_points(published: Published | None) -> Iterator[dict[str, Any]]:
    if published is not None:
        for point in published.curves:
            yield {**vars(point), "source": published.label, "low": np.nan, "high": np.nan}


def _by_patch(table: SweepTable) -> tuple[list[str], list[str]]:
    """The runs that have ended and have feedback weights, and the conditions of those that have none."""
    names = set(table.runs.runs["run"])
    ended = [run for run in table.manifest.runs if run.name in names]
    rules = {name: condition.rule for name, condition in table.manifest.conditions.items()}
    patched = [run.name for run in ended if rules[run.condition] is not None]
    return patched, list(dict.fromkeys(run.condition for run in ended if rules[run.condition] is None))


def _described(table: SweepTable) -> pd.DataFrame:
    """What the charts know about each run; `best` is 1 at the learning rate of its cell in the table."""
    factors = table.cells.set_index(["dataset", "condition"])["lr_factor"].to_dict()
    rows = []
    for place, run in enumerate(table.manifest.runs):
        best = int(factors[run.dataset, run.condition] == run.lr_factor)
        rows.append((place, run.name, run.dataset, run.condition, f"{run.lr_factor:.15g}", run.seed, best))
    return pd.DataFrame(rows, columns=["r", "run", "dataset", "condition", "lr_factor", "seed", "best"])


def _rows(table: SweepTable, metrics: Iterable[str]) -> pd.DataFrame:
    return table.rows[table.rows["metric"].isin(list(metrics))]


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    finite = np.isfinite(rows["value"])
    if finite.all():
        return rows, []
    return rows[finite], [f"Values that are not finite and have no point: {(~finite).sum()}."]


def _wide(
    rows: pd.DataFrame, metrics: Iterable[str], planned: Sequence[ManifestRun], *keys: str
) -> pd.DataFrame:
    """A column for each metric, and `r`, the position of the run in the plan."""
    places = {run.name: place for place, run in enumerate(planned)}
    numbered = rows.assign(r=rows["run"].astype(str).map(places))
    wide = numbered.pivot_table("value", ["r", *keys], "metric", observed=True)
    return wide.reindex(columns=list(metrics)).reset_index()


def _thin(rows: pd.DataFrame, most: int, epochs: int) -> tuple[pd.DataFrame, list[str]]:
    """Keep at most ``epochs`` epochs of each run, evenly spaced from its first to its last, and few enough
    that at most ``most`` rows differ in more than the metric."""
    epoch, layer = rows["epoch"].to_numpy(), rows["layer"].cat.codes.to_numpy() + 1  # 0: the whole network
    span = epoch.max() + 1
    at = rows["run"].cat.codes.to_numpy().astype(np.int64) * span + epoch
    known, place_of = np.unique(at, return_inverse=True)  # sorted by run, then by epoch
    drawn = np.zeros((len(known), layer.max() + 1), bool)
    drawn[place_of, layer] = True
    _, first, run, counts = np.unique(
        known // span, return_index=True, return_inverse=True, return_counts=True
    )
    allowed = int(np.clip(most / (len(counts) * drawn.sum() / len(known)), 2, epochs))
    if counts.max() <= allowed:
        return rows, []
    place, step = np.arange(len(known)) - first[run], np.maximum((counts[run] - 1) / (allowed - 1), 1)
    kept = np.round(np.round(place / step) * step) == place
    notes = [f"Runs have up to {counts.max()} epochs, of which at most {allowed} are drawn, evenly spaced."]
    return rows[kept[place_of]], notes


def _csv(table: pd.DataFrame) -> str:
    """The table as CSV, with four digits: errors to 0.01%, angles to 0.01°."""
    text: str = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    return text
