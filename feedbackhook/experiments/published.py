"""Published error rates, to show beside those of a sweep.

A package that has some registers them when it is imported, as `feedbackhook.liao2016` does. A sweep writes
the ones for its conditions and datasets into its manifest, where reports find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("dataset", "condition", "series", "concordance", "error")


@dataclass(frozen=True)
class Publication:
    """The error rates of one publication.

    Args:
        name: its short name, such as "Liao et al. 2016".
        citation: its name in a sentence.
        reference: the condition that it compares the others with.
        read: returns a row for each published error: `dataset` and `condition` as a configuration names
            them, `series` (the condition without its concordance), `concordance` (missing if the condition
            gives none) and `error`, in percent.
    """

    name: str
    citation: str
    reference: str
    read: Callable[[], pd.DataFrame]


PUBLICATIONS: dict[str, Publication] = {}
"""The registered publications by their short names."""


def register_publication(publication: Publication) -> None:
    """Show the errors of ``publication`` beside those of sweeps, in tables and figures."""
    PUBLICATIONS[publication.name] = publication
    published_errors.cache_clear()


@cache
def published_errors() -> pd.DataFrame:
    """Return the errors of all publications: `dataset, condition, series, concordance, error, publication`.

    If two have an error for the same dataset and condition, the one registered first counts.
    """
    import pandas as pd

    parts = [each.read().assign(publication=each.name) for each in PUBLICATIONS.values()]
    if not parts:
        return pd.DataFrame(columns=[*COLUMNS, "publication"])
    return pd.concat(parts, ignore_index=True).drop_duplicates(["dataset", "condition"])
