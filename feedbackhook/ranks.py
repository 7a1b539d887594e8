"""The effective rank of error signals: `measure(patch, loss, also=["participation_ratio"])`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from feedbackhook.core.layer import Layer, Patched


class Ranks:
    """Sums the second moments of the error signals at each layer's output, as delivered.

    Letters: N samples and positions, C features or channels.
    """

    def __init__(self) -> None:
        self._moments: dict[Patched, Tensor] = {}

    def observe(self, layer: Patched, grad_input: Tensor | None, grad_output: Tensor) -> None:
        """Add the error signals of one call, as a probe of the layer."""
        x = _rows(layer, grad_output.detach())
        x = x.float() if x.device.type == "mps" else x.double()
        moments = x.T @ x
        self._moments[layer] = self._moments[layer] + moments if layer in self._moments else moments

    def of(self, layer: Patched) -> float:
        """Return the participation ratio of a layer's error signals; NaN if none arrived."""
        moments = self._moments.get(layer)
        return math.nan if moments is None else participation_ratio(moments)


def participation_ratio(moments: Tensor) -> float:
    """Return the effective rank of signals with these second moments M, shape (C, C): tr(M)^2 / tr(M^2).

    It is 1 if all signals lie on one line, and C if they fill all directions equally; NaN if all are zero.

    Source: the participation ratio of Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics
    and measurement"; here around zero, since the mean error signal moves weights too.
    """
    square = float((moments * moments).sum())
    return float(moments.trace()) ** 2 / square if square else math.nan


@contextmanager
def collect_ranks(layers: Iterable[Patched]) -> Iterator[Ranks]:
    """Collect the error signals of the backwards within this context."""
    ranks = Ranks()
    with ExitStack() as probes:
        for layer in layers:
            if isinstance(layer, Layer):
                probes.enter_context(layer.add_probe(partial(ranks.observe, layer)))
        yield ranks


def _rows(layer: Patched, signal: Tensor) -> Tensor:
    """Return error signals at a layer's output as rows, shape (N, C)."""
    kernel = len(layer.info.shape) - 2  # dimensions of a convolution's kernel; 0 for a linear layer
    channels_last = signal.movedim(-1 - kernel, -1) if kernel > 0 else signal
    return channels_last.reshape(-1, channels_last.shape[-1])
