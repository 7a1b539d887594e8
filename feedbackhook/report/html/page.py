"""A sweep on one page: an HTML file that holds its data, its charts and the code that draws them.

The page needs no network.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from feedbackhook.report.aggregate import ALIKE, BETTER, THRESHOLD, WORSE, SweepTable, base_lr, sweep_table
from feedbackhook.report.errors import ReportError
from feedbackhook.report.html.answer import answer
from feedbackhook.report.html.cells import SCALE, bases, cell_id, grid, runs_id, shade
from feedbackhook.report.html.charts import alignment, concordance, curves, heat_map
from feedbackhook.report.html.checks import checks_section
from feedbackhook.report.html.pairs import paired_tests
from feedbackhook.report.html.vega import ANGLES
from feedbackhook.report.tables import (
    MARKS,
    NOT_BETTER,
    batch_sizes_text,
    not_better_text,
    procedures,
    pruning_text,
)
from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.errors import one_line
from feedbackhook.store.manifest import ManifestRun
from feedbackhook.store.run_folder import RunFolder, RunResult

__all__ = ["Renewal", "page", "write"]


@dataclass(frozen=True)
class Renewal:
    """How often a page is written again, in minutes, and when it was written last, in words."""

    minutes: float
    written: str

    @property
    def seconds(self) -> int:
        return max(1, round(60 * self.minutes))

    @property
    def words(self) -> str:
        return "minute" if self.minutes == 1 else f"{self.minutes:g} minutes"


@dataclass(frozen=True)
class _Member:
    """A planned run and what its folder holds; ``problem`` says why the folder cannot be read."""

    place: int  # in the plan
    run: ManifestRun
    folder: Path
    result: RunResult | None = None
    config: str | None = None
    provenance: dict[str, Any] | None = None
    problem: str | None = None

    @property
    def id(self) -> str:
        return f"run-{self.place}"

    @property
    def status(self) -> str:
        if self.problem is not None:
            return "damaged"
        return "not started" if self.result is None else self.result.status

    @property
    def command(self) -> str:
        return _command("train", self.folder / "config.yaml", f"{self.folder}-again")


def page(folder: str | os.PathLike[str], renewed: Renewal | None = None) -> str:
    """Return the page about the sweep in ``folder``. It names each run that is in no figure, with the reason.

    Args:
        folder: the sweep's folder.
        renewed: the sweep is watched: browsers load the page again as often.

    Raises:
        StoreError: the folder holds no sweep, or its manifest is missing or damaged.
    """
    folder = Path(folder)
    table = sweep_table(folder, of_layers=ANGLES)
    sections = {"concordance": concordance(table), "curves": curves(table), "alignment": alignment(table)}
    members = [_member(place, run, table.run_folder(run)) for place, run in enumerate(table.manifest.runs)]
    tests = paired_tests(table)
    charts = {name: chart for part in sections.values() for name, chart in part.charts.items()}
    data = {name: text for part in sections.values() for name, text in part.data.items()}
    cells, shaded = grid(table), table.cells["best_error"].notna().any()
    if shaded:
        charts["cells"], data["cells"] = heat_map(cells)
    # `skipped` now holds the runs whose damage was found when they were read, too
    left_out = table.missing | {n: why for n, why in table.runs.skipped.items() if n not in table.pruned}
    return str(
        _template().render(
            name=folder.resolve().name,
            table=table,
            plan=table.manifest,
            summary=_summary(folder, table, members),
            provenance=_provenance(members),
            renewed=renewed,
            answer=answer(table),
            tests=tests,
            grid=cells,
            groups=_groups(cells, members),
            compared_with=bases(table)[1],
            classified=table.cells["class_of_best"].notna().any(),
            scale=[(points, shade(points)) for points in SCALE] if shaded else None,
            marks=MARKS,
            not_better=NOT_BETTER,
            not_better_text=not_better_text(table) if table.cells["control"].any() else "",
            checks=checks_section(table),
            meanings=_meanings(table),
            reference=table.reference,
            sections=sections,
            charts=charts,
            data=data,
            members=members,
            pruning_text=pruning_text,
            left_out=left_out,
            vega=_vega(),
        )
    )


def write(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], renewed: Renewal | None = None
) -> Path:
    """Write the page about the sweep in ``folder`` to the file ``path``; ``renewed`` as in :func:`page`.

    Raises:
        StoreError: the folder holds no sweep, or its manifest is missing or damaged.
        ReportError: the file cannot be written.
    """
    content, path = page(folder, renewed), Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}") from error
    return path


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("feedbackhook.report", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


@cache
def _vega() -> str:
    """Vega, Vega-Lite (in the version of the specifications) and Vega-Embed as one script, which cannot close
    the element around it."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _command(command: str, config: Path, output: str) -> str:
    return shlex.join(["feedbackhook", command, str(config), "--output", output])


