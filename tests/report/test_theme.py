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
