"""Write the page about the rules that learn, and its tables and figure, from the committed runs.

    python analysis/learned_rules.py

Reads the sweeps in analysis/runs/rules/learned and writes analysis/results/rules/learned. The page's numbers
and verdicts are computed here; its sentences are in learned_rules.md.jinja. A sweep that is not there is left
out; a run that has not ended is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from every_rule import COUNTS, ERRORS, borne_out, error_cell, is_complete, is_worse, render
from jsonargparse import auto_cli

from feedbackhook.report import theme
from feedbackhook.report.runs import Runs, describe
from feedbackhook.store import manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
TEMPLATE = "learned_rules.md.jinja"
LR, LAST_LR, MOMENTUM = 0.03, 0.003, 0.9
"""Learning rates before and from epoch `milestone` on, and SGD's momentum."""


@dataclass(frozen=True)
class Source:
    """One sweep.

    Args:
        title: name of the dataset on the page.
        network: what is trained, in words.
        training: number of its training images.
        test: number of its test images.
        batch: images in a mini-batch.
        epochs: number of epochs.
        milestone: the epoch from which on the learning rate is `LAST_LR`.
        decay: weight decay.
        every: steps from one record to the next.
        layers: the layers that send an error signal on, and the numbers of inputs of their matrices; the last
            is the upper layer.
    """

    title: str
    network: str
    training: int
    test: int
    batch: int
    epochs: int
    milestone: int
    decay: float
    every: int
    layers: dict[str, int]

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return self.training // self.batch

    @property
    def steps(self) -> int:
        """Steps in a run."""
        return self.epochs * self.per_epoch

    @property
    def upper(self) -> str:
        """The upper layer."""
        return list(self.layers)[-1]


_MNIST = {"conv2": 20 * 25, "fc1": 50 * 16, "fc2": 500}
_CIFAR = {"conv2": 32 * 25, "conv3": 64 * 25, "fc1": 64 * 16, "fc2": 128}
SOURCES = {
    "digits": Source("digits", "the paper's MNIST network", 1_437, 360, 25, 10, 8, 0.03, 19, _MNIST),
    "mnist": Source("MNIST", "the paper's MNIST network", 10_000, 10_000, 50, 5, 4, 0.02, 50, _MNIST),
    "cifar10": Source("CIFAR-10", "the paper's CIFAR network", 5_000, 5_000, 25, 4, 3, 0.03, 50, _CIFAR),
}
NOT_LEARNED = ("backprop", "FA", "frSF", "sign")
LEARNED = (
    *("KP", "WM", "information", "symmetric-alignment", "activation-alignment"),
    *("PFA", "PFA-o", "LDFA", "DKP"),
)
ORDER = (*NOT_LEARNED, *LEARNED)
EXPANSION, MIRROR_RATE, MIRROR_BATCH = 4.0, 0.01, 128

AKROUT = {"FA": (40.0, 34.9), "KP": (3.6, 3.1), "WM": (3.8, 3.2)}
"""Akrout et al. 2019, as their code reports: weight angle and error-signal angle of the upper of two layers
after 400 epochs on MNIST, in degrees."""

ANGLES = ("weight_angle", "error_angle", "norm_ratio")


@dataclass(frozen=True)
class Evidence:
    """What the runs of one sweep recorded.

    Args:
        source: the sweep.
        cells: a row for each condition: `condition`, the errors and counts of
            :func:`every_rule.error_cell`, and for each of `ANGLES` and each layer the mean over the seeds
            whose runs have finished, after the last step, such as `weight_angle fc2`; error angles are those
            of the last step at which they were recorded.
        points: a row for each run: `run`, `condition`, `seed`, `status`, `last_error`, `best_error`, and the
            same columns.
        rows: the recorded weight angles: `run`, `condition`, `layer`, `depth`, `step`, `epoch`, `angle`.
        shrinking: for each run of KP and layer, the `step`, the norm of W - V over that at the start as
            `measured`, and as `predicted`: see :func:`remaining`.
    """

    source: Source
    cells: pd.DataFrame
    points: pd.DataFrame
    rows: pd.DataFrame
    shrinking: pd.DataFrame