def _member(place: int, run: ManifestRun, path: Path) -> _Member:
    folder, file = RunFolder(path), path / "config.yaml"
    try:
        result = folder.result()
        if not file.exists():
            return _Member(place, run, path, result)
        provenance = _mapping(folder.stored_config().get("provenance"))
        return _Member(place, run, path, result, file.read_text(encoding="utf-8"), provenance)
    except (ValueError, OSError) as error:
        return _Member(place, run, path, problem=one_line(error))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _summary(folder: Path, table: SweepTable, members: Sequence[_Member]) -> dict[str, Any]:
    plan = table.manifest
    factors = [f"{factor:.15g}" for factor in sorted({run.lr_factor for run in plan.runs}, reverse=True)]
    sizes = [batch_sizes_text(plan.batch_size, plan.batch_sizes)]
    sizes += [f"{condition} also {also}" for condition, also in procedures(plan).items()]
    held_out = f"{plan.val_fraction:.0%} of each class of the training set"
    again = folder if folder.name not in ("", "..") else folder.resolve()
    return {
        "protocol": {
            "Datasets": ", ".join(plan.datasets),
            "Conditions": ", ".join(plan.conditions),
            "Epochs": str(plan.epochs),
            "Learning rate in the first epoch": f"{base_lr(plan.runs)} × {', '.join(factors)}",
            "Seeds": ", ".join(str(seed) for seed in range(plan.seed, plan.seed + plan.seeds)),
            "Batch size": "; ".join(sizes),
            "Validation images": held_out if plan.val_fraction else "none",
        },
        "status": Counter(member.status for member in members),
        "done": sum(member.result is not None and member.result.ended for member in members),
        "missing": sum(member.run.name in table.missing for member in members),
        "pruned": len(table.pruned),
        "again": _command("sweep", folder / "sweep.yaml", f"{again}-again"),
        "resume": _command("sweep", folder / "sweep.yaml", str(folder)),
    }


def _provenance(members: Iterable[_Member]) -> dict[str, dict[str, list[str]]]:
    """Each version and property of the machine: its values, and the runs that have each value."""
    of_runs = {
        member.run.name: {
            key: value
            for part in ("versions", "machine")
            for key, value in _mapping(member.provenance.get(part)).items()
        }
        for member in members
        if member.provenance is not None
    }
    found: dict[str, dict[str, list[str]]] = {key: {} for known in of_runs.values() for key in known}
    for run, known in of_runs.items():
        for key, values in found.items():
            values.setdefault(str(known.get(key, "not recorded")), []).append(run)
    return found


def _groups(cells: Sequence[dict[str, Any]], members: Sequence[_Member]) -> list[dict[str, Any]]:
    """The runs of each cell of the grid."""
    by_place: dict[tuple[str, str], list[_Member]] = {}
    for member in members:
        by_place.setdefault((member.run.condition, member.run.dataset), []).append(member)
    groups = []
    for row, of_condition in enumerate(cells):
        for column, cell in enumerate(of_condition["cells"]):
            its_members = by_place[of_condition["condition"], cell["dataset"]]
            counts = Counter(member.status for member in its_members)
            group = {"condition": of_condition["condition"], "dataset": cell["dataset"]}
            group |= {"id": runs_id(row, column), "cell": cell_id(row, column), "members": its_members}
            words = ", ".join(f"{count} {status}" for status, count in counts.items())
            groups.append(group | {"words": words})
    return groups


def _meanings(table: SweepTable) -> dict[str, str]:
    return {
        BETTER: f"{THRESHOLD:g} points or more better than {table.reference}",
        ALIKE: f"within {THRESHOLD:g} points of {table.reference}",
        WORSE: f"{THRESHOLD:g} points or more worse than {table.reference}",
    }
