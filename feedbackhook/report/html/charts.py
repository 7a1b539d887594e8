"""The charts of a sweep's page, as Vega-Lite specifications made with Altair.

Their data are CSV texts with short columns, apart from the specifications, since charts share them and since
500 runs must fit on a page of 5 MB: many epochs are thinned out, and the notes say so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd

from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import rule_name
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.report import theme
from feedbackhook.report.published import published_errors
from feedbackhook.report.tables import SweepTable, base_rate

__all__ = ["Section", "alignment", "concordance", "curves"]

ERRORS = {"test_error": "test error [%]", "train_error": "training error [%]"}
ANGLES = {"weight_angle": "weight angle [°]", "error_angle": "error angle [°]"}
_REDRAWN = {"brSF": "redrawn", "frSF": "fixed"}
_MEASURED = "measured"

# rows of all runs together, epochs of one: 50,000 and 75,000 rows take some 1 and 1.5 MB
_CURVE_ROWS, _CURVE_EPOCHS = 50_000, 100
_ANGLE_ROWS, _ANGLE_EPOCHS = 75_000, 30

_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (2, 2), (8, 2, 2, 2))
_SHADES = (("#000000", 0.0), ("#ffffff", 0.4), ("#000000", 0.35))  # what is mixed in, and how much of it


class Section(NamedTuple):
    """Some charts about one question.

    Args:
        charts: Vega-Lite specifications by name. The first has the selects, which the others follow: their
            parameters have the same names.
        data: the CSV texts that they name.
        notes: sentences: what is not in the charts and why, and why there is none.
    """

    charts: dict[str, dict[str, Any]]
    data: dict[str, str]
    notes: list[str]


def concordance(table: SweepTable) -> Section:
    """Best test error against concordance, brSF beside frSF, and the paper's own curves."""
    if isinstance(table.config.conditions, dict):
        return Section({}, {}, ["No curve over concordances: the conditions are this sweep's own."])
    conditions = {name: Condition.parse(name) for name in table.cells["condition"].unique()}
    conditions = {name: known for name, known in conditions.items() if known.feedback in _REDRAWN}
    values = {name: _concordance(condition) for name, condition in conditions.items()}
    if (count := len(set(values.values()))) < 2:
        known = f"a single one, {next(iter(values.values())):g}" if count else "none, neither brSF nor frSF"
        return Section({}, {}, [f"No curve over concordances: it takes two, and the sweep has {known}."])
    cells = table.cells[table.cells["condition"].isin(list(conditions))]
    if cells["best_error"].isna().all():
        return Section({}, {}, ["No curve over concordances: no run of brSF or frSF has an error."])
    series = {name: _series(condition) for name, condition in conditions.items()}
    columns = ["dataset", "series", "source", "concordance", "error", "low", "high"]
    ours = cells.rename(columns={"best_error": "error", "best_low": "low", "best_high": "high"}).assign(
        series=cells["condition"].map(series), concordance=cells["condition"].map(values), source=_MEASURED
    )[columns]
    theirs = _papers_points(table.config.datasets, set(series.values()))[columns]
    points = pd.concat([part for part in (ours.dropna(subset="error"), theirs) if len(part)])
    notes = [f"Dashed: the curves of {', '.join(theirs['source'].unique())}."] if len(theirs) else []
    notes += [
        f"{cell['condition']} on {cell['dataset']} has no point: none of its runs is in the table."
        for cell in cells[cells["best_error"].isna()].to_dict("records")
    ]
    if without := [name for name in table.config.datasets if name not in set(theirs["dataset"])]:
        notes.append(f"The paper has no curve for {', '.join(without)}.")
    select = _Select("dataset", "Dataset", table.config.datasets)
    chart = _over_concordance(points).add_params(select.parameter())
    specification = _specification(chart, "Best test error against concordance")
    return Section({"concordance": specification}, {"concordance": _csv(points)}, notes)


def curves(table: SweepTable) -> Section:
    """Test and training error against the epoch, filtered by dataset, condition and learning rate."""
    planned = table.planned
    rows, notes = _finite(_rows(table, ERRORS))
    if rows.empty:
        return Section({}, {}, ["No learning curves: no run that has ended has an error."])
    rows, thinned = _thin(rows, _CURVE_ROWS, _CURVE_EPOCHS)
    wide = _wide(rows, ERRORS, planned, "epoch")
    names = list(table.cells["condition"].unique())
    of_condition = {run.condition: _rule(run) for run in planned}
    rules = {name: of_condition[name] for name in names}
    factors = [f"{rate:.15g}" for rate in sorted({run.rate for run in planned}, reverse=True)]
    rates = [f"{base_rate(planned)} × {factor}" for factor in factors]
    selects = [
        _Select("dataset", "Dataset", table.config.datasets),
        _Select("condition", "Condition", ["all", *names]),
        _Select(
            "rate", "Learning rate", ["best", "all", *factors], ["best of each cell", "each of them", *rates]
        ),
    ]
    charts: dict[str, dict[str, Any]] = {}
    for metric, label in ERRORS.items():
        if wide[metric].isna().all():
            notes.append(f"No run has a {label.partition(' [')[0]}.")
            continue
        chart = _over_epochs(metric, label, int(wide["epoch"].max()), rules, legend=not charts)
        chart = chart.add_params(*(select.parameter(bound=not charts) for select in selects))
        charts[metric] = _specification(chart, f"{label} against epoch")
    data = {"runs": _csv(_described(table)), "curves": _csv(wide)}
    return Section(charts, data, [*notes, *thinned])