def read(folder: Path, source: Source) -> Evidence:
    """Read the runs of a sweep."""
    plan = manifest.read(folder)
    found = describe(path for run in plan.runs if (path := folder / run.name).is_dir())
    rows = found.rows(of_layers=[*ANGLES, "weight_norm"])
    rows = rows[rows["value"].notna() & rows["layer"].isin(list(source.layers))]
    last = rows[rows["metric"].isin(ANGLES)]
    last = last[last["step"] == last.groupby(["run", "metric"])["step"].transform("max")]
    last = last.assign(column=last["metric"] + " " + last["layer"])
    columns = [f"{metric} {layer}" for metric in ANGLES for layer in source.layers]
    wide = last.pivot(index="run", columns="column", values="value").reindex(columns=columns)
    points = found.runs.join(wide, on="run")
    points = points.sort_values(["condition", "seed"], key=_place)
    planned = pd.Series([run.condition for run in plan.runs]).value_counts()
    cells = []
    for condition in sorted(planned.index, key=ORDER.index):
        of = points[points["condition"] == condition]
        finished = of[of["status"] == "finished"]
        means = {column: finished[column].mean() for column in columns}
        cells.append({"condition": condition, **error_cell(of, int(planned[condition])), **means})
    return Evidence(
        source,
        pd.DataFrame(cells)[["condition", *ERRORS, *COUNTS, *columns]],
        points[["run", "condition", "seed", "status", "last_error", "best_error", *columns]],
        _over_epochs(rows, found, source),
        shrinking(rows, found.runs.loc[found.runs["condition"] == "KP", "run"].tolist(), source),
    )


def _place(values: pd.Series) -> pd.Series:
    return values.map(ORDER.index) if values.name == "condition" else values


def _over_epochs(rows: pd.DataFrame, found: Runs, source: Source) -> pd.DataFrame:
    angles = rows[rows["metric"] == "weight_angle"].rename(columns={"value": "angle"})
    angles = angles.merge(found.runs[["run", "condition"]], on="run")
    angles = angles.assign(epoch=angles["step"] / source.per_epoch)
    return angles[["run", "condition", "layer", "depth", "step", "epoch", "angle"]]


def shrinking(rows: pd.DataFrame, runs: Sequence[str], source: Source) -> pd.DataFrame:
    """Return how W - V shrinks in these runs, from the recorded norms of W and V and their angle: see
    :class:`Evidence`."""
    of = rows[rows["run"].isin(runs)]
    wide = of.pivot(index=["run", "layer", "step"], columns="metric", values="value").reset_index()
    needed = ["weight_angle", "norm_ratio", "weight_norm"]
    wide = (
        wide.reindex(columns=["run", "layer", "step", *needed]).dropna().astype(dict.fromkeys(needed, float))
    )
    cosine = wide["weight_angle"].map(math.radians).map(math.cos)
    ratio = wide["norm_ratio"]
    norm = wide["weight_norm"] * (1 + ratio**2 - 2 * ratio * cosine) ** 0.5
    at_start = norm.groupby([wide["run"], wide["layer"]]).transform("first")
    predicted = wide["step"].map(lambda step: remaining(int(step), source))
    return wide[["run", "layer", "step"]].assign(measured=norm / at_start, predicted=predicted)


def remaining(steps: int, source: Source) -> float:
    """Return what weight decay alone leaves of W - V under SGD with momentum after so many steps: W and V get
    the same gradient, so that their difference gets none."""
    left, velocity = 1.0, 0.0
    for step in range(steps):
        velocity = MOMENTUM * velocity + source.decay * left
        left -= (LAST_LR if step >= source.per_epoch * source.milestone else LR) * velocity
    return left


