"""Draw the benchmarks' tables and figure from all results in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from common import RESULTS, read_results
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table


def ratios() -> pd.DataFrame:
    """Return a row per contestant and round: case, milliseconds, and the ratio to plain in that round.

    `total` is the ratio of the total time of all rounds to that of plain.
    """
    frames = []
    for case, result in read_results("step_time"):
        times = pd.DataFrame(result["milliseconds"])
        for prefix in ("", "no_grad "):
            part = times[[name for name in times if name.startswith("no_grad ") == bool(prefix)]]
            ratio = part.div(times[f"{prefix}plain"], axis="index")
            total = part.sum() / part[f"{prefix}plain"].sum()
            long = pd.DataFrame({"ms": part.T.stack(), "ratio": ratio.T.stack()})
            long["total"] = total.reindex(long.index.get_level_values(0)).to_numpy()
            frames.append(long.rename_axis(["contestant", "round"]).reset_index().assign(case=case))
    return pd.concat(frames, ignore_index=True)


def step_time() -> pd.DataFrame:
    """Return a row per case and contestant: rounds, median milliseconds, median and quartiles of the ratios.

    `total` is the ratio of the total time of all rounds to that of plain.
    """
    grouped = ratios().groupby(["case", "contestant"], sort=False)
    table = pd.DataFrame(
        {
            "rounds": grouped["ms"].count(),
            "ms": grouped["ms"].median(),
            "ratio": grouped["ratio"].median(),
            "from": grouped["ratio"].quantile(0.25),
            "to": grouped["ratio"].quantile(0.75),
            "total": grouped["total"].first(),
        }
    )
    return table.reset_index()


def print_step_time(console: Console, case: str) -> None:
    """Print the step times of a case."""
    rows = step_time()
    headings = ("contestant", "median ms", "times plain", "middle half", "in total")
    table = Table(*headings, title=case, box=box.SIMPLE)
    for row in rows[rows["case"] == case].to_dict("records"):
        spread = f"{row['from']:.3f} to {row['to']:.3f}"
        times = (f"{row['ratio']:.3f}", spread, f"{row['total']:.3f}")
        table.add_row(row["contestant"], f"{row['ms']:.1f}", *times)
    console.print(table)


def memory() -> pd.DataFrame:
    """Return a row per case and contestant: bytes between steps, and additional bytes at a step's peak.

    "beyond plain" is the difference to plain, in copies of the patched weights.
    """
    frames = []
    for case, result in read_results("memory"):
        table = pd.DataFrame(result["bytes"]).T.rename_axis("contestant").reset_index()
        plain = result["bytes"]["plain"]
        for column in ("lasting", "peak"):
            table[f"{column} beyond plain"] = (table[column] - plain[column]) / result["patched_weights"]
        frames.append(table.assign(case=case))
    columns = ["case", "contestant", "lasting", "peak", "lasting beyond plain", "peak beyond plain"]
    return pd.concat(frames)[columns]


def print_memory(console: Console, case: str) -> None:
    """Print the memory of a case."""
    rows = memory()
    headings = ("contestant", "lasting MB", "peak MB", "lasting beyond plain", "peak beyond plain")
    table = Table(*headings, title=case, caption="beyond plain: in copies of the weights", box=box.SIMPLE)
    for row in rows[rows["case"] == case].to_dict("records"):
        megabytes = (f"{row[column] / 1e6:.1f}" for column in ("lasting", "peak"))
        copies = (f"{row[f'{column} beyond plain']:.2f}" for column in ("lasting", "peak"))
        table.add_row(row["contestant"], *megabytes, *copies)
    console.print(table)


def draw() -> None:
    """Write results/step_time.csv, results/step_time.png and results/memory.csv, if there are results."""
    if (RESULTS / "step_time").exists():
        step_time().round(4).to_csv(RESULTS / "step_time.csv", index=False)
        _figure(ratios()).savefig(RESULTS / "step_time.png", dpi=120)
    if (RESULTS / "memory").exists():
        memory().round(4).to_csv(RESULTS / "memory.csv", index=False)


def _figure(rounds: pd.DataFrame) -> Figure:
    """Draw a panel per case: the median and middle half of each contestant's ratios to plain."""
    rounds = rounds[~rounds["contestant"].isin(["plain", "no_grad plain"])].copy()
    rounds["kind"] = rounds["contestant"].map(_kind)
    with sns.axes_style("whitegrid"):
        grid = sns.catplot(
            rounds,
            kind="point",
            x="ratio",
            y="contestant",
            hue="kind",
            col="case",
            col_wrap=3,
            estimator="median",
            errorbar=("pi", 50),
            linestyle="none",
            palette="colorblind",
            markersize=5,
            err_kws={"linewidth": 1.5},
            height=7.5,
            aspect=0.9,
            sharex=False,
            sharey=False,
        )
    for case, axes in grid.axes_dict.items():
        noise = rounds.query("case == @case and contestant == 'plain again'")["ratio"].quantile([0.25, 0.75])
        axes.axvspan(*noise, color="0.85", zorder=0)
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set(xlabel="step time / plain step time (median, middle half)", ylabel="", title=case)
    grid.legend.set_title("")
    grid.tight_layout(h_pad=2)
    figure: Figure = grid.figure
    return figure


def _kind(contestant: str) -> str:
    if contestant.startswith("biotorch"):
        return "biotorch"
    return "no patch acts" if contestant in _IDLE else "feedbackhook"


_IDLE = ("plain again", "removed", "no_grad plain again", "no_grad sign")


if __name__ == "__main__":
    draw()
