"""The registry of feedback rules: register, look up, describe and change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar, cast, get_args

from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.feedback import Feedback, Rule
from feedbackhook.core.learning import LearnsFrom
from feedbackhook.core.projection import DirectRule, Projection
from feedbackhook.names import nearest

RuleClass = TypeVar("RuleClass", bound=type)

AnyRule: TypeAlias = Rule | DirectRule

RULES: dict[str, type] = {}
"""The class of each registered rule, by mode."""


def register_rule(name: str) -> Callable[[RuleClass], RuleClass]:
    """Register the decorated class as the rule for `feedbackhook.patch(model, mode=name)`.

    Raises:
        TypeError: the class is not a frozen dataclass, or lacks `draw` or `feedback` (a direct rule: `signal`
            instead, and the options `sites`, `output` and `shared`; a rule that learns: `initial` and
            `local_gradient` instead of `draw`, and `learns_from`).
        ValueError: another rule has this name.
    """

    def register(cls: RuleClass) -> RuleClass:
        if not (dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen):  # noqa: B009
            raise TypeError(f"rule {name!r}: {cls.__name__} must be a @dataclass(frozen=True) of its options")
        direct = callable(getattr(cls, "signal", None))
        learning = callable(getattr(cls, "initial", None)) and not direct
        methods = ["draw", "signal" if direct else "feedback"]
        if learning:
            mirror = getattr(cls, "learns_from", None) == "noise"
            methods[:1] = ["initial", "mirror" if mirror else "local_gradient"]
        missing = [method for method in methods if not callable(getattr(cls, method, None))]
        if learning and getattr(cls, "learns_from", None) not in get_args(LearnsFrom):
            choices = ", ".join(map(repr, get_args(LearnsFrom)))
            missing.append(f"learns_from, a class attribute that is one of {choices}")
        if direct:
            missing += [option for option in FIXED if option not in _options(cls)]
        if missing:
            raise TypeError(f"rule {name!r}: {cls.__name__} lacks {' and '.join(missing)}")
        known = RULES.get(name)
        if known is not None and not _same_class(known, cls):
            raise ValueError(f"rule {name!r} is taken by {known.__module__}.{known.__qualname__}")
        RULES[name] = cls
        return cls

    return register


FIXED = ("sites", "output", "shared")
"""The options of direct rules that say where the error comes from and where it goes. They cannot change while
the model is patched."""


def fixed_options(rule: AnyRule) -> Sequence[str]:
    """Return the options that cannot change while the model is patched: those of direct rules, and those that
    the shapes of learned tensors follow from."""
    return (*(FIXED if is_direct(rule) else ()), *getattr(rule, "fixed", ()))


def is_direct(rule: AnyRule | type) -> TypeGuard[DirectRule]:
    """Whether a rule, or a class of rules, sends the error at the network's output to each site."""
    return callable(getattr(rule, "signal", None))


def make_rule(mode: str, options: Mapping[str, Any]) -> AnyRule:
    """Return the rule named `mode` with these options.

    Raises:
        ValueError: the mode is unknown, or an option is out of range.
        TypeError: the rule has no such option, or an option has the wrong type.
    """
    if not isinstance(mode, str):
        raise TypeError(f"mode must be the name of a rule, not {mode!r}; known: {', '.join(RULES)}")
    if mode not in RULES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(RULES)}{nearest(mode, RULES)}")
    cls = RULES[mode]
    return cast(AnyRule, cls(**_as_fields(mode, cls, options)))


def modes_of(
    mode: Mapping[str, str | Mapping[str, Any]], options: Mapping[str, Any]
) -> Iterator[tuple[str, AnyRule]]:
    """Yield each pattern of a mapping of modes with its rule.

    Args:
        mode: from patterns to modes, or to dicts of `mode` and its options.
        options: options next to the mapping, which belong to no rule.

    Raises:
        ValueError: the mapping is empty, or a mode is unknown.
        TypeError: there are options next to the mapping, or an entry has the wrong form.
    """
    if not mode:
        raise ValueError("the mapping of modes is empty")
    if options:
        raise TypeError(
            f"options next to a mapping of modes ({', '.join(options)}) belong to no rule; "
            "write them as {pattern: dict(mode=..., option=...)}"
        )
    for pattern, entry in mode.items():
        if not isinstance(entry, (str, Mapping)):
            raise TypeError(f"mode[{pattern!r}] must be a mode or a dict of mode and options, not {entry!r}")
        given = {"mode": entry} if isinstance(entry, str) else dict(entry)
        if "mode" not in given:
            raise TypeError(f"mode[{pattern!r}] lacks the key 'mode'")
        yield pattern, make_rule(given.pop("mode"), given)


