"""The numerical floor of a layer's exact gradient, below which no angle to it means anything.

Letters: a the layer's inputs, z its outputs, delta* the exact error signals at z, G* the exact gradient of
the layer's weight, each with the Frobenius norm over the whole batch; u the rounding unit of the coarsest
format among weight, a and z (half the distance from 1 to the next number); k the number of kernel taps.

Two things cannot be resolved, and the floor is the larger of both:

- *The step.* A step of length norm(G*), at learning rate 1, changes z by sqrt(k) norm(G*) norm(a) at most
  (Cauchy-Schwarz). The format holds no change of z below u norm(z). So norm(G*) must exceed
  u norm(z) / (sqrt(k) norm(a)).
- *The sum.* G* is a sum of products of delta* and a, each of which is rounded by u. Independent roundings add
  up in squares, to u norm(delta*) norm(a) at most; a G* below that is what cancellation left of it.

The unit of rounding errors, and how those of sums grow, are as in Higham 2002, Accuracy and Stability of
Numerical Algorithms, sections 2.2 and 4.2. That exact gradients fall to a numerical floor behind a last
normalization, where angles then mean nothing, was reported in 2026 ("Beyond Accuracy and Alignment: A
Diagnostic Evaluation Protocol for Feedback Alignment").
"""

from __future__ import annotations

import math
from typing import NamedTuple

from feedbackhook.core.layer import Patched
from feedbackhook.diagnosis.passes import Scales, taps


class Floor(NamedTuple):
    """The floor of a layer's exact gradient.

    Args:
        gradient: norm(G*), Frobenius.
        step: the smallest norm that changes the layer's output.
        total: the norm that roundings of the gradient's own sum have.
    """

    gradient: float
    step: float
    total: float

    @property
    def ratio(self) -> float:
        """norm(G*) over the floor; infinite if nothing was observed at the layer."""
        floor = max(self.step, self.total)
        return self.gradient / floor if floor else math.inf

    @property
    def reason(self) -> str | None:
        """Why no angle to this gradient means anything; None if one does."""
        if self.gradient == 0:
            return "the exact gradient is zero"
        if not math.isfinite(self.gradient):
            return "the exact gradient is not finite"
        if self.ratio >= 1:
            return None
        if self.step >= self.total:
            return (
                f"the exact gradient's norm, {self.gradient:.1e}, is below {self.step:.1e}: a step of that "
                "length changes nothing that the number format holds at the layer's output"
            )
        return (
            f"the exact gradient's norm, {self.gradient:.1e}, is below {self.total:.1e}, the rounding errors "
            "of its own sum"
        )


def floor_of(layer: Patched, gradient: float, scales: Scales | None) -> Floor:
    """Return the floor of a layer's exact gradient.

    Args:
        layer: the layer.
        gradient: the norm of its exact gradient.
        scales: what was observed there; None for a site at a module's input, which has no floor.
    """
    if scales is None or not scales.inputs:
        return Floor(gradient, 0.0, 0.0)
    unit, inputs = scales.unit, math.sqrt(scales.inputs)
    step = unit * math.sqrt(scales.outputs) / (math.sqrt(taps(layer)) * inputs)
    return Floor(gradient, step, unit * math.sqrt(scales.errors) * inputs)
