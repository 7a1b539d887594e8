"""Names in messages and tables: suggestions for misspelled ones, and the name of a mode."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to an error message: "; did you mean 'A', 'B' or 'C'?".

    The names are those among ``known`` that are most similar to the misspelled one, ignoring case. The
    suggestion is empty if none is similar.
    """
    by_case = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=3)
    *others, last = [repr(by_case[each]) for each in near] or [""]
    return f"; did you mean {' or '.join(filter(None, (', '.join(others), last)))}?" if near else ""


def rule_name(mode: str | Mapping[str, Any] | None) -> str | None:
    """Return the rule that a mode names; "mixed" for a mapping, None for backprop."""
    return "mixed" if isinstance(mode, Mapping) else mode
