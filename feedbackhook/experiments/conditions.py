"""Conditions: short names for feedback, its options, normalization, update and frozen part of a run.

    NAME   = TERM ("+" TERM)* (" " OPTION "=" VALUE)* [" Top" | " Bottom"]
    TERM   = "SGD" | FEEDBACK | "BN" | "BM" [SETTING]

`SGD` is backprop with plain SGD; FEEDBACK is a rule made known by :func:`register_feedback`, OPTION one of
its options (`brSF+BN+BM concordance=0.75`, `angle degrees=45`); SETTING is the variant of Batch Manhattan, 0
to 3, by default 1. Every combination is a condition. Gradients are summed over the mini-batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from feedbackhook.experiments.config import ConfigError, Frozen, ProtocolConfig, RunConfig
from feedbackhook.names import nearest
from feedbackhook.rules import make_rule, rule_values

Option = int | float | str | None
"""The value of an option in the name of a condition."""

_FEEDBACK: dict[str, tuple[str, ...]] = {}  # the options that a name may give for each
_PROCEDURES: dict[Condition, list[Procedure]] = {}
_DECIDED = (
    ("feedback", "mode"),
    ("feedback", "options"),
    ("model", "batch_norm"),
    ("model", "frozen"),
    ("optimizer", "name"),
    ("optimizer", "setting"),
    ("protocol", "reduction"),
)


@dataclass(frozen=True)
class Condition:
    """One condition.

    Args:
        feedback: the rule; None is backprop.
        options: those of the rule that the name gives, and their values.
        batch_norm: Batch Normalization, with a learnable scale and shift for backprop, without for feedback
            weights.
        manhattan: the setting of Batch Manhattan, 0 to 3; None is SGD.
        setting_explicit: whether the name gives the setting although it is the default.
        frozen: `Bottom` trains all layers except the last, `Top` only the last.
    """

    feedback: str | None = None
    options: tuple[tuple[str, Option], ...] = ()
    batch_norm: bool = False
    manhattan: int | None = None
    setting_explicit: bool = False
    frozen: Frozen | None = None

    @classmethod
    def parse(cls, name: str) -> Condition:
        """Return the condition with this name.

        Raises:
            ConfigError: the name is not one of a condition; the message says what is wrong with it.
        """
        terms, *rest = name.split() or [""]
        fields: dict[str, object] = {}
        for term in terms.split("+"):
            for key, value in _term(name, term).items():
                if key in fields:
                    raise ConfigError(f"condition {name!r} says twice what {key} is")
                fields[key] = value
        if "SGD" in terms.split("+") and terms != "SGD":
            raise ConfigError(f"condition {name!r}: SGD stands alone")
        rule = str(fields.get("feedback", ""))
        options: dict[str, Option] = {}
        for word in rest:
            key, value = _word(name, word, rule)
            place, what = (options, key) if key else (fields, "frozen")
            if what in place:
                raise ConfigError(f"condition {name!r} says twice what {what} is")
            place[what] = value
        _check_options(name, rule, options)
        given = tuple((key, options[key]) for key in _FEEDBACK.get(rule, ()) if key in options)
        return cls(**fields, options=given)  # type: ignore[arg-type]

    def without(self, option: str) -> Condition:
        """Return the condition whose name does not give this option."""
        return replace(self, options=tuple((key, value) for key, value in self.options if key != option))

    @property
    def name(self) -> str:
        """The name, its terms in the order feedback, BN, BM."""
        update = None
        if self.manhattan is not None:
            update = f"BM{self.manhattan if self.setting_explicit or self.manhattan != 1 else ''}"
        terms = [term for term in (self.feedback, "BN" if self.batch_norm else None, update) if term]
        words = ["+".join(terms) or "SGD"]
        for key, value in self.options:
            words.append(f"{key}={value:.15g}" if isinstance(value, float) else f"{key}={value}")
        return " ".join([*words, self.frozen] if self.frozen else words)

    def configure(self, config: RunConfig) -> RunConfig:
        """Return ``config`` with all that the condition sets: see the module.

        Raises:
            ConfigError: ``config`` itself sets something that the condition sets, to another value.
        """
        norm: Literal["none", "paper", "affine"] = "none"
        if self.batch_norm:
            norm = "affine" if self.feedback is None else "paper"
        optimizer = replace(config.optimizer, name="sgd", setting=1)
        if self.manhattan is not None:
            optimizer = replace(config.optimizer, name="batch_manhattan", setting=self.manhattan)
        configured = replace(
            config,
            feedback=replace(config.feedback, mode=self.feedback, options=dict(self.options)),
            model=replace(config.model, batch_norm=norm, frozen=self.frozen),
            optimizer=optimizer,
            protocol=replace(config.protocol, reduction="sum"),
        )
        for section, key in _DECIDED:
            given, decided, default = (
                getattr(getattr(of, section), key) for of in (config, configured, RunConfig())
            )
            if given not in (decided, default):
                raise ConfigError(
                    f"condition {self.name!r} sets {section}.{key} to {decided!r}, but the configuration "
                    f"sets it to {given!r}: remove one of them"
                )
        return configured


@dataclass(frozen=True)
class Procedure:
    """One way to train the runs of a condition.

    Args:
        name: part of the names of the runs that it trains; empty for the protocol as given.
        batch_sizes: replaces `protocol.batch_sizes`, unless it is empty.
    """

    name: str = ""
    batch_sizes: Mapping[int, int] = field(default_factory=dict)

    def configure(self, protocol: ProtocolConfig) -> ProtocolConfig:
        """Return ``protocol`` with the settings of this procedure."""
        return replace(protocol, batch_sizes=dict(self.batch_sizes)) if self.batch_sizes else protocol

    def has_effect(self, protocol: ProtocolConfig) -> bool:
        """Whether it changes how ``protocol`` trains: it sets no batch sizes itself, and is long enough."""
        return not protocol.batch_sizes and all(epoch < protocol.epochs for epoch in self.batch_sizes)


def register_feedback(rule: str, *options: str) -> None:
    """Make a rule known as a term of the names of conditions.

    Args:
        rule: a mode of :func:`feedbackhook.patch`.
        options: those of its options that the name of a condition may give.
    """
    _FEEDBACK[rule] = options


def register_procedure(condition: str, procedure: Procedure) -> None:
    """Train the runs of ``condition`` in sweeps by ``procedure`` as well as by the protocol as given.

    Raises:
        ConfigError: there is no such condition.
    """
    registered = _PROCEDURES.setdefault(_plain(condition), [])
    if procedure not in registered:
        registered.append(procedure)


def procedures(condition: str | None, protocol: ProtocolConfig) -> list[Procedure]:
    """Return the ways in which a sweep trains the runs of ``condition``, the protocol as given first.

    Raises:
        ConfigError: there is no such condition.
    """
    more = [] if condition is None else _PROCEDURES.get(_plain(condition), [])
    return [Procedure(), *(procedure for procedure in more if procedure.has_effect(protocol))]


def _plain(name: str) -> Condition:
    """The condition, whether or not its name gives the default setting of Batch Manhattan."""
    return replace(Condition.parse(name), setting_explicit=False)


def _term(name: str, term: str) -> dict[str, object]:
    if term == "SGD":
        return {}
    if term == "BN":
        return {"batch_norm": True}
    if match := re.fullmatch(r"BM([0-3]?)", term):
        setting = match[1]
        return {"manhattan": int(setting or 1), **({"setting_explicit": True} if setting == "1" else {})}
    if term in _FEEDBACK:
        return {"feedback": term}
    known = ("SGD", *_FEEDBACK, "BN", "BM")
    near = nearest(term, (*known, "BM0", "BM1", "BM2", "BM3")) or "."
    raise ConfigError(
        f"condition {name!r}: {term!r} is not a term of a condition{near} The terms are {', '.join(known)} "
        "and BM0 to BM3, joined by +"
    )


def _word(name: str, word: str, rule: str) -> tuple[str, Option]:
    """Return an option and its value; the frozen part has no option's name."""
    if word in get_args(Frozen):
        return "", word
    key, is_given, text = word.partition("=")
    taken = _FEEDBACK.get(rule, ())
    if not is_given or key not in taken:
        takers = [other for other, options in _FEEDBACK.items() if key in options]
        if is_given and takers:
            who = f"{', '.join(takers[:-1])} and {takers[-1]} take" if takers[1:] else f"{takers[0]} takes"
            raise ConfigError(f"condition {name!r}: only {who} the option {key}: remove it")
        words = [*(f"{option}=VALUE" for option in taken), *get_args(Frozen)]
        near = nearest(key, [*(f"{option}=" for option in taken), *get_args(Frozen)])
        raise ConfigError(f"condition {name!r}: {word!r} is not {', '.join(words[:-1])} or {words[-1]}{near}")
    return key, _value(text)


def _value(text: str) -> Option:
    """Return what a word of a name stands for: a number, True, False, None, or itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"None": None, "True": True, "False": False}.get(text, text)


def _check_options(name: str, rule: str, options: dict[str, Option]) -> None:
    """Raise a ConfigError if the rule does not take these values. A whole number becomes a float where the
    rule's default is one."""
    if not options:
        return
    try:
        defaults = rule_values(make_rule(rule, {}))
        for key, value in options.items():
            if isinstance(value, int) and isinstance(defaults.get(key), float):
                options[key] = float(value)
        make_rule(rule, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"condition {name!r}: {error}") from error