def alignment(table: SweepTable) -> Section:
    """Weight and error angle of each layer against the epoch, of the run that is chosen. They must be among
    the rows of the table."""
    planned, runs = table.planned, table.runs
    rows, undefined = _finite(_rows(table, ANGLES))
    if rows.empty:
        return Section({}, {}, ["No alignment angles: no run that has ended has one."])
    rows, thinned = _thin(rows, _ANGLE_ROWS, _ANGLE_EPOCHS)
    rows = rows.assign(l=rows.groupby(["depth", "layer"], dropna=False, observed=True).ngroup())
    layers = rows[["l", "depth", "layer"]].drop_duplicates().sort_values("l")
    wide = _wide(rows, ANGLES, planned, "epoch", "l")
    notes = ["A point is the mean over the steps that were measured in an epoch.", *thinned]
    notes += [f"{note} The first layer sends no error on, so it has no error angle." for note in undefined]
    names = set(runs.runs["run"])
    ended = [run for run in planned if run.name in names]
    patched = [run for run in ended if _rule(run) != theme.BACKPROP]
    if backprop := dict.fromkeys(run.condition for run in ended if run not in patched):
        notes.append(f"Without feedback weights, and so without angles: {', '.join(backprop)}.")
    places = [int(place) for place in wide["r"].unique()]
    best = _described(table)["best"].to_list()
    first = next((place for place in places if best[place]), places[0])
    select = _Select("run", "Run", places, [planned[place].name for place in places], first)
    charts: dict[str, dict[str, Any]] = {}
    for metric, label in ANGLES.items():
        having = {planned[place].name for place in wide.loc[wide[metric].notna(), "r"].unique()}
        if without := [run.name for run in patched if run.name not in having]:
            notes.append(f"Without {label.partition(' [')[0]}s: {', '.join(without)}.")
        if having:
            chart = _of_layers(
                metric, label, int(wide["epoch"].max()), list(layers["layer"]), wide[metric].max()
            ).add_params(select.parameter(bound=not charts))
            charts[metric] = _specification(chart, f"{label} of each layer against epoch")
    return Section(charts, {"angles": _csv(wide), "layers": _csv(layers)}, notes)


def _over_concordance(points: pd.DataFrame) -> alt.LayerChart:
    names, sources = list(points["series"].unique()), list(points["source"].unique())
    rules = [str(Condition.parse(name).feedback) for name in names]
    labels = {name: f"{name} ({_REDRAWN[rule]})" for name, rule in zip(names, rules, strict=True)}
    legend = alt.Legend(orient="bottom", columns=1, labelExpr=f"{json.dumps(labels)}[datum.label]")
    shapes = alt.Scale(domain=names, range=["diamond" if rule == "brSF" else "circle" for rule in rules])
    dashes = alt.Scale(domain=sources, range=[[1, 0], [5, 3]][: len(sources)])
    numbers = ("concordance", "error", "low", "high")
    titles = {"error": "error [%]", "low": "95% interval from [%]", "high": "to [%]"}
    base = (
        alt.Chart(_named("concordance", *numbers))
        .transform_filter("datum.dataset == dataset")
        .encode(
            x=alt.X(
                "concordance:Q",
                title="concordance (probability of the same sign)",
                scale=_UNIT,
                axis=_QUARTERS,
            ),
            y=alt.Y("error:Q", title="best test error [%]"),
            color=_colour("series", dict(zip(names, rules, strict=True)), legend),
            tooltip=[
                alt.Tooltip("series:N", title="condition"),
                alt.Tooltip("source:N"),
                alt.Tooltip("concordance:Q"),
                *(alt.Tooltip(f"{name}:Q", title=title, format=".2f") for name, title in titles.items()),
            ],
        )
    )
    told = alt.Legend(orient="bottom") if len(sources) > 1 else None
    lines = base.mark_line().encode(
        strokeDash=alt.StrokeDash("source:N", title=None, scale=dashes, legend=told)
    )
    symbols = base.mark_point(filled=True, size=60, opacity=1).encode(
        shape=alt.Shape("series:N", title=None, scale=shapes, legend=legend)
    )
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(y="low:Q", y2="high:Q")
    if points["low"].isna().all():
        return alt.LayerChart(layer=[lines, symbols])
    return alt.LayerChart(layer=[lines, bars, symbols])


