"""The quantities of a diagnosis, as functions of a layer's gradients over batches.

Letters: G_i the delivered and G*_i the exact gradient of a layer's weight in sample i, D its number of
entries. A sample is a batch, or for rules that draw again after each update, a batch with a draw. Means run
over pairs of samples with different batches and draws, so that no sample agrees with itself: U-statistics
(Hoeffding 1948), unbiased for independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 16  # entries of each gradient that are held in float64 at a time


class Gram(NamedTuple):
    """The products of a layer's gradients, in float64.

    Args:
        delivered: <G_i, G_j>, shape (S, S) for S = draws * n samples, those of the first draw first.
        crossed: <G_i, G*_j>, shape (S, n).
        exact: <G*_i, G*_j>, shape (n, n) for n batches.
        entries: D.
    """

    delivered: Tensor
    crossed: Tensor
    exact: Tensor
    entries: int

    @classmethod
    def of(cls, delivered: Sequence[Sequence[Tensor]], exact: Sequence[Sequence[Tensor]]) -> Gram:
        """Return the products of the gradients of one layer.

        Args:
            delivered: for each sample, the gradients of the layer's parameters.
            exact: for each batch, the same under exact backprop.
        """
        samples = len(delivered)
        total = torch.zeros(samples + len(exact), samples + len(exact), dtype=torch.float64)
        entries = 0
        for parts in zip(*delivered, *exact, strict=True):
            flat = [part.detach().reshape(-1) for part in parts]
            entries += flat[0].numel()
            for start in range(0, flat[0].numel(), _BLOCK):
                block = torch.stack([each[start : start + _BLOCK] for each in flat]).to("cpu", torch.float64)
                total += block @ block.T
        return cls(total[:samples, :samples], total[:samples, samples:], total[samples:, samples:], entries)


class Moments(NamedTuple):
    """What the products say about a layer's gradients as random variables. `A` is the mean of <G*_i, G*_j>,
    an estimate of the squared norm of the expected exact gradient.

    Args:
        stability: mean cosine of G_i and G_j.
        exact_stability: mean cosine of G*_i and G*_j.
        pairs: number of pairs of batches.
        bias: norm(E[G] - E[G*]) / sqrt(A).
        noise: standard deviation of G over sqrt(A): sqrt(E[norm(G - E[G])^2] / A).
        draw_noise: the part of `noise` that draws cause; NaN for rules that do not draw again.
        exact_noise: standard deviation of G* over sqrt(A).
        signal_to_noise: <E[G], E[G*]> / sqrt(A), the part of the expected delivered gradient that points
            along the expected exact one, over the standard deviation of G.
        exact_signal_to_noise: sqrt(A) over the standard deviation of G*.
        uncertainty: two standard errors of `signal_to_noise` over batches.
        exact_uncertainty: the same of `exact_signal_to_noise`.
    """

    stability: float
    exact_stability: float
    pairs: int
    bias: float
    noise: float
    draw_noise: float
    exact_noise: float
    signal_to_noise: float
    exact_signal_to_noise: float
    uncertainty: float
    exact_uncertainty: float

    @classmethod
    def of(cls, gram: Gram) -> Moments:
        """Return the moments; those that one batch, or backprop's own disagreement, leaves undefined are
        NaN."""
        n, samples = len(gram.exact), len(gram.delivered)
        batch, draw = torch.arange(samples) % n, torch.arange(samples) // n
        other_batch = batch[:, None] != batch[None, :]
        other_draw = draw[:, None] != draw[None, :] if samples > n else torch.ones_like(other_batch)
        apart, exact_apart = other_batch & other_draw, other_batch[:n, :n]
        crossed, of_exact = _with_others(gram.crossed), _with_others(gram.exact)
        a, b, c = _mean(gram.exact, exact_apart), float(crossed.mean()), _mean(gram.delivered, apart)
        total, exact_total = (float(g.diagonal().mean()) for g in (gram.delivered, gram.exact))
        if n < 2 or not a > 0:
            nan = math.nan
            both = (_mean_cosine(gram.delivered, apart), _mean_cosine(gram.exact, exact_apart))
            return cls(*(both if n > 1 else (nan, nan)), n * (n - 1) // 2, *[nan] * 8)
        again = _mean(gram.delivered, ~other_batch & other_draw) if samples > n else math.nan
        std, exact_std = _root(total - c), _root(exact_total - a)
        error, exact_error = (_standard_error(x, n) / math.sqrt(a) for x in (crossed, of_exact))
        return cls(
            _mean_cosine(gram.delivered, apart),
            _mean_cosine(gram.exact, exact_apart),
            n * (n - 1) // 2,
            _root((c - 2 * b + a) / a),
            std / math.sqrt(a),
            _root((total - again) / a) if samples > n else math.nan,
            exact_std / math.sqrt(a),
            _over(b / math.sqrt(a), std),
            _over(math.sqrt(a), exact_std),
            2 * _over(error, std),
            2 * _over(exact_error, exact_std),
        )


def _with_others(products: Tensor) -> Tensor:
    """Return the mean product, shape (S,), of each sample with the exact gradients of the other batches."""
    n = products.shape[1]
    own = torch.arange(len(products))[:, None] % n == torch.arange(n)
    return products.masked_fill(own, 0).sum(1) / max(1, n - 1)


def _standard_error(products: Tensor, n: int) -> float:
    """Return the standard error over n batches of the mean of S products, those of the first draw first."""
    return float(products.reshape(-1, n).mean(0).std()) / math.sqrt(n)


def _mean(gram: Tensor, pairs: Tensor) -> float:
    return float(gram[pairs].mean()) if pairs.any() else math.nan


def _mean_cosine(gram: Tensor, pairs: Tensor) -> float:
    norms = gram.diagonal().sqrt()
    return _mean(gram / (norms[:, None] * norms[None, :]), pairs)


def _root(square: float) -> float:
    """The root; 0 for a square that is negative only as an estimate."""
    return math.sqrt(max(0.0, square))


def _over(value: float, std: float) -> float:
    return value / std if std else math.copysign(math.inf, value) if value else 0.0
