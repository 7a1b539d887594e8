"""Change the rules of a patch during training, and store and restore what determines V and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from feedbackhook.core.feedback import Feedback, Rule
from feedbackhook.core.layer import Layer
from feedbackhook.core.learning import learns
from feedbackhook.core.projection import Projection
from feedbackhook.core.state import PatchState
from feedbackhook.rules import (
    AnyRule,
    changed,
    check_layers,
    follow,
    is_direct,
    make_rule,
    modes_of,
    restored,
    rule_name,
    rule_values,
)
from feedbackhook.selection import select


def set_options(state: PatchState, options: Mapping[str, Any]) -> None:
    """Change options of all rules that have them, see `Patch.set`."""
    patched = state.patched
    having = [each for each in patched if options.keys() <= rule_values(each.feedback.rule).keys()]
    old = {id(each.feedback.rule): each.feedback.rule for each in having or patched}
    new = {key: changed(rule, options) for key, rule in old.items()}
    rules = [new[id(each.feedback.rule)] for each in having]
    check_layers((each.info, rule) for each, rule in zip(having, rules, strict=True))
    for each, rule in zip(having, rules, strict=True):
        follow(each.feedback, rule)
    for each in having:
        each.draw()


def set_modes(state: PatchState, mode: str | Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Give layers other rules, see `Patch.set`."""
    if not isinstance(mode, Mapping):
        rule = make_rule(mode, options)
        set_rules(state, dict.fromkeys(state.layers, rule))
        return
    names = {name: layer for layer in state.layers for name in layer.names}
    modules = {name: layer.module for name, layer in names.items()}
    rules: dict[Layer, AnyRule] = {}
    for pattern, rule in modes_of(mode, options):
        for name in select("mode", pattern, modules):
            rules.setdefault(names[name], rule)
    set_rules(state, rules)


def set_rules(state: PatchState, rules: Mapping[Layer, AnyRule]) -> None:
    """Give layers other rules. What a layer has learned stays if its rule's class does.

    Raises:
        ValueError: a rule is direct, or the layer follows a direct one; or it does not fit.
        TypeError: the feedback of a layer cannot learn. Nothing is changed.
    """
    if state.sites or any(is_direct(rule) or isinstance(x.feedback, Projection) for x, rule in rules.items()):
        raise ValueError(
            "direct rules cannot be set or replaced while the model is patched: remove the patch, then patch "
            "again"
        )
    check_layers((layer.info, rule) for layer, rule in rules.items())
    before = {layer: layer.feedback for layer in rules}
    try:
        for layer, rule in rules.items():
            old = cast(Feedback, layer.feedback)
            layer.feedback = old.like(cast(Rule, rule), old.seed, old.draws, old.layer.name)
            layer.try_feedback()
            layer.draw()
    except Exception:
        for layer, feedback in before.items():
            layer.feedback = feedback
        raise


def frozen_rules(state: PatchState) -> dict[Layer, AnyRule]:
    """Return for each layer that learns the rule that keeps its V as it is now."""
    learning = [
        layer
        for layer in state.layers
        if learns(layer.feedback.rule) and isinstance(layer.feedback, Feedback)
    ]
    tensors: dict[str, Tensor] = {
        layer.info.name: cast(Feedback, layer.feedback)(layer.weight()).clone() for layer in learning
    }
    return dict.fromkeys(learning, make_rule("tensor", {"feedback": tensors}))


def state_of(state: PatchState) -> dict[str, dict[str, Any]]:
    """Return what determines V or B, by layer, see `Patch.state_dict`."""
    rows = {}
    for each in state.patched:
        feedback = each.feedback
        rows[each.info.name] = {
            "mode": rule_name(feedback.rule),
            "options": rule_values(feedback.rule),
            "seed": feedback.seed,
            "draws": feedback.draws,
            "drawn_as": feedback.layer.name,  # differs from the name after weights were untied
        }
        if feedback.learned:
            learned = {name: parameter.detach() for name, parameter in feedback.learned.items()}
            rows[each.info.name]["learned"] = learned
        if feedback.learned and isinstance(feedback, Feedback):
            rows[each.info.name] |= {"updates": feedback.updates, "mirrored": feedback.mirrored}
    return rows


def load_state(state: PatchState, saved: Mapping[str, Any]) -> None:
    """Restore what `state_of` returned, see `Patch.load_state_dict`."""
    own = {each.info.name: each for each in state.patched}
    if own.keys() != saved.keys():
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise ValueError(f"the state lacks the layers {missing} and has the unknown layers {unknown}")
    feedbacks = {}
    for name, row in saved.items():
        rule = make_rule(row["mode"], row["options"])
        if not is_direct(rule) and learns(rule) and "learned" not in row:
            raise ValueError(f"the state has {row['mode']!r} for {name!r}, but not what it has learned")
        feedbacks[name] = restored(own[name].feedback, rule, row["seed"], row["draws"], row.get("drawn_as"))
    for name, feedback in feedbacks.items():
        own[name].feedback = feedback
        if "learned" not in (row := saved[name]):
            continue
        if isinstance(feedback, Feedback):
            feedback.restore(row["learned"], row["updates"], row["mirrored"])
        else:
            feedback.restore(row["learned"])
    for each in state.patched:
        each.draw()
