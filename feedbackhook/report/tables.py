"""The table of a sweep, condition by dataset, as Markdown, CSV and picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from feedbackhook.report import theme
from feedbackhook.report.aggregate import ALIKE, BETTER, THRESHOLD, WORSE, SweepTable, base_lr
from feedbackhook.store.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {BETTER: "#bfe0f5", ALIKE: "#f4f4f4", WORSE: "#e8933f"}  # distinguishable for color-blind readers
NOT_BETTER = " ○"
MARKS = {BETTER: " ▲", ALIKE: "", WORSE: " ▼"}


def as_markdown(table: SweepTable) -> str:
    """Return the table as Markdown: conditions by datasets, then each dataset with intervals."""
    cells, several = table.cells, table.manifest.seeds > 1
    name = table.folder.resolve().name
    lines = [f"# {name}: test error [%]", "", " ".join(_legend(table, several)), ""]
    datasets = list(cells["dataset"].unique())
    if len(datasets) > 1:
        lines += ["## Best error, with the paper's in parentheses", "", *_overview(cells, datasets), ""]
        lines += _notes(table, datasets)
    for dataset in datasets:
        part = cells[cells["dataset"] == dataset]
        lines += [f"## {dataset}", "", *_dataset_lines(part, several, table.manifest.val_fraction > 0), ""]
        lines += _notes(table, [dataset])
        if dataset in table.rank_correlation:
            value, count = table.rank_correlation[dataset]
            lines += [f"Spearman's rank correlation with the paper over {count} conditions: {value:.2f}.", ""]
    if table.missing:
        lines += ["## Runs that are not in this table", ""]
        lines += [f"- {name}: {reason}" for name, reason in table.missing.items()]
        lines += [""]
    return "\n".join(lines)


def batch_sizes_text(batch_size: int, batch_sizes: Mapping[int, int]) -> str:
    """Return batch sizes in words, such as "100, 500 after epoch 3"."""
    later = (f"{size} after epoch {epoch}" for epoch, size in sorted(batch_sizes.items()))
    return ", ".join([str(batch_size), *later])


def pruning_text(epochs: Sequence[int]) -> str:
    """Return in words after which epochs learning rates were pruned."""
    after = f"epoch{'s' if len(epochs) > 1 else ''} {' and '.join(map(str, epochs))}"
    return (
        f"After {after}, the half of the learning rates with the larger validation error was pruned; the "
        "pruned runs are in no mean."
    )


def not_better_text(table: SweepTable) -> str:
    """Return in words what the mark of a condition that is not better than the controls means."""
    names = table.cells.loc[table.cells["control"], "condition"].unique()
    return f"not better than {' or '.join(names)}, in which no error signal passes below the classifier"


def procedures(plan: Manifest) -> dict[str, str]:
    """Return the batch sizes of each second training procedure, in words, by condition."""
    return {
        run.condition: batch_sizes_text(run.batch_size, run.batch_sizes)
        for run in plan.runs
        if run.procedure is not None
    }


def _legend(table: SweepTable, several: bool) -> Iterator[str]:
    """Explain the numbers, in sentences."""
    plan = table.manifest
    factors = ", ".join(f"{f:.15g}" for f in sorted({run.lr_factor for run in plan.runs}, reverse=True))
    yield f"{plan.epochs} epochs, batch size {batch_sizes_text(plan.batch_size, plan.batch_sizes)},"
    yield f"learning rate: {base_lr(plan.runs)} times {factors}."
    for condition, sizes in procedures(plan).items():
        yield f"{condition} also with batch size {sizes}; the better of the two counts."
    yield "Best: the smallest test error over epochs and learning rates."
    if plan.val_fraction:
        yield "Chosen: the test error at the epoch and learning rate with the smallest error on the"
        yield f"{plan.val_fraction:.0%} of the training set that is held out."
    if several:
        yield f"Means over {plan.seeds} seeds, with 95% intervals;"
        yield "learning rate and epoch are those of the first seed."
    better, worse = MARKS[BETTER].strip(), MARKS[WORSE].strip()
    yield f"{better} {THRESHOLD:g} points or more better than {table.reference}, {worse} worse."
    if table.cells["control"].any():
        yield f"{NOT_BETTER.strip()} {not_better_text(table)}."
    if plan.lr_pruning:
        yield pruning_text(plan.lr_pruning)
    if table.cells["missing"].any():
        yield "* some runs are missing."
    if plan.published is not None and table.cells["paper_error"].notna().any():
        yield f"Paper: {plan.published.citation}."


def draw(table: SweepTable) -> Figure:
    """Draw our errors beside the published ones: a row for each condition, a column for each dataset.

    A color tells whether an error is three points or more from the reference.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells, published = table.cells, table.manifest.published
    datasets, conditions = list(cells["dataset"].unique()), list(cells["condition"].unique())
    panels = [("best_error", "class_of_best", "measured")]
    if published is not None and cells["paper_error"].notna().any():
        panels.append(("paper_error", "class_of_paper", published.label))
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
            _panel(axes, cells, *panel)
        handles = [Patch(facecolor=COLORS[kind], edgecolor="0.6", label=text) for kind, text in words.items()]
        if cells["control"].any():
            handles.append(Patch(facecolor="none", label=f"{NOT_BETTER.strip()} not better than a control"))
        if cells["missing"].any():
            handles.append(Patch(facecolor="none", label="* some runs are missing"))
        figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False)
        figure.suptitle("Best test error [%] over epochs and learning rates", fontsize="large")
    return figure


