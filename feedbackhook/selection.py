"""Choose the layers to patch: `include`, `exclude`, and the classifier."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from feedbackhook.core.discovery import (
    KINDS,
    LayerInfo,
    Place,
    Target,
    describe_layer,
    find_layers,
    is_fused,
    kind_of,
)

Selection: TypeAlias = str | Sequence[str | type[nn.Module]]


class _FullName(str):
    """The full name of a layer, which in a list does not select layers that only end with it."""

    __slots__ = ()


def find_targets(
    model: nn.Module,
    include: Selection | None = None,
    exclude: Selection | None = None,
    patterns: Iterable[str] | None = None,
) -> list[Target]:
    """Return the layers of `model` to patch.

    These are the layers that `include` selects (None selects all), without those that `exclude` selects.
    If `patterns` is given (the keys of a mapping of modes), the full name must also match one of them.

    A string is a regular expression that must match the full name. A list holds full names, name suffixes
    (`"fc"` also selects `"block.fc"`) or module types. `exclude` wins over `include`; [] excludes nothing.

    Raises:
        ValueError: there is nothing to patch, a selection has no effect, or a patched layer would share its
            weight with one that is not patched.
        TypeError: a fused recurrent layer is selected, or a selection has the wrong type.
    """
    candidates = find_layers(model)
    if not candidates:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{type(model).__name__} has nothing to patch: it has no layer of the kinds {kinds}")
    modules = {name: place.module for name, place in candidates.items()}
    included = set(modules) if include is None else select("include", include, modules)
    excluded = set() if exclude is None else select("exclude", exclude, modules)
    if exclude not in (None, [], ()) and not excluded & included:
        raise ValueError(f"exclude={_show(exclude)} has no effect: it matches no layer that include selects")
    chosen = [name for name in modules if name in included and name not in excluded]
    if patterns is not None:
        matched = set[str]().union(*(select("mode", pattern, modules) for pattern in patterns))
        chosen = [name for name in chosen if name in matched]
    if not chosen:
        given = {"include": include, "exclude": exclude, "mode": patterns}
        shown = ", ".join(f"{name}={_show(value)}" for name, value in given.items() if value is not None)
        raise ValueError(f"no layer is left to patch with {shown}")
    _check_fused(modules, chosen)
    check_shared(candidates, set(chosen))
    return [Target(candidates[name], describe_layer(name, candidates[name])) for name in chosen]


def find_sites(model: nn.Module, sites: str | Sequence[str]) -> dict[LayerInfo, nn.Module]:
    """Return the modules that `sites` selects, without those that lie inside another one.

    Args:
        model: the model.
        sites: as `include`, but for all modules below the model itself.

    Raises:
        ValueError: `sites` matches nothing, or a module that is never called.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    chosen = select("sites", sites, modules)
    outermost = [
        name
        for name in modules
        if name in chosen and not any(name.startswith(f"{other}.") for other in chosen)
    ]
    for name in outermost:
        if type(modules[name]).forward is nn.Module.forward:  # it has none of its own
            raise ValueError(
                f"sites={_show(sites)} selects {name!r}, a {type(modules[name]).__name__}, which is never "
                f"called; select the modules in it, as in sites={re.escape(name) + '[.][^.]*'!r}"
            )
    return {LayerInfo(name, type(modules[name]).__name__, (), 0): modules[name] for name in outermost}


def classifier(model: nn.Module) -> list[str]:
    """Return the full names of the layers that compute the class scores, for `exclude` (or `include`).

    As an item of a list, such a name selects its layer alone, and no other whose name ends with it.
    These are the layers inside `model.get_classifier()` if the model has that method, as timm's models do.
    Otherwise it is the last layer that can be patched, in the order in which modules are registered.

    Raises:
        ValueError: there is no such layer.
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
    return [_FullName(name) for name in found]


def select(argument: str, selection: Selection, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names that the selection matches.

    Raises:
        ValueError: an item of the selection matches nothing, or is not a regular expression.
        TypeError: the selection has the wrong type.
    """
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise ValueError(f"{argument}={selection!r} is not a regular expression: {error}") from error
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
                f"{argument}: {item} matches no layer; similar names: {', '.join(map(repr, near))} "
                "(a string is a regular expression for the full name, a list holds names, suffixes or types)"
            )
        selected |= found
    return selected


def _matcher(argument: str, item: object, modules: Mapping[str, nn.Module]) -> Callable[[str], bool]:
    if isinstance(item, _FullName):
        return lambda name: name == item
    if isinstance(item, str):
        return lambda name: name == item or name.endswith(f".{item}")
    if isinstance(item, type) and issubclass(item, nn.Module):
        return lambda name: isinstance(modules[name], item)
    raise TypeError(f"{argument} must hold names or module types, but it holds {item!r}")


def _show(item: object) -> str:
    return item.__name__ if isinstance(item, type) else repr(item)


def _check_fused(modules: Mapping[str, nn.Module], chosen: Iterable[str]) -> None:
    for name in chosen:
        if is_fused(modules[name]):
            raise TypeError(
                f"{type(modules[name]).__name__} {name!r} computes in one fused call, so its error signals "
                f"cannot be rerouted; pass exclude=[{name!r}] to leave it with exact backprop"
            )


def check_shared(candidates: Mapping[str, Place], chosen: set[str]) -> None:
    """Refuse a weight shared by a chosen layer and one that is not chosen.

    Raises:
        ValueError: there is one.
    """
    weights = {name: place.parameter() for name, place in candidates.items()}
    owners = {id(weight): name for name, weight in weights.items() if name in chosen and weight is not None}
    for name, weight in weights.items():
        if name not in chosen and id(weight) in owners:
            raise ValueError(
                f"{owners[id(weight)]!r} and {name!r} share a weight; patch both or exclude both"
            )
