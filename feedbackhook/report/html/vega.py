"""Vega-Lite specifications of the charts on a sweep's page, made with Altair.

The charts name their data, which the page holds apart from them as CSV, and share parameters by name: the
first chart of a section has the controls, and the others follow it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from feedbackhook.report import theme
from feedbackhook.report.rules import drawing

__all__ = [
    "ANGLES",
    "ERRORS",
    "Select",
    "heat_map",
    "looks",
    "of_layers",
    "over_concordance",
    "over_epochs",
    "specification",
]

ERRORS = {"test_error": "test error [%]", "train_error": "training error [%]"}
ANGLES = {"weight_angle": "weight angle [°]", "error_angle": "error angle [°]"}

_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (2, 2), (8, 2, 2, 2))
_SHADES = (("#000000", 0.0), ("#ffffff", 0.4), ("#000000", 0.35))  # a color to mix in, and its share
_FOLLOWING = alt.Scale(zero=False)  # an axis that follows the data that are shown
_UNIT, _QUARTERS = alt.Scale(domain=[0, 1]), alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")


class Select(NamedTuple):
    """A choice among options; the default is the first one."""

    name: str
    label: str
    options: Sequence[Any]
    labels: Sequence[str] | None = None
    default: Any = None

    def parameter(self, bound: bool = True) -> alt.Parameter:
        """Return the Vega parameter: with its own <select> if ``bound``, else following another chart's."""
        value = self.options[0] if self.default is None else self.default
        if not bound:
            return alt.param(name=self.name, value=value)
        labels = list(self.labels or self.options)
        select = alt.binding_select(options=self.options, labels=labels, name=self.label)
        return alt.param(name=self.name, value=value, bind=select)


