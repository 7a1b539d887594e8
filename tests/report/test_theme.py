"""One look for every picture: colors that are told apart, three sizes, light and dark."""

from __future__ import annotations

import itertools
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb

from feedbackhook import rules
from feedbackhook.report import theme
from feedbackhook.report.plots import error_against_concordance


def luminance(color: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_rule_has_a_look() -> None:
    assert set(rules.RULES) <= set(theme.RULES)
    assert theme.look("of one's own") == theme.look("tensor")


def test_rules_that_share_a_color_differ_in_marker_or_dashes() -> None:
    assert len(set(theme.RULES.values())) == len(theme.RULES)
    drawn_together = ("backprop", "uSF", "NuSF", "brSF", "frSF", "RndF", "sign")
    for first, second in itertools.combinations(drawn_together, 2):
        assert theme.look(first).marker != theme.look(second).marker
        difference = np.subtract(to_rgb(theme.look(first).color), to_rgb(theme.look(second).color))
        assert np.abs(difference).sum() > 0.3


# Machado, Oliveira and Fernandes (2009): what a reader without one kind of cone sees, in linear RGB.
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}  # fmt: skip
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
ROUND = {"8": "o", "h": "o", "p": "o"}  # polygons that look like a dot when small
APART = 14.0  # in CIELAB, of which 2.3 are just noticed: seen at the width of a line
DRAWN_BEFORE = {"backprop", "symmetric", "sign", "random", "tensor", "RndF", "uSF", "NuSF", "brSF", "frSF"}


def lab(color: str, vision: str) -> np.ndarray:
    """CIELAB, under daylight (D65), of what a reader sees."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    seen = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
    x, y, z = np.cbrt(XYZ @ seen / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_color_blind_readers_tell_rules_apart_by_marker_and_by_dashes(vision: str) -> None:
    for first, second in itertools.combinations(theme.RULES, 2):
        a, b = theme.look(first), theme.look(second)
        alike = np.linalg.norm(lab(a.color, vision) - lab(b.color, vision)) < APART
        same_marker = ROUND.get(a.marker, a.marker) == ROUND.get(b.marker, b.marker)
        if alike and not {first, second} <= DRAWN_BEFORE:
            assert not same_marker, (first, second)
            assert a.dashes != b.dashes, (first, second)
        elif alike:
            assert not same_marker, (first, second)  # scatter plots have no dashes


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_the_ground(dark: bool) -> None:
    with theme.use(dark=dark), theme.style():
        ground = mpl.rcParams["axes.facecolor"]
        assert contrast(theme.ink(), ground) > 7
        for look in theme.RULES.values():
            assert contrast(look.color, ground) > 1.9
        for color in theme.sequence(6):
            assert contrast(mpl.colors.to_hex(color), ground) > 1.4
    assert mpl.rcParams["axes.facecolor"] == mpl.rcParamsDefault["axes.facecolor"]


def test_a_size_scales_figure_and_text_and_ends_with_its_block() -> None:
    assert theme.figsize(7, 4) == (7, 4)
    with theme.use("column"):
        assert theme.figsize(7, 4) == (3.5, 2)
        with theme.style():
            assert mpl.rcParams["font.size"] == 6
        with theme.use("slide"):
            assert theme.figsize(7, 4)[0] > 9
        assert theme.figsize(7, 4) == (3.5, 2)
    assert theme.figsize(7, 4) == (7, 4)


def test_a_sequence_runs_from_one_hue_to_another() -> None:
    hues = [rgb_to_hsv(color)[0] for color in theme.sequence(5)]
    assert hues == sorted(hues, reverse=True)


RUNS = pd.DataFrame(
    [
        *[("frSF", c, e + s) for c, e in ((0.0, 30.0), (0.5, 1.5), (1.0, 0.5)) for s in (0.0, 0.2)],
        *[("brSF", c, e) for c, e in ((0.0, 80.0), (0.5, 7.0), (1.0, 0.6))],
        ("SGD", math.nan, 0.7),
        ("RndF", math.nan, math.nan),
    ],
    columns=["rule", "concordance", "error"],
)
PAPER = pd.DataFrame([("frSF", 0.0, 4.25), ("frSF", 1.0, 0.91)], columns=["rule", "concordance", "error"])


def test_errors_are_drawn_against_concordance_beside_the_papers() -> None:
    figure = error_against_concordance(RUNS, PAPER, "Liao et al. 2016")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"frSF: drawn once", "frSF, Liao et al. 2016", "brSF: redrawn", "SGD"}
    ours, theirs = lines["frSF: drawn once"], lines["frSF, Liao et al. 2016"]
    assert list(ours.get_xdata()) == [0, 0.5, 1]
    assert list(ours.get_ydata()) == pytest.approx([30.1, 1.6, 0.6])
    assert list(theirs.get_ydata()) == [4.25, 0.91]
    assert theirs.get_linestyle() == "--"
    assert to_rgb(ours.get_color()) == to_rgb(theirs.get_color()) == to_rgb(theme.look("frSF").color)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "best test error [%]"
    assert axes.get_xlabel() == "concordance: share of feedback signs that agree with W's"
    assert figure.get_supxlabel() == "without 1 value that is not a number"


def test_no_error_at_all_is_drawn_too() -> None:
    axes = error_against_concordance(RUNS.replace(0.6, 0.0)).axes[0]
    assert axes.get_yscale() == "linear"


def test_runs_without_a_concordance_have_no_such_figure() -> None:
    with pytest.raises(ValueError, match="no run has a concordance"):
        error_against_concordance(RUNS[RUNS["rule"] == "SGD"])
