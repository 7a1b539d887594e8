"""Networks under the rules of Xiao et al. (2019): the library's sign-symmetry, and feedback alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
from settings import Settings
from torch import Tensor, nn

import feedbackhook


def scale_of(shape: Sequence[int]) -> float:
    """Return the scale s of a weight [out, in] (linear) or [out, in / groups, *k] (convolution).

    s is sqrt(2 / (prod(k) out)) for a convolution and 1 / sqrt(in) for a linear layer. The former is the
    standard deviation of the initial weights of torchvision's ResNet, the latter the bound of those of
    PyTorch's linear layer.
    """
    if len(shape) == 2:
        return 1 / math.sqrt(shape[1])
    return math.sqrt(2 / (math.prod(shape[2:]) * shape[0]))


@feedbackhook.register_rule("feedback-alignment")
@dataclass(frozen=True)
class FeedbackAlignment:
    """V is random, independent of W and fixed: N(0, s^2) for convolutions, U[-s, s] for linear layers.

    From Lillicrap et al. (2016), at the scales that the code of Xiao et al. uses.
    """

    def check(self, layers: Sequence[feedbackhook.LayerInfo]) -> None:
        """Raise ValueError for a layer for which the paper gives no scale."""
        for layer in layers:
            if layer.kind.startswith("ConvTranspose"):
                raise ValueError(
                    f"{layer.name!r} is a {layer.kind}, for which the paper gives no scale: exclude it"
                )

    def draw(self, weight: Tensor, rng: feedbackhook.CounterRNG) -> dict[str, Tensor]:
        v = rng.uniform(weight).mul_(2).sub_(1) if weight.dim() == 2 else rng.normal(weight)
        return {"V": v.mul_(scale_of(weight.shape)).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["V"]


def build(settings: Settings, classes: int) -> tuple[nn.Module, feedbackhook.Patch | None]:
    """Build a network of torchvision and its patch, which is None for the rule "backprop"."""
    options = settings.options or {}
    if settings.rule == "backprop" and options:
        raise ValueError(f"backprop has no options, but these were given: {', '.join(options)}")
    torch.manual_seed(settings.seed)
    network = torchvision.models.get_model(settings.model, weights=None, num_classes=classes)
    if settings.rule == "backprop":
        return network, None
    exclude = feedbackhook.classifier(network) if settings.last_layer_exact else []
    return network, feedbackhook.patch(network, settings.rule, exclude=exclude, seed=settings.seed, **options)
