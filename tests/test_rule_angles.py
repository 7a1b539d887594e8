"""Each rule's figure of its angles over training is that of the committed runs, and is in its section."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from feedbackhook.rules import RULES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "analysis"))
import rule_angles  # noqa: E402

FIGURES = ROOT / "docs/figures/rules"
WITHOUT = {
    "symmetric": "its angle is zero",
    "tensor": "the user's own V",
    "sign": "frSF's",
    "random": "as RndF",
}


def test_every_rule_has_a_figure_in_its_section() -> None:
    own = {name for name, rule in RULES.items() if rule.__module__.startswith("feedbackhook.")}
    named = re.findall(
        r"!\[Angles of (\S+) over training\]\(figures/rules/(\S+)\.png\)",
        (ROOT / "docs/rules.md").read_text(),
    )
    assert all(rule == figure for rule, figure in named)
    assert [rule for rule, _ in named] == list(dict.fromkeys(rule for rule, _ in named))
    assert {rule for rule, _ in named} == set(rule_angles.RULES.values()) == own - WITHOUT.keys()
    assert {path.stem for path in FIGURES.iterdir()} == set(rule_angles.RULES.values())


@pytest.mark.parametrize("sweep", rule_angles.SWEEPS)
def test_the_runs_recorded_what_the_figures_show(sweep: str) -> None:
    rows = rule_angles.angles(ROOT / "analysis/runs/rules" / sweep)
    shown = rows[rows["condition"].isin(rule_angles.RULES)]
    assert not shown.empty
    assert set(shown.groupby("condition")["seed"].nunique()) == {3}
    panels = shown.groupby("condition")["metric"].unique()
    direct = {condition for condition, metrics in panels.items() if "weight_angle" not in metrics}
    assert direct == {
        c for c, rule in rule_angles.RULES.items() if rule in ("DFA", "sDFA", "DRTP", "DKP")
    } & set(panels.index)


def test_a_figure_has_a_panel_for_each_angle_and_a_line_for_each_layer() -> None:
    rows = rule_angles.angles(ROOT / "analysis/runs/rules/digits")
    figure = rule_angles.draw(rows[rows["condition"] == "angle+BN+BM degrees=45"])
    weights, _, gradients = figure.axes
    assert [axes.get_title() for axes in figure.axes] == list(rule_angles.SAYS.values())
    by_layer = [line for line in weights.lines if len(line.get_xdata()) > 2]
    assert len(by_layer) == 3  # conv1 sends nothing on
    assert all(abs(value - 45) < 0.01 for line in by_layer for value in line.get_ydata())
    assert len([line for line in gradients.lines if len(line.get_xdata()) > 2]) == 4
