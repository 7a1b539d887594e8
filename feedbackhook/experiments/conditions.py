"""The paper's conditions as names: feedback, concordance, normalisation, update and frozen part.

    NAME   = TERM ("+" TERM)* [" concordance=" NUMBER] [" Top" | " Bottom"]
    TERM   = "SGD" | FEEDBACK | "BN" | "BM" [SETTING]

`SGD` is backprop and plain SGD; FEEDBACK is one of uSF, NuSF, brSF, frSF, RndF; SETTING is that of Batch
Manhattan, 0 to 3, and 1 where it is not given. Every combination is a condition, whether or not the paper has
it. Concordance is the probability of the same sign: 1 minus the paper's p.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from feedbackhook.experiments.config import ConfigError, Frozen, RunConfig
from feedbackhook.names import nearest

Feedback = Literal["uSF", "NuSF", "brSF", "frSF", "RndF"]
_WITH_CONCORDANCE = ("brSF", "frSF")
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
        concordance: the probability, 0 to 1, of the same sign, of brSF and frSF; None is 1, unspoken.
        batch_norm: Batch Normalization. With backprop it has the learnable scale and shift of the paper's
            columns "BN" and "BN+BM", with feedback weights it has none.
        manhattan: the setting of Batch Manhattan, 0 to 3; None is SGD.
        spoken: whether the name gives the setting though it is the default.
        frozen: "Bottom" trains all but the last layer, which stays as it was drawn; "Top" the last alone.
    """

    feedback: Feedback | None = None
    concordance: float | None = None
    batch_norm: bool = False
    manhattan: int | None = None
    spoken: bool = False
    frozen: Frozen | None = None

    @classmethod
    def parse(cls, name: str) -> Condition:
        """The condition of a name.

        Raises:
            ConfigError: the name is none; the message says what is wrong with it.
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
        for word in rest:
            fields |= _word(name, word, fields)
        return cls(**fields)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name, in the order of the paper's columns."""
        update = None
        if self.manhattan is not None:
            update = f"BM{self.manhattan if self.spoken or self.manhattan != 1 else ''}"
        terms = [term for term in (self.feedback, "BN" if self.batch_norm else None, update) if term]
        words = ["+".join(terms) or "SGD"]
        if self.concordance is not None:
            words.append(f"concordance={self.concordance:.15g}")
        return " ".join([*words, self.frozen] if self.frozen else words)

    def configure(self, config: RunConfig) -> RunConfig:
        """Set the feedback, normalization, optimizer and frozen part of this condition in a configuration,
        and sum gradients over the mini-batch.

        Raises:
            ConfigError: the configuration says itself, and otherwise, what the condition decides.
        """
        norm: Literal["none", "paper", "affine"] = "none"
        if self.batch_norm:
            norm = "affine" if self.feedback is None else "paper"
        options = {} if self.concordance is None else {"concordance": self.concordance}
        optimizer = replace(config.optimizer, name="sgd", setting=1)
        if self.manhattan is not None:
            optimizer = replace(config.optimizer, name="batch_manhattan", setting=self.manhattan)
        configured = replace(
            config,
            feedback=replace(config.feedback, mode=self.feedback, options=options),
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
                    f"condition {self.name!r} makes {section}.{key} {decided!r}, and it is given as "
                    f"{given!r}: leave one of them out"
                )
        return configured


def _term(name: str, term: str) -> dict[str, object]:
    if term == "SGD":
        return {}
    if term == "BN":
        return {"batch_norm": True}
    if match := re.fullmatch(r"BM([0-3]?)", term):
        setting = match[1]
        return {"manhattan": int(setting or 1), **({"spoken": True} if setting == "1" else {})}
    if term in get_args(Feedback):
        return {"feedback": term}
    known = ("SGD", *get_args(Feedback), "BN", "BM")
    near = nearest(term, (*known, "BM0", "BM1", "BM2", "BM3")) or "."
    raise ConfigError(
        f"condition {name!r}: {term!r} is no part of a condition{near} One is made of {', '.join(known)} and "
        "BM0 to BM3, joined by +"
    )


def _word(name: str, word: str, fields: dict[str, object]) -> dict[str, object]:
    if word in get_args(Frozen):
        return {"frozen": word}
    key, _, value = word.partition("=")
    if key != "concordance":
        near = nearest(key, ("concordance=", *get_args(Frozen)))
        raise ConfigError(
            f"condition {name!r}: {word!r} is neither concordance=NUMBER nor Top nor Bottom{near}"
        )
    if fields.get("feedback") not in _WITH_CONCORDANCE:
        raise ConfigError(f"condition {name!r}: concordance belongs to {' and '.join(_WITH_CONCORDANCE)}")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ConfigError(f"condition {name!r}: concordance must be a number from 0 to 1, not {value!r}")
    return {"concordance": number}
