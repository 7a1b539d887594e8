"""Checks of a rule's options."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal, get_args

Magnitude = Literal["random", "uniform", "weight"]
Redraw = Literal["never", "update"]
Scale = Literal["norm", "fan_in"]


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Check that an option is a finite number within limits.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not low <= float(value) <= high or math.isinf(value):
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"finite and at least {low:g}"
        raise ValueError(f"{name} must be {limits}, not {value!r}")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Check that an option is a whole number within limits.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if int(value) < low or (high is not None and int(value) > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, not {value!r}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that an option is one of the values of a `Literal` type.

    Raises:
        ValueError: it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}")
