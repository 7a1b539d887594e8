"""Which layers of a model are patched: the kinds that can be, `include` and `exclude`, the classifier."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Selection: TypeAlias = str | Sequence[str | type[nn.Module]]

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
"""The kinds of layer that can be patched, with transformers' `Conv1D`, the linear layer of GPT-2, whose
weight is transposed; subclasses count as the kind that they extend. Of attention, these are the projections
of query, key and value; the output's is an `nn.Linear` of its own."""

FUSED: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase)
"""Layers that compute in one fused call, inside which no error signal can be rerouted."""


@dataclass(frozen=True)
class LayerInfo:
    """What a rule may know of the layer for which it draws.

    Args:
        name: the full name in the patched model: the module's, followed in attention by the weight's.
        kind: one of `KINDS`, by its name.
        shape: that of the weight.
        fan_in: the number of weights that feed one output unit (of a transposed convolution: one output
            unit of stride 1).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fan_in: int


class Target(NamedTuple):
    """A layer to be patched: its module by full name, its weight's attribute, and what is known of it."""

    path: str
    module: nn.Module
    attribute: str
    info: LayerInfo

    def parameter(self) -> Tensor | None:
        """The weight, where it is a parameter of the module; None where it is derived from others."""
        return self.module._parameters.get(self.attribute)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The kind in `KINDS` that the module is, or transformers' `Conv1D`, or None."""
    found = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if found is None and (transformers := sys.modules.get("transformers.pytorch_utils")) is not None:
        conv1d: type[nn.Module] = transformers.Conv1D
        return conv1d if isinstance(module, conv1d) else None
    return found


def weight_of(module: nn.Module, attribute: str = "weight") -> Tensor:
    """The layer's weight as its forward would use it now; the module's buffers stay as they are."""
    if parametrize.is_parametrized(module, attribute):
        return _derived(module, attribute)
    weight = getattr(module, attribute)
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of {type(module).__name__} is {type(weight).__name__}, not a tensor")
    return weight


def _derived(module: nn.Module, attribute: str) -> Tensor:
    """A reparametrised weight, computed in evaluation mode: in training, some (spectral norm) learn by it."""
    derivation = module.get_submodule(f"parametrizations.{attribute}")
    training = {part: part.training for part in derivation.modules()}
    derivation.eval()
    try:
        weight: Tensor = getattr(module, attribute)
    finally:
        for part, before in training.items():
            part.training = before
    return weight


def find_targets(
    model: nn.Module,
    include: Selection | None = None,
    exclude: Selection | None = None,
    patterns: Iterable[str] | None = None,
) -> list[Target]:
    """The layers of `model` that `include` (None: all) holds and `exclude` does not, and, if there are
    `patterns` (a mapping of modes has them), whose full name one of these matches.

    A string is a regular expression that the full name must match as a whole; a list holds full names, name
    suffixes (`"fc"` is also `"block.fc"`) or module types. `exclude` wins.

    Raises:
        ValueError: nothing to patch, a selection without effect, or a weight shared by a patched layer and
            one that is not.
        TypeError: a fused recurrent layer is selected, or a selection is of the wrong type.
    """
    candidates = _candidates(model)
    if not candidates:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{type(model).__name__} has nothing to patch: no layer of the kinds {kinds}")
    modules = {name: module for name, (_, module, _) in candidates.items()}
    included = set(modules) if include is None else select("include", include, modules)
    excluded = set() if exclude is None else select("exclude", exclude, modules)
    if exclude is not None and not excluded & included:
        raise ValueError(f"exclude={_show(exclude)} has no effect: it matches no layer that include selects")
    chosen = [name for name in modules if name in included and name not in excluded]
    if patterns is not None:
        matched = set[str]().union(*(select("mode", pattern, modules) for pattern in patterns))
        chosen = [name for name in chosen if name in matched]
    if not chosen:
        given = {"include": include, "exclude": exclude, "mode": patterns}
        shown = ", ".join(f"{name}={_show(value)}" for name, value in given.items() if value is not None)
        raise ValueError(f"nothing is left to patch: {shown} takes every layer away")
    for name in chosen:
        if _fused(modules[name]):
            raise TypeError(
                f"{type(modules[name]).__name__} {name!r} computes in one fused call, inside which no error "
                f"signal can be rerouted; exclude=[{name!r}] leaves it with exact backprop"
            )
    _check_shared(candidates, set(chosen))
    return [Target(*candidates[name], _info(name, *candidates[name][1:])) for name in chosen]


