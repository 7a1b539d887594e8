"""Which layers a model has, and where their weights are."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feedbackhook.core.torch_internals import own_buffer, own_parameter

KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
)
"""The layer kinds that can be patched. Subclasses count as the kind that they extend. `Conv1D` of
transformers, the linear layer of GPT-2 with a transposed weight, can be patched too. In attention, this
covers the query, key and value projections; the output projection is an `nn.Linear` inside it."""

OWN = frozenset(
    ["weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"]
)
"""The parameters with two dimensions or more that PyTorch's layers of these kinds have. Others are a
subclass's own."""

_CONVOLUTIONS = tuple(kind for kind in KINDS if kind.__name__.startswith("Conv"))

FUSED: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase)
"""Layers that compute in one fused call, inside which no error signal can be rerouted."""


@dataclass(frozen=True)
class LayerInfo:
    """What a rule may know about the layer that it draws for.

    Args:
        name: full name in the patched model: the module's name, followed in attention by the weight's.
        kind: the class name of the layer's kind, such as "Linear" or "Conv2d".
        shape: shape of the weight.
        fan_in: number of weights that feed one output unit. (For a transposed convolution: one output unit
            at stride 1.)
        groups: number of groups of a convolution, whose blocks follow each other along the weight's first
            dimension; 1 for other layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fan_in: int
    groups: int = 1


class Place(NamedTuple):
    """Where a layer's weight is.

    Args:
        path: full name of the module that holds it.
        module: that module.
        attribute: the weight's attribute in the module.
    """

    path: str
    module: nn.Module
    attribute: str = "weight"

    def parameter(self) -> Tensor | None:
        """Return the weight if it is a parameter of the module, or None if it is derived from others."""
        return own_parameter(self.module, self.attribute)

    def buffer(self) -> Tensor | None:
        """Return the weight if it is a buffer of floating-point numbers, else None."""
        buffer = own_buffer(self.module, self.attribute)
        return buffer if buffer is not None and buffer.is_floating_point() else None


class Target(NamedTuple):
    """A layer to patch: where its weight is, and what is known about the layer."""

    place: Place
    info: LayerInfo


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the kind that the module belongs to (see `KINDS`), or None if it cannot be patched."""
    found = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if found is None and (transformers := sys.modules.get("transformers.pytorch_utils")) is not None:
        conv1d: type[nn.Module] = transformers.Conv1D
        return conv1d if isinstance(module, conv1d) else None
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether the module computes in one fused call (see `FUSED`)."""
    return isinstance(module, FUSED)


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a layer that can be patched or excluded."""
    return kind_of(module) is not None or is_fused(module)


def weight_of(module: nn.Module, attribute: str = "weight") -> Tensor:
    """Return the weight as the module's forward would use it now, without changing the module's buffers."""
    if parametrize.is_parametrized(module, attribute):
        return _derived(module, attribute)
    weight = getattr(module, attribute)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"the weight of {type(module).__name__} must be a tensor, but it is {type(weight).__name__}"
        )
    return weight


def _derived(module: nn.Module, attribute: str) -> Tensor:
    """Compute a parametrized weight in evaluation mode: in training mode, spectral norm updates its state."""
    derivation = module.get_submodule(f"parametrizations.{attribute}")
    training = {part: part.training for part in derivation.modules()}
    derivation.eval()
    try:
        weight: Tensor = getattr(module, attribute)
    finally:
        for part, before in training.items():
            part.training = before
    return weight


def find_layers(model: nn.Module) -> dict[str, Place]:
    """Return where the weight of each layer that can be patched or excluded is, by the layer's full name."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(module, attribute) is not None:
                    found[f"{path}.{attribute}".lstrip(".")] = Place(path, module, attribute)
        elif is_layer(module):
            found[path] = Place(path, module)
    return found


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of each layer that can be patched, by the layer's full name."""
    return {name: place.module for name, place in find_layers(model).items() if kind_of(place.module)}


def describe_layer(name: str, place: Place) -> LayerInfo:
    """Return what is known about a layer that can be patched.

    Raises:
        ValueError: the weight is not initialized yet (a lazy module).
        TypeError: the weight is complex.
    """
    module, kind = place.module, kind_of(place.module)
    assert kind is not None
    if (parameter := place.parameter()) is not None and is_lazy(parameter):
        raise ValueError(f"{type(module).__name__} {name!r} has no weight yet; run a forward before patching")
    weight = weight_of(module, place.attribute)
    if weight.is_complex():
        raise TypeError(f"the weight of {name!r} is complex; feedback is defined only for real weights")
    shape = tuple(weight.shape)
    groups = int(getattr(module, "groups", 1)) if issubclass(kind, _CONVOLUTIONS) else 1
    if kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        fan_in = shape[0] // groups * math.prod(shape[2:])
    elif kind.__name__ == "Conv1D":
        fan_in = shape[0]
    else:
        fan_in = math.prod(shape[1:])
    return LayerInfo(name, kind.__name__, shape, fan_in, groups)


def full_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of the module's unpacked weight, or None if the module does not tell."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return None
