"""The paired tests on a sweep's page."""

from __future__ import annotations

from typing import Any

import pandas as pd

from feedbackhook.report.aggregate import SweepTable
from feedbackhook.report.compare import compare
from feedbackhook.report.errors import ReportError
from feedbackhook.report.statistics import LEAST_PAIRS

__all__ = ["paired_tests"]


def paired_tests(table: SweepTable) -> dict[str, Any]:
    """Return the rows of :func:`feedbackhook.report.compare.compare` against its first configuration.

    Returns:
        `rows`, which are empty if no test can be made; `against`, `chosen_by` and `count`, the number of
        pairs of configurations for which p is corrected; and `notes`, on what is missing and why.
    """
    plan = table.manifest
    if (most := len(plan.datasets) * plan.seeds) < LEAST_PAIRS:
        few = f"a test needs {LEAST_PAIRS} pairs of runs, on the same data with the same seed"
        return {"rows": [], "notes": [f"No tests: {few}, and the sweep has {most} for each condition."]}
    try:
        found = compare(table.runs)
    except ReportError as error:
        return {"rows": [], "notes": [f"No tests: {error}."]}
    tests = found.tests
    known = tests[tests["p"].notna()]
    if known.empty:
        few = f"no two conditions have {LEAST_PAIRS} pairs of runs whose errors differ"
        return {"rows": [], "notes": [f"No tests: {few}."]}
    notes = (
        [f"Too few pairs that differ for {len(tests) - len(known)} tests."] if len(known) < len(tests) else []
    )
    return {
        "rows": tests.astype(object).where(pd.notna(tests), None).to_dict("records"),
        "notes": notes,
        "against": tests["second"].iloc[0],
        "chosen_by": found.chosen_by,
        "count": known["first"].nunique(),
    }
