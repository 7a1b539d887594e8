"""Reads scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import torch

from feedbackhook.experiments.data.decode import resize
from feedbackhook.experiments.data.split import TEST_FRACTION, Split, stratified

DIGITS = "digits"
"""The value of `data.name`."""


def read_digits(size: int | None) -> dict[str, Split]:
    """Return the training and the test set: 1,797 images of 8x8 pixels, resized to ``size``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    whole = Split(resize(images, size), torch.from_numpy(digits.target).long())
    return dict(zip(("train", "test"), stratified(whole, TEST_FRACTION), strict=True))
