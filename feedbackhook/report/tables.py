"""A sweep's table: condition by dataset, beside the paper's error rates.

The paper is Liao, Leibo and Poggio 2016, "How Important Is Weight Symmetry in Backpropagation?".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.sweep.grid import PlannedRun, plan, stored
from feedbackhook.report import theme
from feedbackhook.report.published import PUBLICATIONS, published, reference_condition
from feedbackhook.report.runs import Runs, describe
from feedbackhook.report.statistics import percent_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE = "SGD"
THRESHOLD = 3.0  # points of error from which the paper colours a cell
BETTER, ALIKE, WORSE = "better", "alike", "worse"
COLOURS = {BETTER: "#bfe0f5", ALIKE: "#f4f4f4", WORSE: "#e8933f"}  # told apart by the colour-blind
MARKS = {BETTER: " ▲", ALIKE: "", WORSE: " ▼"}


@dataclass(frozen=True)
class SweepTable:
    """What a sweep found.

    Args:
        config: the sweep.
        planned: its runs.
        runs: those of them that have ended.
        rows: what they have recorded of their errors, and of their layers what was asked for, as
            :meth:`Runs.rows` gives it with categories.
        cells: a row a condition and dataset, in the order of the sweep; errors in percent. `best_error` is
            the smallest test error over epochs and learning rates, as the paper reports it; `chosen_error`
            the test error at the epoch and the rate whose error on what was held out of the training set is
            smallest. Both are means over seeds, `..._low` and `..._high` the ends of their 95% intervals (see
            :func:`feedbackhook.report.statistics.percent_interval`; missing with one seed). `rate` is the
            factor of the learning rate of the best run of the first seed, `best_epoch` its epoch. `runs` are
            planned, of which `ended` are in the means, `diverged` of these. `paper_error` is the paper's,
            `difference` ours less that.
        missing: the runs that are not in the means, by name, and why.
        rank_correlation: Spearman's, of ours with the paper's over the conditions of each dataset, and the
            number of conditions; of three or more.
    """

    config: SweepConfig
    planned: list[PlannedRun]
    runs: Runs
    rows: pd.DataFrame
    cells: pd.DataFrame
    missing: dict[str, str]
    rank_correlation: dict[str, tuple[float, int]]

    @property
    def reference(self) -> str:
        """The condition that the others are set beside: SGD; of conditions of one's own the first."""
        return _reference(self.config)


def sweep_table(folder: str | os.PathLike[str], of_layers: Iterable[str] = ()) -> SweepTable:
    """The table of the sweep in ``folder``, from its runs' tables.

    ``of_layers`` are the metrics of single layers that its `rows` shall hold as well. A run that has not
    ended, or failed, is in no mean: it is named in `missing`, and its cell says how many of its runs are in
    it.

    Raises:
        ConfigError: the folder holds no sweep, or a damaged one.
    """
    config = stored(folder)
    planned = plan(config)
    found = describe(run.folder.path for run in planned if run.folder.path.is_dir())
    rows = found.rows(["test_error", "val_error", "train_error"], of_layers, categories=True)
    errors = run_errors(rows[rows["layer"].isna()])
    status = dict(found.runs[["run", "status"]].to_numpy())
    missing = {
        run.name: found.skipped.get(run.name, "it has no test error" if run.name in status else "not begun")
        for run in planned
        if run.name not in errors.index
    }
    names = {run.name for run in planned}
    left_over = [path.parent.name for path in sorted(Path(folder).glob("*/status.json"))]
    missing |= {name: "sweep.yaml does not plan it" for name in left_over if name not in names}
    place = [(r.name, r.dataset, r.condition, r.rate, r.seed) for r in planned]
    table = pd.DataFrame(place, columns=["run", "dataset", "condition", "rate", "seed"]).join(
        errors, on="run"
    )
    table["status"] = table["run"].map(status).where(table["run"].isin(errors.index), "missing")
    cells = _compared(pd.DataFrame(_cells(table)), _reference(config))
    return SweepTable(config, planned, found, rows, cells, missing, dict(_rank_correlations(cells)))


