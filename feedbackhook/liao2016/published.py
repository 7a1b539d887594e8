"""The error rates of Liao, Leibo and Poggio 2016, Tables 2 to 6."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from feedbackhook.experiments.published import COLUMNS, Publication, register_publication

if TYPE_CHECKING:
    import pandas as pd

DATASETS = {"CIFAR-10": "CIFAR10", "CIFAR-100": "CIFAR100", "STL-10": "STL10"}
"""What `data.name` calls the datasets to which the paper gives other names."""


def error_rates() -> pd.DataFrame:
    """Return the paper's error rates in percent: a row for each condition, a column for each dataset, both by
    the paper's names; missing where the paper has none."""
    import pandas as pd

    with (files("feedbackhook.liao2016") / "error_rates.csv").open() as file:
        return pd.read_csv(file, index_col="condition")


def _rows() -> pd.DataFrame:
    table = error_rates().rename(columns=DATASETS).rename_axis(columns="dataset")
    rows = table.stack().dropna().rename("error").reset_index()
    words = rows["condition"].str.extract(
        r"^(?P<terms>\S+)(?: concordance=(?P<concordance>\S+))?(?P<part>.*)$"
    )
    return rows.assign(series=words["terms"] + words["part"], concordance=words["concordance"].astype(float))[
        list(COLUMNS)
    ]


register_publication(
    Publication("Liao et al. 2016", "Liao, Leibo and Poggio 2016", reference="SGD", read=_rows)
)