def _over_epochs(metric: str, label: str, last: int, rules: Mapping[str, str], legend: bool) -> alt.Chart:
    names = list(rules)
    chosen = (
        "datum.dataset == dataset && (condition == 'all' || datum.condition == condition) && "
        "(rate == 'all' || (rate == 'best' ? datum.best == 1 : datum.rate == rate))"
    )
    entries = alt.Legend(
        orient="bottom",
        columns=_columns(names),
        values=alt.ExprRef(f"condition == 'all' ? {json.dumps(names)} : [condition]"),
        symbolType="stroke",
        symbolSize=400,
    )
    shown = entries if legend else None
    strokes = [list(dash) or [1, 0] for _, dash in _looks(list(rules.values()))]
    dashes = alt.Scale(domain=names, range=strokes)
    described = ["run", "dataset", "condition", "rate", "seed", "best"]
    chart: alt.Chart = (
        alt.Chart(_named("curves", "r", "epoch", *ERRORS))
        .transform_filter(f"isValid(datum.{metric})")
        .transform_lookup("r", alt.LookupData(_named("runs", "r", "best"), "r", described))
        .transform_filter(chosen)
        .mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=14, opacity=1))
        .encode(
            x=_epoch(last),
            y=alt.Y(f"{metric}:Q", title=label),
            detail="r:N",
            color=_colour("condition", rules, shown),
            strokeDash=alt.StrokeDash("condition:N", title=None, scale=dashes, legend=shown),
            tooltip=["run:N", "epoch:Q", alt.Tooltip(f"{metric}:Q", title=label, format=".2f")],
        )
    )
    return chart


def _of_layers(metric: str, label: str, last: int, names: Sequence[str], most: float) -> alt.LayerChart:
    degrees = alt.Scale(domain=[0, max(100, 10 * math.ceil(most / 10))])  # one for all runs
    colour = alt.Color(
        "layer:O",
        title="layer, input to output",
        sort=alt.EncodingSortField("depth", op="min"),
        scale=alt.Scale(scheme=alt.SchemeParams("viridis", extent=[0.2, 0.85])),
        legend=alt.Legend(orient="bottom", columns=_columns(names)),
    )
    lines = (
        alt.Chart(_named("angles", "r", "epoch", "l", *ANGLES))
        .transform_filter("datum.r == run")
        .transform_lookup("l", alt.LookupData(_named("layers", "l", "depth"), "l", ["layer", "depth"]))
        .mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=20, opacity=1))
        .encode(
            x=_epoch(last),
            y=alt.Y(f"{metric}:Q", title=label, scale=degrees),
            color=colour,
            tooltip=["layer:N", "depth:Q", "epoch:Q", alt.Tooltip(f"{metric}:Q", title=label, format=".1f")],
        )
    )
    unrelated = alt.Chart(alt.sequence(1)).mark_rule(strokeDash=[2, 3], color="#8a8a8a")
    return alt.LayerChart(
        layer=[unrelated.encode(y=alt.datum(90, type="quantitative", title=label, scale=degrees)), lines]
    )


_UNIT, _QUARTERS = alt.Scale(domain=[0, 1]), alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")


def _epoch(last: int) -> alt.X:
    axis = alt.Axis(tickMinStep=1, format="d")
    return alt.X("epoch:Q", title="epoch", axis=axis, scale=alt.Scale(domain=[0, last], nice=False))


def _columns(names: Iterable[str]) -> alt.ExprRef:
    """As many columns of a legend as the page has room for.

    Vega lays out a legend before it knows the width that the axes leave; the container's does not change.
    """
    entry = 7 * max(map(len, names)) + 60  # pixels
    return alt.ExprRef(f"max(1, floor((width ? containerSize()[0] - 60 : 0) / {entry}))")


def _concordance(condition: Condition) -> float:
    return 1.0 if condition.concordance is None else condition.concordance


def _series(condition: Condition) -> str:
    """The conditions that differ in concordance alone have one name here."""
    return replace(condition, concordance=None).name


def _papers_points(datasets: Iterable[str], series: set[str]) -> pd.DataFrame:
    rows = published_errors().dropna(subset="concordance")
    rows = rows[rows["dataset"].isin(list(datasets)) & rows["series"].isin(list(series))]
    return rows.rename(columns={"publication": "source"}).assign(low=np.nan, high=np.nan)


