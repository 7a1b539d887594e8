"""What reports ask about a feedback rule: whether it has a concordance, and whether it is redrawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from feedbackhook.rules import AnyRule, make_rule, redrawn_by_updates, rule_values


def concordance(mode: str | None, options: Mapping[str, Any]) -> float | None:
    """Return the concordance of a rule with these options; None if it has none, or is not known here."""
    rule = _rule(mode, options)
    return None if rule is None else rule_values(rule).get("concordance")


def drawing(mode: str | None) -> str | None:
    """Return "redrawn" if a rule with a concordance draws its random parts after each update of the weights,
    "fixed" if it draws them once; None for other rules."""
    rule = _rule(mode, {})
    if rule is None or "concordance" not in rule_values(rule):
        return None
    return "redrawn" if redrawn_by_updates(rule) else "fixed"


def _rule(mode: str | None, options: Mapping[str, Any]) -> AnyRule | None:
    try:
        return None if mode is None else make_rule(mode, options)
    except (TypeError, ValueError):  # "mixed", or a rule that only the program of the run knew
        return None
