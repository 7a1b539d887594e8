"""What a profile holds, and what it says."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from feedbackhook.diagnosis.grid import Setting
from feedbackhook.listing import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

METRICS = ("gradient_angle", "error_angle", "gradient_norm_ratio")

HALF, TENTH = 60.0, 85.0
"""Angles in degrees. A short step along a gradient at angle t to backprop's lowers the loss by cos(t) of what
a step of equal length along backprop's lowers it (the first term of Taylor's series): by half at 60 degrees,
by less than a tenth beyond 85."""


class ProfileRow(NamedTuple):
    """One value of a profile.

    Args:
        mode: the rule.
        concordance: share of agreeing signs; None for rules without it.
        layer: the layer's full name.
        depth: its position in the order of the forward's calls, from 0; None if the forward does not call it.
        metric: "gradient_angle" or "error_angle", in degrees, or "gradient_norm_ratio".
        mean: over batches and draws; NaN if no value is defined.
        std: standard deviation over batches and draws (of the sample); NaN for fewer than two values.
        defined: number of values that are defined, of batches times draws.
    """

    mode: str
    concordance: float | None
    layer: str
    depth: int | None
    metric: str
    mean: float
    std: float
    defined: int

    @property
    def condition(self) -> str:
        """The rule with its concordance."""
        return Setting(self.mode, self.concordance, {}).name


class Reach(NamedTuple):
    """How deep below the output gradients stay within an angle of backprop's.

    Args:
        layers: number of layers, counted from the output down to the first that does not.
        layer: the deepest of them; None if there is none.
        of: number of layers whose angle is defined.
    """

    layers: int
    layer: str | None
    of: int


@dataclass(frozen=True)
class Profile:
    """What `feedbackhook.profile` found. `print(profile)` shows a line for each condition and the sentence.

    Args:
        rows: the values.
        undefined: the layers whose gradient angle is undefined in some batch, and why.
        batches: number of batches.
        seeds: number of draws of each rule.
        zero_scales: the normalizations whose scale is zero, so that layers which lead to these alone get no
            gradient.
    """

    rows: list[ProfileRow]
    undefined: dict[str, str]
    batches: int
    seeds: int
    zero_scales: tuple[str, ...] = ()

    @property
    def conditions(self) -> list[str]:
        """The rules with their concordances, in the order of the grid."""
        return list(dict.fromkeys(row.condition for row in self.rows))

    def angles(self, condition: str, metric: str = "gradient_angle") -> list[ProfileRow]:
        """Return the rows of a condition with a value, from the input to the output."""
        found = [
            row
            for row in self.rows
            if row.condition == condition and row.metric == metric and not math.isnan(row.mean)
        ]
        return sorted(found, key=lambda row: math.inf if row.depth is None else row.depth)

    def reach(self, condition: str, below: float = HALF) -> Reach:
        """Return how deep the mean gradient angle stays below `below` degrees."""
        rows = self.angles(condition)
        reached: list[ProfileRow] = []
        for row in reversed(rows):
            if row.mean >= below:
                break
            reached.append(row)
        return Reach(len(reached), reached[-1].layer if reached else None, len(rows))

    def smallest_concordance(self, mode: str, below: float = TENTH) -> float | None:
        """Return the smallest concordance of a rule at which the first layer's mean gradient angle is below
        `below` degrees; None if none is."""
        values = {row.concordance: row.condition for row in self.rows if row.mode == mode}
        reaching = [
            concordance
            for concordance, condition in values.items()
            if concordance is not None and (rows := self.angles(condition)) and rows[0].mean < below
        ]
        return min(reaching, default=None)

    @property
    def sentence(self) -> str:
        """How deep a gradient still points backprop's way, and the smallest concordance that reaches the
        first layer."""
        best = max(self.conditions, key=lambda name: [self.reach(name, at).layers for at in (HALF, TENTH)])
        half, tenth = (self.reach(best, at) for at in (HALF, TENTH))
        if not half.of:
            return "No layer has a gradient angle, so nothing can be said."
        layers = len({row.layer for row in self.rows})
        some = half.of < layers
        said = f"{half.of} of {layers} layers have an exact gradient to compare with. " if some else ""
        said += (
            f"At best ({best}), gradients point within {HALF:g}° of backprop's in {_last(half, some)} and "
            f"within {TENTH:g}° in {_last(tenth, some)}"
        )
        first = f"the first {'of them' if some else 'layer'}"
        modes = dict.fromkeys(row.mode for row in self.rows if row.concordance is not None)
        parts = []
        for mode in modes:
            least = self.smallest_concordance(mode)
            parts.append(
                f"no profiled concordance of {mode} reaches {first}"
                if least is None
                else f"{mode} reaches {first} (below {TENTH:g}°) from concordance {least:g} on"
            )
        return "; ".join([said, *parts]) + "."

    def table(self) -> DataFrame:
        """Return the values as a pandas `DataFrame`, a row for each."""
        import pandas as pd

        columns = ["condition", *ProfileRow._fields]
        return pd.DataFrame([(row.condition, *row) for row in self.rows], columns=columns)

    def figure(self) -> Figure:
        """Draw the gradient angles: layers by condition as a heat map, and angle against depth."""
        from feedbackhook.report.profiles import draw

        return draw(self.table(), self.conditions)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write profile.csv and profile.png into a folder, and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "profile.csv", folder / "profile.png"]
        self.table().to_csv(paths[0], index=False, float_format="%.4g")
        self.figure().savefig(paths[1], dpi=150)
        return paths

    def __str__(self) -> str:
        """Return a line for each condition, the undefined layers, and the sentence."""
        head = ["condition", f"below {HALF:g}°", f"below {TENTH:g}°", "first layer", "median", "norm ratio"]
        lines = aligned([head, *(self._line(name) for name in self.conditions)])
        if self.undefined:
            lines += ["", *_explained(self.undefined)]
            if self.zero_scales:
                lines += ["", _about_zero_scales(self.zero_scales)]
        draws = f"{self.batches} batch{'es' * (self.batches > 1)}, {self.seeds} draw{'s' * (self.seeds > 1)}"
        return "\n".join(
            [*lines, "", f"Gradient angles to exact backprop, means over {draws}.", self.sentence]
        )

    def _line(self, condition: str) -> list[str]:
        rows = self.angles(condition)
        means, ratios = ([row.mean for row in self.angles(condition, m)] for m in (METRICS[0], METRICS[2]))
        reaches = [self.reach(condition, at) for at in (HALF, TENTH)]
        return [
            condition,
            *(f"{reach.layers} of {reach.of} layers" for reach in reaches),
            f"{rows[0].mean:.0f}° ± {rows[0].std:.0f}" if rows else "-",
            f"{np.median(means):.0f}°" if means else "-",
            f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else "-",
        ]


Values = dict[tuple[str, float | None, str, str], list[float]]
"""Values over batches and draws, by mode, concordance, layer and metric."""


def summarized(values: Values, order: Mapping[str, int]) -> list[ProfileRow]:
    """Return the mean and the standard deviation of each list of values, without those that are NaN.

    Args:
        values: those of each layer and metric.
        order: the depth of each layer.
    """
    rows = []
    for (mode, concordance, layer, metric), every in values.items():
        defined = np.array([value for value in every if not math.isnan(value)])
        mean = float(defined.mean()) if len(defined) else math.nan
        std = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
        depth = order.get(layer)
        rows.append(ProfileRow(mode, concordance, layer, depth, metric, mean, std, len(defined)))
    return rows


def _last(reach: Reach, some: bool) -> str:
    """Return the layers that are reached, of all or of `some`, which were named before."""
    of = f"{'these ' * some}{reach.of} layers"
    if not reach.layers:
        return f"none of {of}" if some else f"none of the {of}"
    if reach.layers == reach.of:
        return f"all {of}"
    return f"the last {reach.layers} of {of} (down to {reach.layer})"


def _explained(undefined: Mapping[str, str], most: int = 3) -> Iterator[str]:
    """Yield a line for each of the first reasons, with all its layers, and one with all other layers."""
    layers: dict[str, list[str]] = {}
    for layer, reason in undefined.items():
        layers.setdefault(reason, []).append(layer)
    for reason, names in list(layers.items())[:most]:
        yield f"no gradient angle at {', '.join(names)}: {reason}"
    if more := [name for names in list(layers.values())[most:] for name in names]:
        yield f"nor, for other reasons, at {', '.join(more)}"


def _about_zero_scales(names: tuple[str, ...]) -> str:
    normalizations = f"{len(names)} normalizations" if len(names) > 1 else "a normalization"
    return (
        f"The scale of {normalizations} is zero ({', '.join(names)}), so layers that lead there alone get no "
        "gradient before the first update. To profile them too, build the network without that: timm's "
        "ResNets with zero_init_last=False, on the command line --options '{zero_init_last: false}'."
    )
