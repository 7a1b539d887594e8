"""The tables of tabular.py, from scikit-learn, in fixed folds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from sklearn import datasets
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor

TABLES = {
    "breast_cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
}
REGRESSION = ("diabetes",)


def folds(table: str, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield training features and targets, then test features and targets, of each fold.

    Features, and the target of a regression, are standardized with the mean and standard deviation of the
    training part. Features that do not vary there are 0.
    """
    x, y = TABLES[table](return_X_y=True)
    kind = KFold if table in REGRESSION else StratifiedKFold
    for training, test in kind(count, shuffle=True, random_state=0).split(x, y):
        mean, std = x[training].mean(0), x[training].std(0)
        features = torch.tensor((x - mean) / np.where(std > 0, std, 1.0), dtype=torch.float32)
        if table in REGRESSION:
            target = torch.tensor((y - y[training].mean()) / y[training].std(), dtype=torch.float32)
        else:
            target = torch.tensor(y)
        yield features[training], target[training], features[test], target[test]
