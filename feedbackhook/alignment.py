"""How V and W compare: angles in degrees, shares of agreeing signs, ratios of norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from feedbackhook.patching import Patch


class Row(NamedTuple):
    """One measured value.

    Args:
        layer: the layer's full name.
        depth: the layer's place, from 0, in the order of `patch.layers`.
        metric: "weight_angle" (degrees), "sign_agreement" (0 to 1) or "norm_ratio".
        value: what was measured.
    """

    layer: str
    depth: int
    metric: str
    value: float


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors of one shape, flattened, in degrees, 0 to 180; NaN if one is all zero.

    By Kahan's formula 2 atan2(|a' - b'|, |a' + b'|) with a' and b' of unit norm, which keeps its precision
    near 0 and 180 degrees, where the arc cosine of a scalar product loses it.
    """
    a, b = a.detach().flatten(), b.detach().flatten()
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    a, b = a / torch.linalg.vector_norm(a), b / torch.linalg.vector_norm(b)
    difference, total = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b)
    return float(torch.rad2deg(2 * torch.atan2(difference, total)))


def sign_agreement(v: Tensor, w: Tensor) -> float:
    """The share, 0 to 1, of the entries nonzero in both whose signs agree; NaN where there are none."""
    both = (v != 0) & (w != 0)
    return float(((torch.sign(v) == torch.sign(w)) & both).sum() / both.sum())


def norm_ratio(v: Tensor, w: Tensor) -> float:
    """norm(V) / norm(W), Frobenius; infinite or NaN where W is all zero."""
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(v, dtype=dtype) / torch.linalg.vector_norm(w, dtype=dtype))


_METRICS = {"weight_angle": angle, "sign_agreement": sign_agreement, "norm_ratio": norm_ratio}


@torch.no_grad()
def measure(patch: Patch) -> list[Row]:
    """How each layer's V compares with its W now: `weight_angle`, `sign_agreement` and `norm_ratio`."""
    rows = []
    for depth, layer in enumerate(patch.layers):
        v, w = patch.feedback(layer.name), patch.weight(layer.name)
        rows += [Row(layer.name, depth, metric, of(v, w)) for metric, of in _METRICS.items()]
    return rows
