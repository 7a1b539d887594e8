"""Which rules, at which concordances, a profile looks at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from feedbackhook.rules import make_rule, rule_values

MODES: tuple[str, ...] = ("sign", "random")
CONCORDANCES: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)


class Setting(NamedTuple):
    """One row of the grid.

    Args:
        mode: the rule's name, or the name that a mapping gives it.
        concordance: the share of signs that agree; None if the rule has no such option.
        arguments: the keyword arguments of `feedbackhook.patch`.
    """

    mode: str
    concordance: float | None
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The row's name, such as "sign, concordance 0.75"."""
        return self.mode if self.concordance is None else f"{self.mode}, concordance {self.concordance:g}"


Modes = Sequence[str] | Mapping[str, str | Mapping[str, Any]]


def settings(modes: Modes, concordances: Iterable[float]) -> list[Setting]:
    """Return the grid: each mode, and each of those with an option `concordance` at every concordance.

    Args:
        modes: names of rules; or a mapping from names of your own to rules or to arguments of
            `feedbackhook.patch`, such as `{"attention exact": dict(mode="random", exclude=r".*qkv")}`.
        concordances: shares of agreeing signs, 0 to 1. A mode that gives its own is not changed.

    Raises:
        ValueError: there is no mode, a rule is unknown, or an option is out of range.
        TypeError: `modes` is neither names nor a mapping.
    """
    if isinstance(modes, str):
        modes = [modes]
    given = modes if isinstance(modes, Mapping) else {name: name for name in modes}
    concordances = list(dict.fromkeys(float(c) for c in concordances))
    found: list[Setting] = []
    for name, entry in given.items():
        arguments: dict[str, Any] = {"mode": entry} if isinstance(entry, str) else dict(entry)
        if "seed" in arguments:
            raise ValueError(f"modes[{name!r}] has a seed, but a profile draws with seeds of its own")
        own, takes = _concordance(arguments)
        if not takes or own is not None:
            found.append(Setting(str(name), own, arguments))
            continue
        found += [Setting(str(name), c, {**arguments, "concordance": c}) for c in concordances]
    if not found:
        raise ValueError("modes and concordances leave nothing to profile")
    return found


def _concordance(arguments: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Return the concordance that the arguments give, and whether their rule takes one."""
    if not isinstance(mode := arguments.get("mode", "sign"), str):
        return None, False  # a mapping of rules by layer
    takes = "concordance" in rule_values(make_rule(mode, {}))
    return arguments.get("concordance"), takes
