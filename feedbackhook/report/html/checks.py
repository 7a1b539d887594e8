"""The table of checks on a sweep's page: how many layers of each condition fail, at its best rate."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from feedbackhook.diagnosis.checks import KINDS, UNDEFINED
from feedbackhook.report.aggregate import SweepTable
from feedbackhook.report.checks import METRICS, last_checks, number

__all__ = ["checks_section"]


def checks_section(table: SweepTable) -> Markup:
    """Return the part of the page about checks; empty if no run has recorded any."""
    checks = last_checks(table.runs.rows(of_layers=METRICS))
    best = table.cells.set_index(["dataset", "condition"])["lr_factor"].to_dict()
    shown = []
    for run in table.manifest.runs:
        own = checks[checks["run"] == run.name]
        if len(own) and best.get((run.dataset, run.condition)) == run.lr_factor:
            shown.append(
                {"run": run, "step": own["step"].iloc[0], "cells": _cells(own), "layers": _layers(own)}
            )
    if not shown:
        return Markup("")
    source = (files("feedbackhook.report.html") / "checks.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return Markup(environment.from_string(source).render(shown=shown, kinds=KINDS, undefined=UNDEFINED))


def _cells(checks: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """For each kind: how many layers fail or are undefined, of how many, and the word for it."""
    found = {}
    for kind in KINDS:
        own = checks[checks["kind"] == kind]
        outcomes = own["outcome"].value_counts().to_dict()
        fails, undefined = outcomes.get("fails", 0), outcomes.get(UNDEFINED, 0)
        word = KINDS[kind].fails if fails else UNDEFINED if undefined else KINDS[kind].passes
        outcome = "fails" if fails else UNDEFINED if undefined else "passes"
        count = fails or undefined or len(own)
        found[kind] = {"word": word, "outcome": outcome, "count": count, "of": len(own)}
    return found


def _layers(checks: pd.DataFrame) -> list[tuple[str, dict[str, dict[str, str]]]]:
    """Each layer with the value and the verdict of each kind."""
    layers: dict[str, dict[str, dict[str, str]]] = {}
    for row in checks.to_dict("records"):
        text = "" if pd.isna(row["value"]) else number(row["value"], row["kind"])
        cell = {"number": text, "word": row["verdict"], "outcome": row["outcome"]}
        layers.setdefault(row["layer"], {})[row["kind"]] = cell
    return list(layers.items())
