"""The checks of a diagnosis: what each value means, its threshold, and the threshold's source."""

from __future__ import annotations

import math
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of check.

    Args:
        title: its name in tables.
        quantity: what its value is.
        passes: the word for a value on the good side of the threshold.
        fails: the word for one on the other side.
        above: whether values above the threshold pass, or those below.
        threshold: what the threshold is.
        source: where it comes from.
    """

    title: str
    quantity: str
    passes: str
    fails: str
    above: bool
    threshold: str
    source: str


KINDS: dict[str, Kind] = {
    "floor": Kind(
        "floor",
        "norm of the exact gradient over the smallest that the number format resolves here",
        "resolved",
        "at the floor",
        True,
        "1",
        "rounding unit of the format: Higham 2002, sections 2.2 and 4.2; see feedbackhook.diagnosis.floor",
    ),
    "angle": Kind(
        "angle",
        "mean angle between delivered and exact gradient, in degrees",
        "aligned",
        "unrelated",
        False,
        "90 degrees less two standard deviations of the angle between random directions, 1/sqrt(D) radians",
        "Lillicrap et al. 2016 (below 90 degrees); the deviation: Cai, Fan and Jiang 2013",
    ),
    "growth": Kind(
        "growth",
        "largest ratio of root mean squares of activations, of the layer and the modules around it",
        "steady",
        "explodes",
        False,
        "1/eps: where both are added, as by a skip connection, no digit of the smaller is left",
        "spacing of the number format: IEEE 754, Higham 2002, section 2.1",
    ),
    "stability": Kind(
        "stability",
        "mean cosine of delivered gradients between batches",
        "steady",
        "unsteady",
        True,
        "two standard deviations of the mean over P pairs of random directions, 2/sqrt(D P)",
        "stiffness of Fort et al. 2019; the deviation: Cai, Fan and Jiang 2013",
    ),
    "signal": Kind(
        "signal to noise",
        "part of the expected delivered gradient along the expected exact one, over the standard deviation",
        "signal",
        "no signal",
        True,
        "two standard errors over batches",
        "sufficient descent, assumption 4.3 of Bottou, Curtis and Nocedal 2018: a positive inner product",
    ),
    "credit": Kind(
        "credit",
        "fall of the loss for a small step of this layer along the delivered gradient, over that along the "
        "exact one",
        "credited",
        "wrong way",
        True,
        "0, or the rounding error of the loss",
        "descent direction: Nocedal and Wright 2006, section 2.2",
    ),
}
"""The kinds of checks, in the order of tables."""

UNDEFINED = "undefined"


def verdict(kind: str, value: float, threshold: float) -> str:
    """Return the word for a value: that of its side of the threshold, or "undefined" if it is NaN."""
    if math.isnan(value) or math.isnan(threshold):
        return UNDEFINED
    passes = value > threshold if KINDS[kind].above else value < threshold
    return KINDS[kind].passes if passes else KINDS[kind].fails


class Check(NamedTuple):
    """One check of one layer.

    Args:
        layer: the layer's full name; None for the whole model.
        depth: its position in the order of the forward's calls, from 0.
        kind: a key of `KINDS`.
        value: the measured value; NaN if it is undefined.
        threshold: what it is compared with.
        note: why it is undefined, or what to compare it with.
    """

    layer: str | None
    depth: int | None
    kind: str
    value: float
    threshold: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """The word for it."""
        return verdict(self.kind, self.value, self.threshold)

    @property
    def failed(self) -> bool:
        """Whether it is on the wrong side of its threshold."""
        return self.verdict == KINDS[self.kind].fails
