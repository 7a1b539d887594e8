"""`feedbackhook compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from feedbackhook.cli.parsers import Command
from feedbackhook.cli.printing import plain_table, print_whole

if TYPE_CHECKING:
    from feedbackhook.report.compare import Comparison


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=str, nargs="+", help="run folders, or folders of run folders")
    parser.add_argument(
        "--against",
        type=str | None,
        help="configuration to test the others against; `all`: test each pair; null: the first",
    )
    parser.add_argument(
        "--rates", type=bool, default=False, help="list every learning rate instead of choosing one"
    )


def _compare(given: Namespace) -> int:
    from feedbackhook.report.compare import compare
    from feedbackhook.report.runs import collect

    runs = collect(*given.runs)
    found = compare(runs, given.against, given.rates)
    below = [*_rate_lines(found), *(f"left out: {name}: {reason}" for name, reason in runs.skipped.items())]
    too_few = _too_few_lines(found)
    if found.tests["p"].notna().any():
        print_whole(_mean_table(found), *below)
        print_whole(_test_table(found), *too_few)
    else:
        print_whole(_mean_table(found), *below, *too_few)
    return 0


def _mean_table(found: Comparison) -> Table:
    table = plain_table("test error [%]: mean over seeds (95% interval)")
    headings = ["configuration", "dataset", *(["rate"] if found.chosen_by else []), "runs", "final", "best"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("configuration", "dataset") else "right")
    for row in found.means.to_dict("records"):
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        rate = [f"{row['learning_rate']:g}"] if found.chosen_by else []
        intervals = (_interval(row, kind) for kind in ("final", "best"))
        table.add_row(row["configuration"], row["dataset"], *rate, f"{row['runs']}{diverged}", *intervals)
    return table


def _interval(row: dict[str, Any], kind: str) -> str:
    mean, low, high = (row[f"{kind}_{end}"] for end in ("mean", "low", "high"))
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _rate_lines(found: Comparison) -> list[str]:
    """How learning rates were chosen."""
    if not found.chosen_by:
        return []
    most = found.means["rates"].max()
    return [
        f"rate: the learning rate, of up to {most}, with the smallest {found.chosen_by}",
        "(--rates true lists all rates)",
    ]


def _test_table(found: Comparison) -> Table:
    tests = found.tests
    several = tests["second"].nunique() > 1
    title = "first minus second" if several else f"minus {tests['second'].iloc[0]}"
    title += ", on the same data with the same seed: Wilcoxon signed-rank test"
    if (count := tests.loc[tests["p"].notna(), "error"].value_counts().max()) > 1:
        title += f"; p is corrected for {count} tests of each error (Holm)"
    table = plain_table(title)
    names = ["first", "second"] if several else ["configuration"]
    numbers = ("pairs", "median [points]", "effect")
    for heading in (*names, "error", "pairs", "median [points]", "effect", "verdict"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for row in tests.to_dict("records"):
        median = "" if row["pairs"] == 0 else f"{row['difference']:+.2f}"
        effect = "" if row["effect"] is None or math.isnan(row["effect"]) else f"{row['effect']:+.2f}"
        compared = (row["first"], row["second"])[: len(names)]
        table.add_row(*compared, row["error"], str(row["pairs"]), median, effect, row["verdict"])
    return table


def _too_few_lines(found: Comparison) -> list[str]:
    """Which tests could not be made, in one line."""
    from feedbackhook.report.statistics import LEAST_PAIRS

    few = found.tests[found.tests["p"].isna()]
    if few.empty:
        return []
    which = "every test" if len(few) == len(found.tests) else f"{len(few)} of {len(found.tests)} tests"
    most = few["differing"].max()
    return [
        f"Too few runs for {which}: a test needs {LEAST_PAIRS} pairs of runs, on the same data with the same "
        f"seed, whose errors differ, and there are at most {most}."
    ]


COMPARE = Command(
    name="compare",
    help="compare configurations over their seeds",
    description=(
        "Compare configurations over their seeds, each at its own best learning rate: final and best test "
        "error with 95% intervals, and a paired test against the first."
    ),
    arguments=_arguments,
    run=_compare,
)