def as_markdown(table: SweepTable) -> str:
    """The table in Markdown: condition by dataset, then each dataset with intervals and differences."""
    cells, held_out = table.cells, table.config.data.val_fraction
    several = table.config.protocol.seeds > 1
    title = Path(table.config.output).resolve().name
    lines = [f"# {title}: test error [%]", "", " ".join(_legend(table, several)), ""]
    datasets = list(cells["dataset"].unique())
    if len(datasets) > 1:
        lines += ["## Best, and the paper's in brackets", "", *_overview(cells, datasets), ""]
        lines += _notes(datasets)
    for dataset in datasets:
        part = cells[cells["dataset"] == dataset]
        lines += [f"## {dataset}", "", *_dataset_lines(part, several, bool(held_out)), ""]
        lines += _notes([dataset])
        if dataset in table.rank_correlation:
            value, count = table.rank_correlation[dataset]
            lines += [f"Spearman's rank correlation with the paper's, {count} conditions: {value:.2f}.", ""]
    if table.missing:
        lines += ["## Runs that are in no figure here", ""]
        lines += [f"- {name}: {reason}" for name, reason in table.missing.items()]
        lines += [""]
    return "\n".join(lines)


def base_rate(runs: Sequence[PlannedRun]) -> str:
    """What the factors of the learning rate multiply, in words."""
    bases = dict.fromkeys(f"{run.config.optimizer.lr / run.rate:.6g}" for run in runs)
    return next(iter(bases)) if len(bases) == 1 else "that of each condition"


def _legend(table: SweepTable, several: bool) -> Iterator[str]:
    """How the figures came about, in sentences."""
    config, p, runs = table.config, table.config.protocol, table.planned
    rates = ", ".join(f"{rate:.15g}" for rate in sorted({run.rate for run in runs}, reverse=True))
    later = "".join(f", of {size} after epoch {epoch}" for epoch, size in sorted(p.batch_sizes.items()))
    yield f"{p.epochs} epochs, mini-batches of {p.batch_size}{later},"
    yield f"learning rates: {base_rate(runs)} times {rates}."
    for condition, procedure in dict.fromkeys((r.condition, r.procedure.name) for r in runs):
        if procedure:
            sizes = next(r.procedure.batch_sizes for r in runs if r.procedure.name == procedure)
            words = " and ".join(f"{size} after epoch {epoch}" for epoch, size in sorted(sizes.items()))
            yield f"{condition} also with mini-batches of {words}, of which the better counts."
    yield "Best: the smallest test error over epochs and rates, as the paper reports it."
    if config.data.val_fraction:
        yield "Chosen: that at the rate and epoch that are best on the held-out"
        yield f"{config.data.val_fraction:.0%} of the training set."
    if several:
        yield f"Means over {p.seeds} seeds, with 95% intervals; rate and epoch are those of the first."
    better, worse = MARKS[BETTER].strip(), MARKS[WORSE].strip()
    yield f"{better} {THRESHOLD:g} points or more better than {table.reference}, {worse} worse."
    if (table.cells["ended"] < table.cells["runs"]).any():
        yield "* not all of its runs are in it."
    if table.cells["paper_error"].notna().any():
        yield f"Paper: {', '.join(each.citation for each in PUBLICATIONS.values())}."


def draw(table: SweepTable) -> Figure:
    """Ours beside the paper's: a row a condition, a column a dataset, coloured at three points from the
    reference."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = table.cells
    datasets, conditions = list(cells["dataset"].unique()), list(cells["condition"].unique())
    panels = [("best_error", "class_of_best", "measured")]
    if cells["paper_error"].notna().any():
        panels.append(("paper_error", "class_of_paper", ", ".join(PUBLICATIONS)))
    width = 2.8 + len(panels) * max(1.6, 0.4 + 0.95 * len(datasets))
    size = (max(5.0, width), 1.7 + 0.3 * len(conditions))
    words = {
        BETTER: f"▲ {THRESHOLD:g} points or more better than {table.reference}",
        ALIKE: f"within {THRESHOLD:g} points of {table.reference}",
        WORSE: f"▼ {THRESHOLD:g} points or more worse",
    }
    with theme.style():
        figure = Figure(figsize=theme.figsize(*size), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _grid(axes, cells, *panel)
        row[0].set_yticks(range(len(conditions)), conditions)
        handles = [
            Patch(facecolor=COLOURS[kind], edgecolor="0.6", label=text) for kind, text in words.items()
        ]
        if (cells["ended"] < cells["runs"]).any():
            handles.append(Patch(facecolor="none", label="* not all of its runs are in it"))
        figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False)
        figure.suptitle("Best test error [%] over epochs and learning rates", fontsize="large")
    return figure


def write(table: SweepTable, folder: str | os.PathLike[str]) -> list[Path]:
    """table.md, table.csv and table.png in ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{suffix}" for suffix in ("md", "csv", "png")]
    paths[0].write_text(as_markdown(table))
    table.cells.to_csv(paths[1], index=False, float_format="%.4f")
    draw(table).savefig(paths[2], dpi=150)
    return paths