def rule_name(rule: AnyRule) -> str:
    """Return the mode under which the rule's class is registered."""
    return next(name for name, cls in RULES.items() if _same_class(cls, type(rule)))


def rule_values(rule: AnyRule) -> dict[str, Any]:
    """Return the rule's options: `make_rule(rule_name(rule), rule_values(rule))` equals the rule."""
    return {option: getattr(rule, f.name) for option, f in _options(type(rule)).items()}


def describe(rule: AnyRule, leave_out: Collection[str] = ()) -> str:
    """Return the rule as a user would write it, with the options that differ from their defaults, except for
    those to leave out."""
    fields = _options(type(rule))
    shown = [
        f"{option}=..." if isinstance(value, Mapping) else f"{option}={value!r}"
        for option, value in rule_values(rule).items()
        if option not in leave_out
        if fields[option].default is dataclasses.MISSING or value != fields[option].default
    ]
    return rule_name(rule) + (f"({', '.join(shown)})" if shown else "")


def changed(rule: AnyRule, options: Mapping[str, Any]) -> AnyRule:
    """Return a copy of the rule with some options changed.

    Raises:
        ValueError: an option cannot change while the model is patched, and the errors of `make_rule`.
        TypeError: the errors of `make_rule`.
    """
    values = rule_values(rule)
    if fixed := [name for name in fixed_options(rule) if name in options]:
        raise ValueError(
            f"{', '.join(fixed)} cannot change while the model is patched: remove the patch, then patch again"
        )
    return make_rule(rule_name(rule), {**values, **options})


def follow(feedback: Feedback | Projection, rule: AnyRule) -> None:
    """Change the rule of a feedback to one of the same kind."""
    if isinstance(feedback, Projection):
        assert is_direct(rule)
        feedback.follow(rule)
    else:
        feedback.follow(cast(Rule, rule))


def restored(
    feedback: Feedback | Projection, rule: AnyRule, seed: int, draws: int, drawn_as: str | None
) -> Feedback | Projection:
    """Return a feedback of the same layer or site with a stored rule, seed, draw count and name.

    Raises:
        ValueError: the stored rule is of another kind, or differs in an option that cannot change.
    """
    own = feedback.rule
    if is_direct(own) != is_direct(rule) or any(
        getattr(own, option, None) != getattr(rule, option, None) for option in FIXED if is_direct(own)
    ):
        raise ValueError(
            f"the state has {describe(rule)} where the patch has {describe(own)}; patch with the state's rule"
        )
    if isinstance(feedback, Projection):
        assert is_direct(rule)
        return feedback.like(rule, seed, draws, drawn_as)
    return feedback.like(cast(Rule, rule), seed, draws, drawn_as)


def check_layers(rules: Iterable[tuple[LayerInfo, AnyRule]]) -> None:
    """Let each rule that has a `check` method check the layers that follow it.

    Raises:
        ValueError: a rule does not fit its layers.
    """
    followers: dict[int, tuple[AnyRule, list[LayerInfo]]] = {}
    for info, rule in rules:
        followers.setdefault(id(rule), (rule, []))[1].append(info)
    for rule, infos in followers.values():
        if callable(check := getattr(rule, "check", None)):
            check(infos)


def exact_classifier(rule: AnyRule) -> bool:
    """Whether the rule leaves the classifier exact, unless `exclude` says which layers are."""
    return bool(getattr(rule, "exact_classifier", False))


def expected_angle(rule: AnyRule, weight: Tensor) -> float | None:
    """Return the angle between V and W, in degrees, that follows from the rule's definition, or None if the
    rule does not define one."""
    of = getattr(rule, "expected_angle", None)
    return None if of is None else float(of(weight))


def _same_class(a: type, b: type) -> bool:
    """Whether two classes come from one definition, which a notebook may have run twice."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _options(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Return a rule's fields, by the names that they have as options."""
    return {f.metadata.get("option", f.name): f for f in dataclasses.fields(cls) if f.init}


def _as_fields(mode: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = _options(cls)
    unknown = [name for name in options if name not in fields]
    if unknown:
        has = f"it has {', '.join(fields)}{nearest(unknown[0], fields)}" if fields else "it has none"
        raise TypeError(f"mode {mode!r} has no option {', '.join(map(repr, unknown))}; {has}")
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise TypeError(f"mode {mode!r} needs the option {', '.join(map(repr, missing))}")
    return {fields[name].name: value for name, value in options.items()}
