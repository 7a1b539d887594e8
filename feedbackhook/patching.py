"""Patch a model, find its patch, and remove it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from feedbackhook.core.discovery import LayerInfo, Target
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.interception import Interceptor
from feedbackhook.core.layer import Layer, ModuleSite, Patched
from feedbackhook.core.marks import mark_of
from feedbackhook.core.projection import DirectRule, Projection
from feedbackhook.handle import Patch
from feedbackhook.names import nearest
from feedbackhook.rules import (
    AnyRule,
    Rule,
    check_layers,
    exact_classifier,
    is_direct,
    make_rule,
    modes_of,
    rule_name,
)
from feedbackhook.selection import Selection, check_shared, classifier, find_sites, find_targets, select

Mode = str | Mapping[str, str | Mapping[str, Any]]


def patch(
    model: nn.Module,
    mode: Mode = "sign",
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    seed: int = 0,
    recompute: bool = False,
    fused: bool = False,
    **options: Any,
) -> Patch:
    """Patch `model` in place: from now on its error signals go through feedback weights V instead of W.

    Forward outputs, parameters and `state_dict` keys stay as they are. So do a layer's weight and bias
    gradients, given the error signal that reaches it. By default every `nn.Linear`, `nn.Conv1d/2d/3d`,
    `nn.ConvTranspose1d/2d/3d` and `nn.MultiheadAttention` is patched, including the classifier.

    Args:
        model: any module.
        mode: the name of a rule: "symmetric", "sign", "random", "tensor", "uSF", "NuSF", "brSF", "frSF",
            "RndF", "FA", "uSF-SN", "uSF-init", "sign-symmetry", "angle", "noise", "sparse", "quantized",
            "low_rank", "toeplitz", "svd", "DFA", "sDFA", "DRTP"; one that learns (`Patch.parameters`): "KP",
            "WM", "information", "symmetric-alignment", "activation-alignment", "PFA", "PFA-o", "LDFA", "DKP";
            or a registered one. Or a mapping from regular expressions for full names to modes (or to dicts of
            mode and options); the first match wins, and other layers stay exact.
        include: layers to patch; None is all. A string is a regular expression for the full name, a list
            holds full names, name suffixes or module types.
        exclude: layers to leave exact, in the same form; it wins over `include`. None: what the rule leaves
            exact, the classifier for "sign-symmetry" and nothing for the others; [] is nothing.
        seed: all random parts of V follow from it and the layers' names.
        recompute: draw the random parts again for each error signal instead of keeping them, which takes as
            much memory as W (direct rules: see `print(patch)`). V is the same; steps take longer.
        fused: draw with one kernel, which torch.compile makes (on CPUs with a C++ compiler). V is the same.
        options: the rule's options, such as `concordance=0.8`; not allowed with a mapping.

    Returns:
        The handle: a context manager with `remove()`, `enabled`, `set()`, `layers` and more.

    Raises:
        ValueError: an unknown mode; an option out of range; a selection without effect; nothing to patch; or
            the model or a part of it is patched already.
        TypeError: the rule has no such option; an option has the wrong type; or a fused recurrent layer or a
            complex weight is selected. The model stays as it was after any error.
    """
    _check_arguments(model, seed)
    _refuse_second_patch(model)
    make = _Feedbacks(int(seed), recompute, fused)
    if sites := _sites(model, mode, options, make):
        _refuse_selection(include, exclude)
    layers = [] if sites else _layers(_chosen(model, mode, options, include, exclude), make)
    check_layers((layer.info, layer.feedback.rule) for layer in layers)
    for layer in layers:
        layer.try_feedback()  # any problem must show before anything is attached
    interceptor = Interceptor(model, layers, sites, _output(model, [*layers, *sites]))
    handle = Patch(interceptor)
    interceptor.attach(handle)
    return handle


def get_patch(model: nn.Module) -> Patch | None:
    """Return the patch on `model`, on a part of it, or on a model that it is part of; None if there is none.

    Raises:
        ValueError: parts of it have different patches.
    """
    patches = _patches(model)
    if len(patches) > 1:
        raise ValueError(
            f"parts of this {type(model).__name__} have {len(patches)} different patches; ask for the patch "
            "of one part, or remove all with feedbackhook.unpatch(model)"
        )
    return patches[0][1] if patches else None


def unpatch(model: nn.Module) -> None:
    """Remove every patch on `model`, on parts of it, and on a model that it is part of.

    Raises:
        ValueError: there is none.
    """
    patches = _patches(model)
    if not patches:
        raise ValueError(f"this {type(model).__name__} is not patched")
    for _, handle in patches:
        handle.remove()


def _patches(model: nn.Module) -> list[tuple[str, Patch]]:
    """Return each patch in the tree, with the name of the first module that carries it."""
    found: dict[int, tuple[str, Patch]] = {}
    for name, module in model.named_modules():
        mark = mark_of(module)
        if mark is not None and (owner := mark.link.owner) is not None:
            found.setdefault(id(owner), (name, owner.patch))
    return list(found.values())


def _check_arguments(model: nn.Module, seed: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):  # numpy's integers have it too
        raise TypeError(f"seed must be an int, not {seed!r}")


def _refuse_second_patch(model: nn.Module) -> None:
    for name, existing in _patches(model):
        where = f"its part {name!r}" if name else "it"
        if (inside := existing.name_of(model)) and not name:
            where = f"it, {inside!r} of a {type(existing.model).__name__},"
        raise ValueError(
            f"cannot patch this {type(model).__name__}: {where} is patched already; "
            "feedbackhook.get_patch(model) returns that patch, feedbackhook.unpatch(model) removes it"
        )


def _rules(
    model: nn.Module,
    mode: Mode,
    options: Mapping[str, Any],
    include: Selection | None,
    exclude: Selection | None,
) -> list[tuple[Target, AnyRule]]:
    """Return the layers to patch, each with its rule."""
    if not isinstance(mode, Mapping):
        targets = find_targets(model, include, exclude)
        rule = make_rule(mode, options)
        return [(target, rule) for target in targets]
    by_pattern = list(modes_of(mode, options))
    targets = find_targets(model, include, exclude, list(mode))
    modules = {target.info.name: target.place.module for target in targets}
    rules: dict[str, AnyRule] = {}
    for pattern, rule in by_pattern:
        if is_direct(rule) and rule.sites is not None:
            raise ValueError("a mapping of modes chooses layers; sites= needs a single mode for the model")
        rules = {**dict.fromkeys(select("mode", pattern, modules), rule), **rules}
    return [(target, rules[target.info.name]) for target in targets]


def _chosen(
    model: nn.Module,
    mode: Mode,
    options: Mapping[str, Any],
    include: Selection | None,
    exclude: Selection | None,
) -> list[tuple[Target, AnyRule]]:
    """Return the rule of each layer to patch, without those that their rules leave exact by default."""
    rules = _rules(model, mode, options, include, exclude)
    if exclude is None and (names := _exact_by_default(model, rules)):
        rules, places = (
            [(target, rule) for target, rule in rules if target.info.name not in names],
            {target.info.name: target.place for target, _ in rules},
        )
        check_shared(places, {target.info.name for target, _ in rules})
    return rules


def _exact_by_default(model: nn.Module, rules: list[tuple[Target, AnyRule]]) -> list[str]:
    """Return the layers that their rules leave exact.

    Raises:
        ValueError: the model has no classifier, or no other layer.
    """
    leaving = {target.info.name: rule_name(rule) for target, rule in rules if exact_classifier(rule)}
    if not leaving:
        return []
    mode = next(iter(leaving.values()))
    hint = "pass exclude=[] to patch every layer"
    try:
        names = [name for name in classifier(model) if name in leaving]
    except ValueError as error:
        raise ValueError(f"mode {mode!r} leaves the classifier exact, but {error}; {hint}") from error
    if len(names) == len(rules):
        shown = ", ".join(map(repr, names))
        raise ValueError(
            f"no layer is left to patch: mode {mode!r} leaves the classifier exact ({shown}); {hint}"
        )
    return names


class _Feedbacks:
    """Makes the feedback of each layer and site."""

    def __init__(self, seed: int, recompute: bool, fused: bool) -> None:
        self._how = seed, 0, recompute, fused
        self._shared: dict[int, tuple[object, Tensor]] = {}

    def of(self, rule: AnyRule, info: LayerInfo) -> Feedback | Projection:
        """Return the feedback of a layer."""
        if is_direct(rule):
            return self.direct(rule, info)
        return Feedback(cast(Rule, rule), info, *self._how)

    def direct(self, rule: DirectRule, info: LayerInfo) -> Projection:
        """Return the projection of a site."""
        return Projection(rule, info, *self._how, self._shared if rule.shared else None)


def _refuse_selection(include: Selection | None, exclude: Selection | None) -> None:
    if include is not None or exclude is not None:
        raise TypeError("include and exclude choose layers; with sites=, sites alone chooses the modules")


def _sites(model: nn.Module, mode: Mode, options: Mapping[str, Any], make: _Feedbacks) -> list[ModuleSite]:
    """Return the sites at the inputs of modules, if the rule asks for them."""
    if isinstance(mode, Mapping):
        return []
    rule = make_rule(mode, options)
    if not is_direct(rule) or rule.sites is None:
        return []
    return [
        ModuleSite(info, module, make.direct(rule, info))
        for info, module in find_sites(model, rule.sites).items()
    ]


def _output(model: nn.Module, patched: list[Patched]) -> str | None:
    """Return the name of the module whose output's gradient direct rules send; None if no rule is direct.

    Raises:
        ValueError: there is no such module, or rules take it from different ones.
    """
    rules = [each.feedback.rule for each in patched if isinstance(each.feedback, Projection)]
    names = {rule.output or "" for rule in rules}
    if len(names) > 1:
        raise ValueError(
            f"direct rules of one patch take the error from one output, not from {sorted(names)}"
        )
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"output={name!r} names no module of {type(model).__name__}{nearest(name, modules)}"
            )
    return names.pop() if names else None


def _layers(rules: list[tuple[Target, AnyRule]], make: _Feedbacks) -> list[Layer]:
    """Return a layer for each target. Targets that hold the same parameter as their weight share a layer.

    Raises:
        ValueError: such targets have different rules.
    """
    by_weight: dict[int, Layer] = {}
    layers = []
    for target, rule in rules:
        weight = target.place.parameter()
        layer = by_weight.get(id(weight)) if weight is not None else None
        if layer is None:
            layer = Layer([target], make.of(rule, target.info))
            layers.append(layer)
            if weight is not None:
                by_weight[id(weight)] = layer
        elif layer.feedback.rule is rule:
            layer.targets.append(target)
        else:
            raise ValueError(
                f"{layer.info.name!r} and {target.info.name!r} share a weight; give them the same rule"
            )
    return layers