def run_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run its smallest test error after training began, and that at the epoch that is best on what
    was held out. A run that diverged before its first epoch ended has the untrained network's."""
    by_epoch = rows.pivot_table("value", ["run", "epoch"], "metric", observed=True).reindex(
        columns=["test_error", "val_error"]
    )
    by_epoch = by_epoch[np.isfinite(by_epoch["test_error"])].reset_index("epoch")
    by_epoch.index = by_epoch.index.astype(object)
    began = (by_epoch["epoch"] > 0).groupby("run").transform("any")
    trained = by_epoch[(by_epoch["epoch"] > 0) | ~began].reset_index()
    best = trained.loc[trained.groupby("run")["test_error"].idxmin()].set_index("run")
    held_out = trained.dropna(subset="val_error")
    chosen = held_out.loc[held_out.groupby("run")["val_error"].idxmin()].set_index("run")
    return pd.DataFrame(
        {
            "best_error": best["test_error"],
            "best_epoch": best["epoch"],
            "val_error": chosen["val_error"],
            "chosen_error": chosen["test_error"],
        },
        index=best.index,
    )


def _cells(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for (dataset, condition), part in runs.groupby(["dataset", "condition"], sort=False):
        ended = part[part["status"] != "missing"]
        by_seed = ended.groupby("seed")
        best = ended.loc[by_seed["best_error"].idxmin()]
        held_out = ended.dropna(subset=["val_error"])
        chosen = held_out.loc[held_out.groupby("seed")["val_error"].idxmin()]
        yield {
            "dataset": dataset,
            "condition": condition,
            **_interval("best", best["best_error"]),
            **_interval("chosen", chosen["chosen_error"]),
            "seeds": len(best),
            "rate": best["rate"].iloc[0] if len(best) else np.nan,
            "best_epoch": best["best_epoch"].iloc[0] if len(best) else np.nan,
            "runs": len(part),
            "ended": len(ended),
            "diverged": int((part["status"] == "diverged").sum()),
            "paper_error": _paper_error(dataset, condition),
        }


def _paper_error(dataset: str, condition: str | None) -> float:
    error = None if condition is None else published(dataset, condition)
    return np.nan if error is None else error


def _interval(name: str, values: pd.Series) -> dict[str, float]:
    mean, low, high = percent_interval(values)
    return {f"{name}_error": mean, f"{name}_low": low, f"{name}_high": high}


def _reference(config: SweepConfig) -> str:
    return next(iter(config.conditions)) if isinstance(config.conditions, dict) else REFERENCE


def _compared(cells: pd.DataFrame, name: str) -> pd.DataFrame:
    """With the difference from the paper's, and the class of ours beside the reference's of this ``name``,
    and of the paper's beside SGD's."""
    cells = cells.assign(difference=cells["best_error"] - cells["paper_error"])
    reference = cells[cells["condition"] == name].set_index("dataset")["best_error"]
    paper = {data: _paper_error(data, reference_condition(data)) for data in cells["dataset"].unique()}
    return cells.assign(
        class_of_best=_classes(cells["best_error"] - cells["dataset"].map(reference)),
        class_of_paper=_classes(cells["paper_error"] - cells["dataset"].map(paper)),
    )


def _classes(difference: pd.Series) -> pd.Series:
    rounded = difference.astype(float).round(6)  # 3 points are 3 points, whatever their last bit
    classes = np.select([rounded <= -THRESHOLD, rounded >= THRESHOLD], [BETTER, WORSE], ALIKE)
    return pd.Series(classes, difference.index).where(rounded.notna())


def _rank_correlations(cells: pd.DataFrame) -> Iterator[tuple[str, tuple[float, int]]]:
    for dataset, part in cells.groupby("dataset", sort=False):
        both = part[["best_error", "paper_error"]].dropna()
        if len(both) >= 3 and both.nunique().min() > 1:  # else nothing is ranked
            yield dataset, (both["best_error"].corr(both["paper_error"], method="spearman"), len(both))


def _notes(datasets: list[str]) -> Iterator[str]:
    """A line for each dataset of which something is ours, or is not known to be as in the paper."""
    for dataset in datasets:
        if dataset in DATASETS and DATASETS[dataset].note:
            yield from (f"{dataset}: {DATASETS[dataset].note}", "")


def _overview(cells: pd.DataFrame, datasets: list[str]) -> Iterator[str]:
    yield from _row("condition", *datasets)
    yield _rule(1 + len(datasets))
    by_place = cells.set_index(["condition", "dataset"])
    for condition in cells["condition"].unique():
        row = [by_place.loc[(condition, dataset)] for dataset in datasets]
        yield from _row(condition, *(f"{_marked(cell)} ({_number(cell['paper_error'])})" for cell in row))


def _dataset_lines(cells: pd.DataFrame, several: bool, held_out: bool) -> Iterator[str]:
    headings = ["condition", "best"]
    headings += ["95% interval"] if several else []
    headings += ["chosen"] if held_out else []
    headings += ["95% interval"] if several and held_out else []
    of_paper = cells["paper_error"].notna().any()
    headings += ["paper", "best - paper"] if of_paper else []
    headings += ["at rate", "epoch", "runs"]
    yield from _row(*headings)
    yield _rule(len(headings))
    for cell in cells.to_dict("records"):
        row = [cell["condition"], _marked(cell)]
        row += [_span(cell, "best")] if several else []
        row += [_number(cell["chosen_error"])] if held_out else []
        row += [_span(cell, "chosen")] if several and held_out else []
        row += [_number(cell["paper_error"]), _number(cell["difference"], "+.2f")] if of_paper else []
        row += [_number(cell["rate"], "g"), _number(cell["best_epoch"], ".0f"), _runs(cell)]
        yield from _row(*row)


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" + "|--:" * (columns - 1) + "|"


def _number(value: float, how: str = ".2f") -> str:
    return "-" if pd.isna(value) else format(value, how)


def _marked(cell: Any) -> str:
    mark = MARKS.get(cell["class_of_best"], "")
    return _number(cell["best_error"]) + mark + ("" if cell["ended"] == cell["runs"] else " *")


def _span(cell: Any, name: str) -> str:
    low, high = cell[f"{name}_low"], cell[f"{name}_high"]
    return "-" if pd.isna(low) else f"{low:.2f} to {high:.2f}"


def _runs(cell: Any) -> str:
    words = str(cell["runs"]) if cell["ended"] == cell["runs"] else f"{cell['ended']} of {cell['runs']} *"
    return words if not cell["diverged"] else f"{words}, {cell['diverged']} diverged"


def _grid(axes: Axes, cells: pd.DataFrame, error: str, kind: str, title: str) -> None:
    datasets, conditions = list(cells["dataset"].unique()), list(cells["condition"].unique())
    axes.set(xlim=(-0.5, len(datasets) - 0.5), ylim=(len(conditions) - 0.5, -0.5))
    axes.set_title(title, fontsize="medium")
    axes.set_axisbelow(False)
    for cell in cells.to_dict("records"):
        x, y = datasets.index(cell["dataset"]), conditions.index(cell["condition"])
        colour = COLOURS.get(cell[kind], "white")
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=colour)
        text = _marked(cell) if error == "best_error" else _number(cell[error]) + MARKS.get(cell[kind], "")
        axes.text(x, y, text, ha="center", va="center", fontsize="small", color="#222222")
    axes.set_xticks(range(len(datasets)), datasets, rotation=0 if len(datasets) < 3 else 45, ha="center")
    axes.set_xticks([x + 0.5 for x in range(len(datasets) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(conditions) - 1)], minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color=axes.get_facecolor(), linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