def _panel(axes: Axes, cells: pd.DataFrame, error: str, kind: str, title: str) -> None:
    """Draw one grid of errors, colored by class."""
    import seaborn as sns
    from matplotlib.colors import ListedColormap

    text = [
        _marked(cell) if error == "best_error" else _number(cell[error]) + MARKS.get(cell[kind], "")
        for cell in cells.to_dict("records")
    ]
    code = cells[kind].map({each: number for number, each in enumerate(COLORS)}).fillna(len(COLORS))
    place = {"index": "condition", "columns": "dataset"}
    conditions, datasets = cells["condition"].unique(), cells["dataset"].unique()
    codes, texts = (
        cells.assign(value=values).pivot(**place, values="value").loc[conditions, datasets]
        for values in (code, text)
    )
    sns.heatmap(
        codes,
        annot=texts,
        fmt="",
        annot_kws={"color": "#222222", "fontsize": "small"},
        cmap=ListedColormap([*COLORS.values(), "white"]),
        vmin=-0.5,
        vmax=len(COLORS) + 0.5,
        cbar=False,
        linewidths=1.5,
        linecolor=axes.get_facecolor(),
        ax=axes,
    )
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="", ylabel="")
    axes.tick_params(axis="x", rotation=0 if len(datasets) < 3 else 45)
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(which="both", length=0)


def write(table: SweepTable, folder: str | os.PathLike[str]) -> list[Path]:
    """Write table.md, table.csv and table.png into ``folder``, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{suffix}" for suffix in ("md", "csv", "png")]
    paths[0].write_text(as_markdown(table))
    table.cells.to_csv(paths[1], index=False, float_format="%.4f")
    draw(table).savefig(paths[2], dpi=150)
    return paths


def _notes(table: SweepTable, datasets: list[str]) -> Iterator[str]:
    """Yield a line for each dataset that has a note."""
    for dataset in datasets:
        if note := table.manifest.datasets.get(dataset):
            yield from (f"{dataset}: {note}", "")


def _overview(cells: pd.DataFrame, datasets: list[str]) -> Iterator[str]:
    yield from _row("condition", *datasets)
    yield _rule(1 + len(datasets))
    by_place = cells.set_index(["condition", "dataset"])
    for condition in cells["condition"].unique():
        row = [by_place.loc[(condition, dataset)] for dataset in datasets]
        yield from _row(condition, *(f"{_marked(cell)} ({_number(cell['paper_error'])})" for cell in row))


def _dataset_lines(cells: pd.DataFrame, several: bool, validated: bool) -> Iterator[str]:
    headings = ["condition", "best"]
    headings += ["95% interval"] if several else []
    headings += ["chosen"] if validated else []
    headings += ["95% interval"] if several and validated else []
    of_paper = cells["paper_error"].notna().any()
    headings += ["paper", "best - paper"] if of_paper else []
    headings += ["LR factor", "epoch", "runs"]
    yield from _row(*headings)
    yield _rule(len(headings))
    for cell in cells.to_dict("records"):
        row = [cell["condition"], _marked(cell)]
        row += [_span(cell, "best")] if several else []
        row += [_number(cell["chosen_error"])] if validated else []
        row += [_span(cell, "chosen")] if several and validated else []
        row += [_number(cell["paper_error"]), _number(cell["difference"], "+.2f")] if of_paper else []
        row += [_number(cell["lr_factor"], "g"), _number(cell["best_epoch"], ".0f"), _runs(cell)]
        yield from _row(*row)


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" + "|--:" * (columns - 1) + "|"


def _number(value: float, how: str = ".2f") -> str:
    return "-" if pd.isna(value) else format(value, how)


def _marked(cell: Any) -> str:
    mark = MARKS.get(cell["class_of_best"], "") + (NOT_BETTER if cell["not_better"] else "")
    return _number(cell["best_error"]) + mark + (" *" if cell["missing"] else "")


def _span(cell: Any, name: str) -> str:
    low, high = cell[f"{name}_low"], cell[f"{name}_high"]
    return "-" if pd.isna(low) else f"{low:.2f} to {high:.2f}"


def _runs(cell: Any) -> str:
    words = f"{cell['ended']} of {cell['runs']} *" if cell["missing"] else str(cell["runs"])
    counts = (f"{cell[name]} {name}" for name in ("diverged", "pruned") if cell[name])
    return ", ".join([words, *counts])