def floor_of(condition: str, inputs: int) -> float:
    """Return the weight angle in degrees that a rule comes to in the long run, where docs/rules.md gives a
    formula; otherwise NaN.

    Args:
        condition: the rule.
        inputs: number of inputs of the layer's matrix.
    """
    if condition == "WM":
        return math.degrees(math.atan(math.sqrt(MIRROR_RATE * inputs / (2 * MIRROR_BATCH))))
    if condition == "PFA":
        return math.degrees(math.atan(math.sqrt(1 / EXPANSION)))
    return 0.0 if condition in ("KP", "PFA-o", "symmetric-alignment") else math.nan


class Results:
    """What the runs of one sweep say.

    Args:
        evidence: what they recorded.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.source = evidence.source
        self._rows: dict[str, dict[str, Any]] = {
            row["condition"]: row for row in evidence.cells.to_dict("records")
        }

    def value(self, condition: str, what: str = "last") -> float:
        """A column of a cell; NaN if no run of it has finished."""
        row = self._rows.get(condition)
        return math.nan if row is None or not row["ended"] else float(row[what])

    def planned(self, condition: str | None = None) -> int:
        """How many runs were planned, of a condition or in all."""
        if condition is not None:
            return int(self._rows[condition]["planned"]) if condition in self._rows else 0
        return int(self.evidence.cells["planned"].sum())

    def seeds(self) -> int:
        """The largest number of runs that were planned of a condition."""
        return int(self.evidence.cells["planned"].max())

    def missing(self) -> int:
        """How many runs have not ended."""
        return self.planned() - int(self.evidence.cells["ended"].sum())

    def diverged(self) -> dict[str, int]:
        """How many runs of each condition have diverged, of those with any."""
        cells = self.evidence.cells[self.evidence.cells["diverged"] > 0]
        return dict(zip(cells["condition"], cells["diverged"], strict=True))

    def known(self, *conditions: str) -> bool:
        """Whether all runs of these conditions have ended, and none has diverged."""
        return all(is_complete(self._rows.get(condition)) for condition in conditions)

    def finished(self, condition: str) -> int:
        """How many runs of a condition have ended without diverging."""
        row = self._rows.get(condition)
        return 0 if row is None else int(row["ended"] - row["diverged"])

    def worse(self, condition: str, than: str = "backprop") -> bool:
        """Whether the error after the last epoch is higher: see :func:`every_rule.is_worse`."""
        runs = min(int(self._rows[name]["ended"]) for name in (condition, than))
        return is_worse(self.value(condition), self.value(than), self.source.test * runs)

    def against_backprop(self, worse: bool) -> list[str]:
        """The rules that are worse than backprop, or those that are not, of the complete ones."""
        complete = [c for c in ORDER[1:] if self.known(c, "backprop")]
        return [c for c in complete if self.worse(c) == worse]

    def better_than(self, than: str) -> list[str]:
        """The rules that learn than which this one is worse, of the complete ones."""
        return [c for c in LEARNED if self.known(c, than) and self.worse(than, c)]

    def angles(self, condition: str) -> list[float]:
        """The weight angles of the layers at the end, input to output."""
        return [self.value(condition, f"weight_angle {layer}") for layer in self.source.layers]

    def floors(self, condition: str) -> list[float]:
        """The angles of :func:`floor_of` of the layers, input to output."""
        return [floor_of(condition, inputs) for inputs in self.source.layers.values()]

    def left(self) -> float:
        """What :func:`remaining` gives for a whole run."""
        return remaining(self.source.steps, self.source)

    def kp_deviation(self) -> float:
        """The largest deviation of KP's measured W - V from the prediction, relative to that."""
        of = self.evidence.shrinking
        return float((of["measured"] / of["predicted"] - 1).abs().max())


