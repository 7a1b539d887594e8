"""One look for every picture: a colour and a marker for each rule, three sizes, light and dark.

The colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; since some of them are
alike in grey, each rule has a marker and a dash of its own as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

BACKPROP = "backprop"

Size = Literal["readme", "column", "slide"]


class Look(NamedTuple):
    """How a rule is drawn: a colour, a matplotlib marker, and dashes (on, off, ... in points)."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()


RULES: Mapping[str, Look] = {
    BACKPROP: Look("#8a8a8a", "s"),
    "symmetric": Look("#8a8a8a", "s", (1, 1)),
    "sign": Look("#009e73", "P"),
    "random": Look("#cc79a7", "X", (4, 2)),
    "tensor": Look("#a69b00", "*"),
    "uSF": Look("#0072b2", "v"),
    "NuSF": Look("#56b4e9", "^", (4, 2)),
    "brSF": Look("#d55e00", "D", (4, 2)),
    "frSF": Look("#e69f00", "o"),
    "RndF": Look("#cc79a7", "X"),
}


class _Format(NamedTuple):
    """Of figures that are drawn for one place: how much larger than a README's, and the text in points."""

    scale: float
    text: float


_FORMATS: Mapping[str, _Format] = {
    "readme": _Format(1.0, 11),
    "column": _Format(0.5, 6),  # a figure of 7 inches is 3.5 wide
    "slide": _Format(1.4, 16),
}
_current: ContextVar[tuple[Size, bool]] = ContextVar("size and darkness", default=("readme", False))


def look(rule: str) -> Look:
    """How a rule is drawn; one that is not the library's own as `tensor` is."""
    return RULES.get(rule, RULES["tensor"])


@contextmanager
def use(size: Size = "readme", dark: bool = False) -> Iterator[None]:
    """Figures that are drawn within the block have this size: for a README, a paper's column, a slide."""
    token = _current.set((size, dark))
    try:
        yield
    finally:
        _current.reset(token)


def figsize(width: float, height: float) -> tuple[float, float]:
    """Inches of a figure that in a README is as wide and as high as this."""
    scale = _FORMATS[_current.get()[0]].scale
    return scale * width, scale * height


def sequence(count: int) -> list[tuple[float, float, float]]:
    """Colours from one end of an ordered scale to the other, all of which stand out from the ground."""
    import matplotlib as mpl
    import numpy as np

    first, last = (0.3, 1.0) if _current.get()[1] else (0.0, 0.85)
    return [tuple(colour[:3]) for colour in mpl.colormaps["viridis"](np.linspace(first, last, count))]


def ink() -> str:
    """The colour of text and of lines that values are read against, where :func:`style` is at work."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings of the theme that is in use, within the block."""
    import matplotlib as mpl
    import seaborn as sns

    size, dark = _current.get()
    text = _FORMATS[size].text
    ink, ground, grid = ("#e6e6e6", "#16181c", "#3a3d44") if dark else ("#222222", "white", "#dddddd")
    inks = (
        "text.color",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
        "axes.edgecolor",
    )
    grounds = ("figure.facecolor", "axes.facecolor")
    settings: Any = {
        **dict.fromkeys(inks, ink),
        **dict.fromkeys(grounds, ground),
        "grid.color": grid,
        "font.size": text,
        "axes.labelsize": text,
        "axes.titlesize": 1.15 * text,
        "legend.fontsize": 0.9 * text,
        "legend.title_fontsize": 0.9 * text,
        "xtick.labelsize": 0.9 * text,
        "ytick.labelsize": 0.9 * text,
        "lines.linewidth": text / 7,
        "lines.markersize": text / 2,
    }
    with sns.axes_style("whitegrid"), mpl.rc_context(settings):
        yield