def specification(
    chart: alt.Chart | alt.LayerChart, description: str, floor: float | None = None
) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart as wide as its place on the page.

    Args:
        chart: the chart.
        description: what it shows, for those who cannot see it.
        floor: the smallest error that a logarithmic axis shows, if the chart shows errors.
    """
    content = _content(chart.properties(width="container", height=300, description=description))
    return content if floor is None else content | {"usermeta": {"floor": floor}}


def heat_map(title: str) -> dict[str, Any]:
    """Return the Vega-Lite specification of the grid of conditions and datasets, from the data `cells`."""
    place: dict[str, Any] = {"title": None, "axis": alt.Axis(labelLimit=400, domain=False, ticks=False)}
    base = alt.Chart(_named("cells", "row", "column")).encode(
        x=alt.X("dataset:N", sort=alt.EncodingSortField("column", op="min"), **place).axis(
            orient="top", labelAngle=0
        ),
        y=alt.Y("condition:N", sort=alt.EncodingSortField("row", op="min"), **place),
    )
    cells = base.mark_rect().encode(color=alt.Color("color:N", scale=None))
    texts = base.mark_text(color="#1b1b1b").encode(text="text:N")
    chart = alt.LayerChart(layer=[cells, texts]).properties(
        title=title, width=alt.Step(130), height=alt.Step(24)
    )
    return _content(chart)


def _content(chart: alt.Chart | alt.LayerChart) -> dict[str, Any]:
    content: dict[str, Any] = chart.to_dict()
    return {key: value for key, value in content.items() if key not in ("$schema", "config")}


def over_concordance(points: pd.DataFrame, rules: Mapping[str, str]) -> alt.LayerChart:
    """Error against concordance.

    Args:
        points: a row for each point, as :func:`feedbackhook.report.html.charts.concordance` makes them.
        rules: the rule of each series.
    """
    names, sources = list(points["series"].unique()), list(points["source"].unique())
    drawings = {name: drawing(rules[name]) for name in names}
    labels = {name: f"{name} ({how})" for name, how in drawings.items()}
    legend = alt.Legend(orient="bottom", columns=1, labelExpr=f"{json.dumps(labels)}[datum.label]")
    shapes = alt.Scale(
        domain=names, range=["diamond" if how == "redrawn" else "circle" for how in drawings.values()]
    )
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
            y=alt.Y("error:Q", title="best test error [%]", scale=_FOLLOWING),
            color=_color("series", {name: rules[name] for name in names}, legend),
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


def over_epochs(metric: str, label: str, last: int, rules: Mapping[str, str], legend: bool) -> alt.Chart:
    """An error of runs against the epoch; ``rules``: the rule of each condition."""
    names = list(rules)
    chosen = (
        "datum.dataset == dataset && (condition == 'all' || datum.condition == condition) && "
        "(lr_factor == 'all' || (lr_factor == 'best' ? datum.best == 1 : datum.lr_factor == lr_factor))"
    )
    entries = alt.Legend(
        orient="bottom",
        columns=_columns(names),
        values=alt.ExprRef(f"condition == 'all' ? {json.dumps(names)} : [condition]"),
        symbolType="stroke",
        symbolSize=400,
    )
    shown = entries if legend else None
    strokes = [list(dash) or [1, 0] for _, dash in looks(list(rules.values()))]
    dashes = alt.Scale(domain=names, range=strokes)
    described = ["run", "dataset", "condition", "lr_factor", "seed", "best"]
    chart: alt.Chart = (
        alt.Chart(_named("curves", "r", "epoch", *ERRORS))
        .transform_filter(f"isValid(datum.{metric})")
        .transform_lookup("r", alt.LookupData(_named("runs", "r", "best"), "r", described))
        .transform_filter(chosen)
        .mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=14, opacity=1))
        .encode(
            x=_epoch(last),
            y=alt.Y(f"{metric}:Q", title=label, scale=_FOLLOWING),
            detail="r:N",
            color=_color("condition", rules, shown),
            strokeDash=alt.StrokeDash("condition:N", title=None, scale=dashes, legend=shown),
            tooltip=["run:N", "epoch:Q", alt.Tooltip(f"{metric}:Q", title=label, format=".2f")],
        )
    )
    return chart


def of_layers(
    metric: str, label: str, last: int, names: Sequence[str], limits: tuple[float, float]
) -> alt.LayerChart:
    """An angle of the layers of one run against the epoch.

    Args:
        metric: the angle.
        label: of the vertical axis, which is the same for all runs and shows 90 degrees.
        last: the last epoch.
        names: of the layers.
        limits: the smallest and the largest angle of all runs.
    """
    low, high = min(limits[0], 90), max(limits[1], 90)
    degrees = alt.Scale(domain=[10 * math.floor(low / 10), 10 * math.ceil((high + 1) / 10)])
    color = alt.Color(
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
            color=color,
            tooltip=["layer:N", "depth:Q", "epoch:Q", alt.Tooltip(f"{metric}:Q", title=label, format=".1f")],
        )
    )
    unrelated = alt.Chart(alt.sequence(1)).mark_rule(strokeDash=[2, 3], color="#8a8a8a")
    return alt.LayerChart(
        layer=[unrelated.encode(y=alt.datum(90, type="quantitative", title=label, scale=degrees)), lines]
    )


def _epoch(last: int) -> alt.X:
    axis = alt.Axis(tickMinStep=1, tickCount=max(1, min(last, 10)), format="d")
    return alt.X("epoch:Q", title="epoch", axis=axis, scale=alt.Scale(domain=[0, last], nice=False))


def _columns(names: Iterable[str]) -> alt.ExprRef:
    """As many columns for a legend as the page has room for.

    Vega lays out a legend before it knows the width left by the axes, so this uses the container's width.
    """
    entry = 7 * max(map(len, names)) + 60  # pixels
    return alt.ExprRef(f"max(1, floor((width ? containerSize()[0] - 60 : 0) / {entry}))")


def looks(rules: Sequence[str]) -> list[tuple[str, tuple[float, ...]]]:
    """Return a color and dashes for each rule; the same rule again gets other dashes, then other shades."""
    of_rule: Counter[str] = Counter()
    looks = []
    for rule in rules:
        look = theme.look(rule)
        dashes = [look.dashes, *(dash for dash in _DASHES if dash != look.dashes)]
        shade, place = divmod(of_rule[rule], len(dashes))
        of_rule[rule] += 1
        looks.append((theme.mixed(look.color, *_SHADES[shade % len(_SHADES)]), dashes[place]))
    return looks


def _color(field: str, rules: Mapping[str, str], legend: alt.Legend | None) -> alt.Color:
    """Color each name as its rule."""
    scale = alt.Scale(domain=list(rules), range=[color for color, _ in looks(list(rules.values()))])
    return alt.Color(f"{field}:N", title=None, scale=scale, legend=legend)


def _named(name: str, *numbers: str) -> alt.NamedData:
    parse: Mapping[str, str] = dict.fromkeys(numbers, "number")
    return alt.NamedData(name=name, format=alt.CsvDataFormat(type="csv", parse=parse))
