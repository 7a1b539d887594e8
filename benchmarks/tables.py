"""The benchmarks' tables, from all results that lie in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import pandas as pd
from common import RESULTS, read_results
from rich import box
from rich.console import Console
from rich.table import Table


def ratios() -> pd.DataFrame:
    """A row for each contestant and round: case, contestant, milliseconds, ratio to plain in that round."""
    frames = []
    for case, result in read_results("step_time"):
        times = pd.DataFrame(result["milliseconds"])
        for prefix in ("", "no_grad "):
            part = times[[name for name in times if name.startswith("no_grad ") == bool(prefix)]]
            ratio = part.div(times[f"{prefix}plain"], axis="index")
            long = pd.DataFrame({"ms": part.T.stack(), "ratio": ratio.T.stack()})
            frames.append(long.rename_axis(["contestant", "round"]).reset_index().assign(case=case))
    return pd.concat(frames)


def step_time() -> pd.DataFrame:
    """A row for each case and contestant: rounds, the median of the milliseconds, and of the ratios the
    median and the quartiles."""
    grouped = ratios().groupby(["case", "contestant"], sort=False)
    table = pd.DataFrame(
        {
            "rounds": grouped["ms"].count(),
            "ms": grouped["ms"].median(),
            "ratio": grouped["ratio"].median(),
            "from": grouped["ratio"].quantile(0.25),
            "to": grouped["ratio"].quantile(0.75),
        }
    )
    return table.reset_index()


def print_step_time(console: Console, case: str) -> None:
    rows = step_time()
    table = Table("contestant", "median ms", "times plain", "middle half", title=case, box=box.SIMPLE)
    for row in rows[rows["case"] == case].to_dict("records"):
        spread = f"{row['from']:.3f} to {row['to']:.3f}"
        table.add_row(row["contestant"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}", spread)
    console.print(table)


def draw() -> None:
    """Writes results/step_time.csv."""
    step_time().round(4).to_csv(RESULTS / "step_time.csv", index=False)


if __name__ == "__main__":
    draw()
