"""Rules whose feedback learns from what the layer computes, without the error signal: weight mirrors, and the
alignment rules of Kunin et al. 2020.

The latter descend a loss of the layer's own, a sum of these primitives (means over the samples; in
convolutions sums over the positions, in linear layers each position of a sample counts as one), with x the
layer's input and W x its output without the bias:

| primitive | formula | gradient with respect to V |
|---|---|---|
| decay | norm(V)^2 (+ norm(W)^2) | 2 V |
| self | -sum(V o W) | -W |
| amp | -(V x) . (W x) | -(W x) x^T |
| sparse | norm(V x)^2 (+ norm(W x)^2) | 2 (V x) x^T |
| null | norm(V^T W x)^2 | 2 (W x) (V^T W x)^T |

W does not follow this loss. The terms in brackets do not depend on V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from feedbackhook.core.learning import LearnsFrom, Local, full_precision
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.learned import LearnedWeight
from feedbackhook.rules.options import check_integer, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import blocks, wide


@register_rule("WM")
@dataclass(frozen=True)
class WeightMirror(LearnedWeight):
    """V follows W in a mirror phase: V <- (1 - rate) V + rate mean((W x) x^T), x ~ N(0, 1) (weight mirrors,
    Akrout et al. 2019).

    Noise enters the layer, and its correlation with what comes out estimates W. Forgetting at the same rate
    holds the norm of V at that of W. In a convolution the noise fills the receptive field of one output.

    Args:
        rate: how much of V one step replaces. After many steps, the angle to W is about
            arctan(sqrt(rate n / (2 batch))), n being the number of inputs of the layer's matrix.
        batch: number of noise vectors in a step.
        every: run the mirror phase after every N updates of W; None: only when `Patch.mirror` is called.
        steps: number of steps in each such phase.
    """

    rate: float = 0.01
    batch: int = 128
    every: int | None = 1
    steps: int = 1

    learns_from: ClassVar[LearnsFrom] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rate", self.rate, 0, 1)
        check_integer("batch", self.batch, 1)
        if self.every is not None:
            check_integer("every", self.every, 1)
        check_integer("steps", self.steps, 1)

    def mirror(self, weight: Tensor, parts: Mapping[str, Tensor], rng: CounterRNG) -> dict[str, Tensor]:
        """Return V after one step."""
        w, v = (blocks(wide(t), rng.layer.groups) for t in (weight, parts["V"]))
        second = rng.layer.kind == "Conv1D" or rng.layer.kind.startswith("ConvTranspose")
        groups, m, n = w.shape
        x = rng.normal(w.new_empty(groups, self.batch, m if second else n), "noise").to(w.dtype)
        with full_precision(weight.device):
            seen = x.mT @ (x @ w) if second else (x @ w.mT).mT @ x
        return {"V": v.lerp(seen / self.batch, float(self.rate)).reshape(weight.shape)}


@register_rule("information")
@dataclass(frozen=True)
class InformationAlignment(LearnedWeight):
    """V descends alpha amp + beta null + gamma decay: information alignment (Kunin et al. 2020).

    Args:
        alpha: weight of amp.
        beta: weight of null, which damps what V sends back of W x.
        gamma: weight of decay.
    """

    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.5

    learns_from: ClassVar[LearnsFrom] = "activity"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            check_number(name, getattr(self, name), 0)

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the loss with respect to V."""
        v, x, y = parts["V"], local.input, local.output
        sent = local.send(y, v)
        from_activity = local.outer(2 * self.beta * sent - self.alpha * x, y) / local.samples
        return {"V": from_activity + 2 * self.gamma * local.only(v)}


@dataclass(frozen=True)
class TwoTerms(LearnedWeight):
    """V descends a local loss of two terms, alpha and beta times one each."""

    alpha: float = 0.5
    beta: float = 1.0

    learns_from: ClassVar[LearnsFrom] = "activity"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            check_number(name, getattr(self, name), 0)


@register_rule("symmetric-alignment")
@dataclass(frozen=True)
class SymmetricAlignment(TwoTerms):
    """V descends alpha decay + beta self: symmetric alignment (Kunin et al. 2020), which needs no data.

    Args:
        alpha: weight of decay.
        beta: weight of self. V comes to be beta / (2 alpha) W.
    """

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the loss with respect to V."""
        return {"V": 2 * self.alpha * local.only(parts["V"]) - self.beta * local.weight}


@register_rule("activation-alignment")
@dataclass(frozen=True)
class ActivationAlignment(TwoTerms):
    """V descends alpha sparse + beta amp: activation alignment (Kunin et al. 2020).

    Args:
        alpha: weight of sparse.
        beta: weight of amp. V x comes to be beta / (2 alpha) W x.
    """

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the loss with respect to V."""
        x = local.input
        difference = 2 * self.alpha * local.apply(x, parts["V"]) - self.beta * local.output
        return {"V": local.outer(x, difference) / local.samples}
