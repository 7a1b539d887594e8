"""One look for all figures: a color and a marker for each rule, three sizes, light and dark.

The colors are those of Okabe and Ito (2008), which color-blind readers can tell apart. Since some of them
look alike in gray, each rule also has its own marker or dash.
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
    """How a rule is drawn: a color, a matplotlib marker, and dashes (on, off, ... in points)."""

    color: str
    marker: str
    dashes: tuple[float, ...] = ()


RULES: Mapping[str, Look] = {
    BACKPROP: Look("#8a8a8a", "s"),
    "symmetric": Look("#8a8a8a", "^", (1, 1)),
    "sign": Look("#009e73", "P"),
    "random": Look("#cc79a7", "<", (4, 2)),
    "tensor": Look("#a69b00", "*"),
    "uSF": Look("#0072b2", "v"),
    "NuSF": Look("#56b4e9", "^", (4, 2)),
    "brSF": Look("#d55e00", "D", (4, 2)),
    "frSF": Look("#e69f00", "o"),
    "RndF": Look("#cc79a7", "X"),
    "DFA": Look("#8c6ce0", "p"),
    "sDFA": Look("#8c6ce0", "X", (4, 2)),
    "DRTP": Look("#b0624a", "d"),
    "FA": Look("#56b4e9", "h"),
    "uSF-SN": Look("#0072b2", "<", (6, 2, 1, 2)),
    "uSF-init": Look("#56b4e9", ">", (1, 1)),
    "sign-symmetry": Look("#009e73", "d", (4, 2)),
    "angle": Look("#e69f00", "^", (4, 2)),
    "noise": Look("#a69b00", "v", (1, 1)),
    "sparse": Look("#d55e00", "o", (6, 2, 1, 2)),
    "quantized": Look("#009e73", "8", (6, 2, 1, 2)),
    "low_rank": Look("#cc79a7", "D", (8, 2, 1, 2, 1, 2)),
    "toeplitz": Look("#cc79a7", "P", (6, 2, 1, 2)),
    "svd": Look("#0072b2", "*", (4, 2)),
    "KP": Look("#3c7306", "d", (1, 1)),
    "WM": Look("#e60be6", "^", (6, 2, 1, 2)),
    "information": Look("#0abf37", "D", (8, 2, 1, 2, 1, 2)),
    "symmetric-alignment": Look("#0b42e6", "s"),
    "activation-alignment": Look("#e60b42", "*", (8, 2, 1, 2, 1, 2)),
    "PFA": Look("#e645bd", "d", (1, 1)),
    "PFA-o": Look("#bf0a64", "<", (2, 2)),
    "DKP": Look("#733f66", "s", (1, 1)),
    "LDFA": Look("#735f22", "X", (6, 2, 1, 2)),
}


class _Format(NamedTuple):
    """Format of figures for one place: scale, relative to a README, and text size in points."""

    scale: float
    text: float


_FORMATS: Mapping[str, _Format] = {
    "readme": _Format(1.0, 11),
    "column": _Format(0.5, 6),  # a figure of 7 inches is 3.5 wide
    "slide": _Format(1.4, 16),
}
_current: ContextVar[tuple[Size, bool]] = ContextVar("size and darkness", default=("readme", False))


def look(rule: str) -> Look:
    """Return how a rule is drawn; rules that are not the library's look like `tensor`."""
    return RULES.get(rule, RULES["tensor"])


def mixed(color: str, other: str, share: float) -> str:
    """Return the color #RRGGBB with a share of another one mixed in, from 0 to 1."""
    pairs = zip(bytes.fromhex(color[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round((1 - share) * a + share * b) for a, b in pairs).hex()


@contextmanager
def use(size: Size = "readme", dark: bool = False) -> Iterator[None]:
    """Set the size of the figures drawn within the block: for a README, a column of a paper, or a slide."""
    token = _current.set((size, dark))
    try:
        yield
    finally:
        _current.reset(token)


def figsize(width: float, height: float) -> tuple[float, float]:
    """Return, in inches, the size of a figure that has this width and height in a README."""
    scale = _FORMATS[_current.get()[0]].scale
    return scale * width, scale * height


def sequence(count: int) -> list[tuple[float, float, float]]:
    """Return colors from one end of an ordered scale to the other; all stand out from the background."""
    import matplotlib as mpl
    import numpy as np

    first, last = (0.3, 1.0) if _current.get()[1] else (0.0, 0.85)
    return [tuple(color[:3]) for color in mpl.colormaps["viridis"](np.linspace(first, last, count))]


def ink() -> str:
    """Return the color of text and reference lines, within :func:`style`."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


@contextmanager
def style() -> Iterator[None]:
    """Apply the current theme to matplotlib within the block."""
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
