"""Shows what a patch would do to a model: its layers in forward order, and V in each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import feedbackhook
from feedbackhook.experiments.config import ConfigError, ModelConfig
from feedbackhook.experiments.models import build as models
from feedbackhook.experiments.models.registry import NETWORKS


@dataclass
class InspectConfig:
    """What to inspect.

    Args:
        model: a name as in `model.name`; `NAME` alone is `timm/NAME`.
        mode: the rule.
        options: the rule's options, such as `concordance`.
        include: layers to patch: a regular expression for the full name, or a list of names or suffixes.
        exclude: layers to leave exact, in the same form.
        size: images of size x size pixels; null: the size that the model is made for.
    """

    model: str
    mode: str = "sign"
    options: dict[str, Any] = field(default_factory=dict)
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    size: int | None = None


class InspectedLayer(NamedTuple):
    """One layer.

    Args:
        depth: its position in the order of calls in the forward pass, from 0; None if it is not called.
        name: its full name.
        kind: "Linear", "Conv2d" and so on.
        shape: shape of its weight.
        weights: number of its weights.
        rule: the rule that it would follow, or None if it would stay exact.
        input_requires_grad: whether its input requires a gradient, so that there is an error signal to send
            on; None if it is not called.
        weight_angle: between V and W, in degrees; NaN if W is all zero, None if it would stay exact.
        norm_ratio: norm(V) / norm(W), likewise.
    """

    depth: int | None
    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    rule: str | None
    input_requires_grad: bool | None
    weight_angle: float | None
    norm_ratio: float | None


@dataclass
class Inspection:
    """The layers and totals of a model.

    Args:
        model: its name.
        image: channels, height and width of its input.
        layers: in forward order; layers that the forward pass does not call come last.
        parameters: number of its parameters, including biases and normalization.
        patched_weights: number of weights in patched layers.
    """

    model: str
    image: tuple[int, int, int]
    layers: list[InspectedLayer]
    parameters: int
    patched_weights: int


def inspect(config: InspectConfig) -> Inspection:
    """Build the model with random weights, patch it, and run one image through it.

    Raises:
        ConfigError: there is no such model, rule, option or layer, or the model does not take such images.
    """
    name = config.model if "/" in config.model else f"timm/{config.model}"
    channels, *size = models.default_size(name)
    height, width = (config.size, config.size) if config.size is not None else size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classes = NETWORKS[name].classes if name in NETWORKS else 1000
        model = models.build(ModelConfig(name), classes, channels, (height, width))
    try:
        with feedbackhook.patch(model, "symmetric") as patch:
            model.eval()(torch.zeros(1, channels, height, width))
            every = patch.layers
        with feedbackhook.patch(
            model, config.mode, include=config.include, exclude=config.exclude, **config.options
        ) as patch:
            rules = {row.name: row.rule for row in patch.layers}
            measured = {(row.layer, row.metric): row.value for row in feedbackhook.measure(patch)}
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    layers = [
        InspectedLayer(
            row.depth,
            row.name,
            row.kind,
            row.shape,
            math.prod(row.shape),
            rules.get(row.name),
            row.input_requires_grad,
            measured.get((row.name, "weight_angle")),
            measured.get((row.name, "norm_ratio")),
        )
        for row in sorted(every, key=lambda row: math.inf if row.depth is None else row.depth)
    ]
    return Inspection(
        name,
        (channels, height, width),
        layers,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(layer.weights for layer in layers if layer.rule is not None),
    )
