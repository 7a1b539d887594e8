"""Sign-symmetry as Xiao, Chen, Liao and Poggio (2019) scale it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.sign import angle_of_signs
from feedbackhook.rules.tensors import constant


@register_rule("sign-symmetry")
@dataclass(frozen=True)
class SignSymmetry:
    """V = s sign(W), with s fixed by the shape of the layer; the classifier stays exact.

    s is sqrt(2/n) in convolutions, where n is the number of output channels times the size of the kernel, and
    1/sqrt(fan_in) in linear layers and attention. The paper has no transposed convolutions, which count as
    convolutions here.
    """

    exact_classifier: ClassVar[bool] = True

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return the scale, which nothing is drawn for."""
        return {"s": constant(_scale(rng.layer), weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current signs of W."""
        return torch.sign(weight).mul_(parts["s"].to(weight.dtype))

    def expected_angle(self, weight: Tensor) -> float:
        """Return the angle between V and W in degrees; its cosine is mean(abs(W)) / sqrt(mean(W^2)) over the
        nonzero entries of W. NaN if W is all zero."""
        return angle_of_signs(weight)


def _scale(layer: LayerInfo) -> float:
    if layer.kind == "Conv1D" or not layer.kind.startswith("Conv"):  # Conv1D of transformers is linear
        return 1 / math.sqrt(layer.fan_in)
    channels = layer.shape[1] * layer.groups if "Transpose" in layer.kind else layer.shape[0]
    return math.sqrt(2 / (channels * math.prod(layer.shape[2:])))