def _described(table: SweepTable) -> pd.DataFrame:
    """What the charts know of each run; `best` is 1 at the rate of its cell in the table."""
    rate = table.cells.set_index(["dataset", "condition"])["rate"].to_dict()
    rows = []
    for place, run in enumerate(table.planned):
        best = int(rate[run.dataset, run.condition] == run.rate)
        rows.append((place, run.name, run.dataset, run.condition, f"{run.rate:.15g}", run.seed, best))
    return pd.DataFrame(rows, columns=["r", "run", "dataset", "condition", "rate", "seed", "best"])


def _rows(table: SweepTable, metrics: Iterable[str]) -> pd.DataFrame:
    return table.rows[table.rows["metric"].isin(list(metrics))]


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    finite = np.isfinite(rows["value"])
    if finite.all():
        return rows, []
    return rows[finite], [f"Values that are no number and have no point: {(~finite).sum()}."]


def _wide(
    rows: pd.DataFrame, metrics: Iterable[str], planned: Sequence[PlannedRun], *keys: str
) -> pd.DataFrame:
    """A column a metric, and `r`: where in the plan the run stands."""
    places = {run.name: place for place, run in enumerate(planned)}
    numbered = rows.assign(r=rows["run"].astype(str).map(places))
    wide = numbered.pivot_table("value", ["r", *keys], "metric", observed=True)
    return wide.reindex(columns=list(metrics)).reset_index()


def _thin(rows: pd.DataFrame, most: int, epochs: int) -> tuple[pd.DataFrame, list[str]]:
    """Rows of at most so many epochs of a run, evenly spaced from its first to its last, and of so few that
    there are at most so many of rows that differ in more than the metric."""
    epoch, layer = rows["epoch"].to_numpy(), rows["layer"].cat.codes.to_numpy() + 1  # 0: the whole network
    span = epoch.max() + 1
    at = rows["run"].cat.codes.to_numpy().astype(np.int64) * span + epoch
    known, place_of = np.unique(at, return_inverse=True)  # the epochs of one run after those of another
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
    notes = [f"Of a run's epochs, of up to {counts.max()}, at most {allowed} are drawn, evenly spaced."]
    return rows[kept[place_of]], notes


def _rule(run: PlannedRun) -> str:
    """The rule of its feedback weights, by which it is coloured."""
    return rule_name(run.mode) or theme.BACKPROP


def _looks(rules: Sequence[str]) -> list[tuple[str, tuple[float, ...]]]:
    """A colour and dashes for each: its rule's; the next ones of the rule differ in dashes, then in shade."""
    of_rule: Counter[str] = Counter()
    looks = []
    for rule in rules:
        look = theme.look(rule)
        dashes = [look.dashes, *(dash for dash in _DASHES if dash != look.dashes)]
        shade, place = divmod(of_rule[rule], len(dashes))
        of_rule[rule] += 1
        looks.append((_mixed(look.colour, *_SHADES[shade % len(_SHADES)]), dashes[place]))
    return looks


def _mixed(colour: str, other: str, share: float) -> str:
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round((1 - share) * a + share * b) for a, b in pairs).hex()


def _colour(field: str, rules: Mapping[str, str], legend: alt.Legend | None) -> alt.Color:
    """The colours of names, each that of its rule."""
    scale = alt.Scale(domain=list(rules), range=[colour for colour, _ in _looks(list(rules.values()))])
    return alt.Color(f"{field}:N", title=None, scale=scale, legend=legend)


class _Select(NamedTuple):
    """A choice; without a default it is the first option."""

    name: str
    label: str
    options: Sequence[Any]
    labels: Sequence[str] | None = None
    default: Any = None

    def parameter(self, bound: bool = True) -> alt.Parameter:
        """With a <select> of its own; one that is not bound follows another chart's."""
        value = self.options[0] if self.default is None else self.default
        if not bound:
            return alt.param(name=self.name, value=value)
        labels = list(self.labels or self.options)
        select = alt.binding_select(options=self.options, labels=labels, name=self.label)
        return alt.param(name=self.name, value=value, bind=select)


def _named(name: str, *numbers: str) -> alt.NamedData:
    parse: Mapping[str, str] = dict.fromkeys(numbers, "number")
    return alt.NamedData(name=name, format=alt.CsvDataFormat(type="csv", parse=parse))


def _csv(table: pd.DataFrame) -> str:
    """With numbers of four digits: errors to a hundredth of a percent, angles to a hundredth of a degree."""
    text: str = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    return text


def _specification(chart: alt.Chart | alt.LayerChart, description: str) -> dict[str, Any]:
    content: dict[str, Any] = chart.properties(
        width="container", height=300, description=description
    ).to_dict()
    return {key: value for key, value in content.items() if key not in ("$schema", "config")}
