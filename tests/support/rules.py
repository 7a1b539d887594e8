"""Every built-in rule whose V is a function of W, from the registry, so that no test leaves out a new one."""

from __future__ import annotations

from typing import Any

from feedbackhook.rules import RULES

NEEDED: dict[str, dict[str, Any]] = {}
"""Options that a rule cannot do without. Not those of "tensor", whose V belongs to one model."""

EVERY_RULE: dict[str, dict[str, Any]] = {
    mode: NEEDED.get(mode, {})
    for mode, rule in RULES.items()
    if rule.__module__.startswith("feedbackhook.rules.") and mode != "tensor" and hasattr(rule, "feedback")
}
"""Its modes, with the options that they need and no other."""

INEXACT = {mode: options for mode, options in EVERY_RULE.items() if mode != "symmetric"}
"""The same without backprop."""

LEARNS = {mode for mode in EVERY_RULE if getattr(RULES[mode], "learns_from", "noise") != "noise"}
"""Those that learn in the backward."""

PATCH_ALL: dict[str, Any] = {"exclude": []}
"""Also patches the layers that a rule leaves exact by default."""
