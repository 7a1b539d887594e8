"""A sweep on one page: HTML that holds its data, its charts and what draws them, and asks the network for
nothing."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, StrictUndefined, Template

from feedbackhook.experiments.config import ConfigError, ProtocolConfig, one_line
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.report.html.charts import ANGLES, alignment, concordance, curves
from feedbackhook.report.tables import (
    ALIKE,
    BETTER,
    COLOURS,
    MARKS,
    THRESHOLD,
    WORSE,
    SweepTable,
    base_rate,
    sweep_table,
)
from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.run_folder import RunResult

__all__ = ["page", "write"]


@dataclass(frozen=True)
class _Member:
    """A planned run as its folder has it; ``fault`` is why that cannot be read."""

    run: PlannedRun
    result: RunResult | None = None
    config: str | None = None
    provenance: dict[str, Any] | None = None
    fault: str | None = None

    @property
    def status(self) -> str:
        if self.fault is not None:
            return "damaged"
        return "not begun" if self.result is None else self.result.status

    @property
    def command(self) -> str:
        path = self.run.folder.path
        return _command("train", path / "config.yaml", f"{path}-again")


def page(folder: str | os.PathLike[str]) -> str:
    """The page about the sweep in ``folder``. Runs that are in no figure are named on it, each with the
    reason; so they are where no run has ended.

    Raises:
        ConfigError: the folder holds no sweep, or a damaged one.
    """
    folder = Path(folder)
    table = sweep_table(folder, of_layers=ANGLES)
    sections = {"concordance": concordance(table), "curves": curves(table), "alignment": alignment(table)}
    members = [_member(run) for run in table.planned]
    left_out = table.missing | table.runs.skipped  # by now with those whose damage showed when they were read
    return str(
        _template().render(
            name=folder.resolve().name,
            table=table,
            summary=_summary(folder, table, members),
            provenance=_provenance(members),
            grid=_grid(table),
            colours=COLOURS,
            marks=MARKS,
            meanings=_meanings(table),
            reference=table.reference,
            sections=sections,
            charts={name: chart for part in sections.values() for name, chart in part.charts.items()},
            data={name: text for part in sections.values() for name, text in part.data.items()},
            members=members,
            left_out=left_out,
            vega=_vega(),
        )
    )


def write(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """The page about the sweep in ``folder`` as the file ``path``.

    Raises:
        ConfigError: the folder holds no sweep, or a damaged one, or the file cannot be written.
    """
    content, path = page(folder), Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return path


def _template() -> Template:
    source = (files("feedbackhook.report.html") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


@cache
def _vega() -> str:
    """Vega, Vega-Lite in the version of the specifications, and Vega-Embed as one script, with nothing in it
    that would end the element around it."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _command(command: str, config: Path, output: str) -> str:
    return shlex.join(["feedbackhook", command, str(config), "--output", output])


def _member(run: PlannedRun) -> _Member:
    file = run.folder.path / "config.yaml"
    try:
        result = run.folder.result()
        if not file.exists():
            return _Member(run, result)
        content = run.folder.stored_config()
        return _Member(run, result, file.read_text(encoding="utf-8"), _mapping(content.get("provenance")))
    except (ValueError, OSError) as error:
        return _Member(run, fault=one_line(error))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _summary(folder: Path, table: SweepTable, members: Sequence[_Member]) -> dict[str, Any]:
    config, p = table.config, table.config.protocol
    factors = [f"{rate:.15g}" for rate in sorted({member.run.rate for member in members}, reverse=True)]
    sizes = [_sizes(p)]
    for run in (member.run for member in members):
        also = f"{run.condition} also {_sizes(run.config.protocol)}"
        if run.procedure.name and also not in sizes:
            sizes.append(also)
    base = base_rate([member.run for member in members])
    held_out = f"{config.data.val_fraction:.0%} of each class of the training set"
    again = folder if folder.name not in ("", "..") else folder.resolve()
    return {
        "protocol": {
            "Datasets": ", ".join(config.datasets),
            "Conditions": ", ".join(config.conditions),
            "Epochs": str(p.epochs),
            "Learning rate in the first epoch": f"{base} × {', '.join(factors)}",
            "Seeds": ", ".join(str(seed) for seed in range(p.seed, p.seed + p.seeds)),
            "Images a mini-batch": "; ".join(sizes),
            "Held out": held_out if config.data.val_fraction else "nothing",
        },
        "status": Counter(member.status for member in members),
        "missing": sum(member.run.name in table.missing for member in members),
        "again": _command("sweep", folder / "sweep.yaml", f"{again}-again"),
        "on": _command("sweep", folder / "sweep.yaml", str(folder)),
    }


def _sizes(protocol: ProtocolConfig) -> str:
    later = (f"{size} after epoch {epoch}" for epoch, size in sorted(protocol.batch_sizes.items()))
    return ", ".join([str(protocol.batch_size), *later])


def _provenance(members: Iterable[_Member]) -> dict[str, dict[str, list[str]]]:
    """Of each version, and of all that is known of the machine, the values, and the runs that have each."""
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


def _grid(table: SweepTable) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each condition its cells, in the order of the datasets; None is what the table has not."""
    cells = table.cells.astype(object).where(table.cells.notna(), None)
    by_place = {(cell["condition"], cell["dataset"]): cell for cell in cells.to_dict("records")}
    conditions, datasets = cells["condition"].unique(), cells["dataset"].unique()
    return [(name, [by_place[name, dataset] for dataset in datasets]) for name in conditions]


def _meanings(table: SweepTable) -> dict[str, str]:
    return {
        BETTER: f"{THRESHOLD:g} points or more better than {table.reference}",
        ALIKE: f"within {THRESHOLD:g} points of {table.reference}",
        WORSE: f"{THRESHOLD:g} points or more worse than {table.reference}",
    }