def classifier(model: nn.Module) -> list[str]:
    """The full names of the layers that make the class scores, for `exclude` (or `include`).

    Those inside `model.get_classifier()` where the model has that method, as timm's have; otherwise the last
    layer, in the order in which the modules are registered, that can be patched.

    Raises:
        ValueError: there is none.
    """
    names = {module: name for name, module in model.named_modules() if kind_of(module)}
    if callable(getter := getattr(model, "get_classifier", None)):
        heads = getter()
        heads = heads if isinstance(heads, (tuple, list)) else (heads,)
        found = [names[part] for head in heads for part in head.modules() if part in names]
    else:
        found = list(names.values())[-1:]
    if not found:
        raise ValueError(f"{type(model).__name__} has no classifier that can be patched")
    return found


def _fused(module: nn.Module) -> bool:
    return isinstance(module, FUSED)


def is_layer(module: nn.Module) -> bool:
    """Whether its parameters are a layer's, be it one that can be patched or one that can be excluded."""
    return kind_of(module) is not None or _fused(module)


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each layer that could be patched, by the layer's full name."""
    return {name: module for name, (_, module, _) in _candidates(model).items() if kind_of(module)}


def _candidates(model: nn.Module) -> dict[str, tuple[str, nn.Module, str]]:
    """Module's name, module and weight's attribute of each layer that can be chosen, by the layer's name."""
    found: dict[str, tuple[str, nn.Module, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(module, attribute) is not None:
                    found[f"{path}.{attribute}".lstrip(".")] = (path, module, attribute)
        elif kind_of(module) or _fused(module):
            found[path] = (path, module, "weight")
    return found


def _info(name: str, module: nn.Module, attribute: str) -> LayerInfo:
    kind = kind_of(module)
    assert kind is not None
    if (parameter := module._parameters.get(attribute)) is not None and is_lazy(parameter):
        raise ValueError(f"{type(module).__name__} {name!r} has no weight yet; run a forward before patching")
    weight = weight_of(module, attribute)
    if weight.is_complex():
        raise TypeError(f"the weight of {name!r} is complex; feedback is defined for real weights")
    shape = tuple(weight.shape)
    if kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        fan_in = shape[0] // int(module.groups) * math.prod(shape[2:])  # type: ignore[arg-type]
    elif kind.__name__ == "Conv1D":
        fan_in = shape[0]
    else:
        fan_in = math.prod(shape[1:])
    return LayerInfo(name, kind.__name__, shape, fan_in)


def full_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape that the module's weight has where it is not packed; None where the module does not tell."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return None


def select(argument: str, selection: Selection, modules: Mapping[str, nn.Module]) -> set[str]:
    """The names that the selection matches; each of its items must match one."""
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise ValueError(f"{argument}={selection!r} is no regular expression: {error}") from error
        items: dict[str, Callable[[str], bool]] = {
            _show(selection): lambda name: bool(pattern.fullmatch(name))
        }
    elif isinstance(selection, Sequence):
        items = {_show(item): _matcher(argument, item, modules) for item in selection}
    else:
        raise TypeError(f"{argument} must be a regular expression or a list, not {selection!r}")
    selected: set[str] = set()
    for item, matches in items.items():
        found = {name for name in modules if matches(name)}
        if not found:
            words = re.sub(r"[^\w.]", "", item)
            near = difflib.get_close_matches(words, modules, n=3, cutoff=0.3) or list(modules)[:3]
            raise ValueError(
                f"{argument}: {item} matches no layer; near names: {', '.join(map(repr, near))} "
                "(a string is a regular expression for the full name, a list holds names, suffixes or types)"
            )
        selected |= found
    return selected


def _matcher(argument: str, item: object, modules: Mapping[str, nn.Module]) -> Callable[[str], bool]:
    if isinstance(item, str):
        return lambda name: name == item or name.endswith(f".{item}")
    if isinstance(item, type) and issubclass(item, nn.Module):
        return lambda name: isinstance(modules[name], item)
    raise TypeError(f"{argument} holds {item!r}, which is neither a name nor a module type")


def _show(item: object) -> str:
    return item.__name__ if isinstance(item, type) else repr(item)


def _check_shared(candidates: Mapping[str, tuple[str, nn.Module, str]], chosen: set[str]) -> None:
    """A weight that a chosen layer shares with one that is not chosen could follow neither's wish."""
    weights = {name: module._parameters.get(attribute) for name, (_, module, attribute) in candidates.items()}
    owners = {id(weight): name for name, weight in weights.items() if name in chosen and weight is not None}
    for name, weight in weights.items():
        if name not in chosen and id(weight) in owners:
            raise ValueError(
                f"{owners[id(weight)]!r} and {name!r} share a weight; patch both or exclude both"
            )