def page(results: dict[str, Results]) -> str:
    """Return the page as Markdown.

    Raises:
        NotBorneOut: one of its sentences claims more than the runs show.
    """
    with_kp = [r for r in results.values() if r.finished("KP")]
    return render(
        TEMPLATE,
        sweeps=results,
        order=ORDER,
        akrout=AKROUT,
        claim=partial(borne_out, template=TEMPLATE),
        kp_is_near=all(r.value("KP", f"weight_angle {r.source.upper}") < 5 for r in with_kp),
        same_share=all(r.kp_deviation() < 0.001 for r in with_kp),
        pfao_as_kp=all(
            abs(a - b) < 1
            for r in with_kp
            for a, b in zip(r.angles("KP"), r.angles("PFA-o"), strict=True)
            if r.finished("PFA-o")
        ),
        pfa_floor=floor_of("PFA", 1),
        longest=max(r.source.epochs for r in results.values()),
        lr=(LR, LAST_LR),
        momentum=MOMENTUM,
    )


def draw(evidence: Evidence, conditions: Sequence[str]) -> Figure:
    """Draw the weight angle of each layer against epoch, a panel for each condition: the mean over seeds in a
    band from the lowest to the highest.

    Args:
        evidence: what the runs recorded.
        conditions: those to draw.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    source, columns = evidence.source, 4
    count = math.ceil(len(conditions) / columns)
    with theme.style():
        figure = Figure(figsize=theme.figsize(10.0, 0.7 + 2.2 * count), layout="constrained")
        panels = figure.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
        colors = dict(zip(source.layers, theme.sequence(len(source.layers)), strict=True))
        for axes, condition in zip(panels, conditions, strict=False):
            part = evidence.rows[evidence.rows["condition"] == condition]
            sns.lineplot(
                part,
                x="epoch",
                y="angle",
                hue="layer",
                hue_order=list(source.layers),
                palette=colors,
                errorbar=("pi", 100),
                legend=False,
                ax=axes,
            )
            for layer, color in colors.items():
                if (floor := floor_of(condition, source.layers[layer])) > 0:
                    axes.axhline(floor, linestyle=":", color=color)
            if condition in AKROUT:
                axes.axhline(AKROUT[condition][0], linestyle="--", color=colors[source.upper])
            axes.set_title(condition, fontsize="medium")
            axes.set(xlabel="", ylabel="", xlim=(0, source.epochs), ylim=(0, 100), yticks=(0, 30, 60, 90))
            axes.tick_params(labelbottom=True)
        for axes in panels[len(conditions) :]:
            axes.remove()
        figure.supxlabel("epoch", fontsize="medium")
        figure.supylabel("angle between V and W [°]", fontsize="medium")
        _legend(figure, colors)
    return figure


def _legend(figure: Figure, colors: dict[str, tuple[float, float, float]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=layer) for layer, color in colors.items()]
    handles.append(Line2D([], [], color=theme.ink(), linestyle=":", label="where a formula says it ends"))
    upper = list(colors.values())[-1]
    handles.append(Line2D([], [], color=upper, linestyle="--", label="Akrout et al. on MNIST, upper layer"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def main(runs: Path = HERE / "runs/rules/learned", output: Path = HERE / "results/rules/learned") -> None:
    """Write the page.

    Args:
        runs: folder of the sweeps, which are named as in `SOURCES`.
        output: folder to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = {name: read(runs / name, source) for name, source in SOURCES.items() if (runs / name).is_dir()}
    for table in ("cells", "points"):
        frames = [getattr(evidence, table).assign(sweep=name) for name, evidence in found.items()]
        whole = pd.concat(frames, ignore_index=True)
        whole.insert(0, "sweep", whole.pop("sweep"))
        name = "runs" if table == "points" else table
        whole.to_csv(output / f"{name}.csv", index=False, float_format="%.6g")
    for name, evidence in found.items():
        rows = evidence.rows
        left_out = ("backprop", "frSF", "DKP")
        trained = rows.loc[rows["step"] > 0, "condition"].unique()
        drawn = [c for c in ORDER if c not in left_out and c in trained]
        draw(evidence, drawn).savefig(output / f"weight_angle_{name}.png", dpi=110)
    results = {name: Results(evidence) for name, evidence in found.items()}
    (output / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
