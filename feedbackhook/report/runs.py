"""Describe any number of runs in one table, and read the rows that they recorded on demand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from feedbackhook.names import rule_name
from feedbackhook.report import rules
from feedbackhook.store.errors import StoreError, one_line
from feedbackhook.store.recorder import parts_of, schema
from feedbackhook.store.run_folder import RunFolder, RunResult

# columns of Runs.runs that come from a configuration, and their keys there
_FROM_CONFIG = {
    "condition": ("condition",),
    "dataset": ("data", "name"),
    "val_fraction": ("data", "val_fraction"),
    "model": ("model", "name"),
    "rule": ("feedback", "mode"),
    "options": ("feedback", "options"),
    "batch_norm": ("model", "batch_norm"),
    "frozen": ("model", "frozen"),
    "optimizer": ("optimizer", "name"),
    "setting": ("optimizer", "setting"),
    "learning_rate": ("optimizer", "lr"),
    "epochs": ("protocol", "epochs"),
    "batch_size": ("protocol", "batch_size"),
    "batch_sizes": ("protocol", "batch_sizes"),
    "seed": ("protocol", "seed"),
}


@dataclass(frozen=True)
class Runs:
    """Runs that have finished or diverged, and the names of those that are left out.

    Args:
        runs: a row for each run: `run` (its name), `folder`, `status`, `reason`, `last_error` and
            `best_error` (of the test set, in percent), `best_epoch`, `concordance` (missing for rules without
            one), and from its configuration `condition` (or the label, if it has one), `dataset`,
            `val_fraction`, `model`, `rule`, `options`, `batch_norm`, `frozen`, `optimizer`, `setting`,
            `learning_rate`, `epochs`, `batch_size`, `batch_sizes` and `seed`.
        skipped: the runs that are left out, and why: a run has not ended, was pruned, has failed, is empty or
            damaged, or belongs to a version with another configuration or table. :meth:`rows` adds runs whose
            damage is found only when they are read.
    """

    runs: pd.DataFrame
    skipped: dict[str, str] = field(default_factory=dict)

    def rows(
        self, metrics: Iterable[str] = (), of_layers: Iterable[str] = (), categories: bool = False
    ) -> pd.DataFrame:
        """Read the rows of these metrics from disk: `run, step, epoch, layer, depth, metric, value`.

        Args:
            metrics: metrics of the whole network, such as `test_error`.
            of_layers: metrics of single layers, such as `weight_angle`.
            categories: return text columns as categories, which take a tenth of the memory.
        """
        metric, layer = ds.field("metric"), ds.field("layer")
        of_network, of_layer = (
            metric.isin(pa.array(names, pa.string())) for names in (list(metrics), list(of_layers))
        )
        condition = (of_network & layer.is_null()) | (of_layer & layer.is_valid())
        parts: dict[str, str] = {}  # the run of each file
        for run, folder in self.runs[["run", "folder"]].to_numpy():
            if not (found := parts_of(Path(folder) / "metrics")):
                self.skipped[run] = "its table is gone"
            elif run not in self.skipped:
                parts |= dict.fromkeys(map(str, found), run)
        try:
            rows = _scan(parts, condition)
        except (OSError, pa.ArrowException):
            rows = pd.concat(self._scan_each(parts, condition), ignore_index=True)
            rows = rows.astype(dict.fromkeys(_TEXTS, "category"))
        if categories:
            return rows
        return rows.astype({text: rows[text].cat.categories.dtype for text in _TEXTS})

    def _scan_each(self, parts: Mapping[str, str], condition: ds.Expression) -> Iterator[pd.DataFrame]:
        of_run: dict[str, dict[str, str]] = {}
        for part, run in parts.items():
            of_run.setdefault(run, {})[part] = run
        yield _scan({}, condition)
        for run, its_parts in of_run.items():
            try:
                yield _scan(its_parts, condition)
            except (OSError, pa.ArrowException) as error:
                self.skipped[run] = f"its table is damaged: {one_line(error)}"


def collect(*paths: str | os.PathLike[str]) -> Runs:
    """Describe the runs in these folders: run folders, or folders that hold some at any depth.

    A run is named after its folder, preceded by as many parent folders as it takes to tell all runs apart.

    Raises:
        StoreError: a path is not a folder, or holds no run.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise StoreError(f"{path} is not a folder")
        found = sorted({file.parent.resolve() for name in _MARKS for file in path.rglob(name)})
        if not found:
            raise StoreError(f"no run in {path.resolve()}: name a run folder, or a folder that holds some")
        folders |= dict.fromkeys(found)
    return describe(list(folders))


def describe(folders: Iterable[Path]) -> Runs:
    """Describe the runs in these run folders."""
    rows, skipped = [], {}
    for folder, name in _names(list(folders)).items():
        try:
            rows.append({"run": name, "folder": str(folder), **_described(folder)})
        except (ValueError, OSError) as error:  # also a StoreError
            skipped[name] = one_line(error)
    columns = ["run", "folder", "status", "reason", "last_error", "best_error", "best_epoch"]
    return Runs(pd.DataFrame(rows, columns=[*columns, *_FROM_CONFIG, "concordance"]), skipped)


_AT_ONCE = 500  # files at a time, since pyarrow keeps the footer of each
_TEXTS = [column.name for column in schema() if column.type == pa.string()]
_MARKS = ("status.json", "config.yaml", "metrics")


def _names(folders: list[Path]) -> dict[Path, str]:
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return {folder: "/".join(folder.parts[-depth:]) for folder in folders}


def _described(folder: Path) -> dict[str, Any]:
    """Describe a run from its configuration and status.

    Raises:
        StoreError: it has not ended, belongs to another version, or its table is damaged.
        ValueError: a part of its table is missing.
    """
    run = RunFolder(folder)
    result = run.result()
    if result is None:
        raise StoreError("it is empty: it was stopped before it started")
    if not result.counts:
        raise StoreError(_not_counted(result))
    config = run.stored_config()
    described = {name: _value(config, keys) for name, keys in _FROM_CONFIG.items()}
    parts = parts_of(folder / "metrics")
    if not parts:
        raise StoreError("it has no table")
    for part in parts:
        try:
            columns = pq.read_schema(part)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{part} is damaged: {one_line(error)}") from error
        if not columns.equals(schema()):
            raise StoreError(f"its table belongs to another version: it has the columns {columns.names}")
    if config.get("label") is not None:
        described["condition"] = config["label"]
    described["rule"] = rule_name(described["rule"])
    concordance = rules.concordance(described["rule"], described["options"])
    status = {
        name: getattr(result, name) for name in ("status", "reason", "last_error", "best_error", "best_epoch")
    }
    return {**status, **described, "concordance": concordance}


def _not_counted(result: RunResult) -> str:
    after = f"after {result.epoch} epochs"
    return (
        f"{result.status} {after}" if result.reason is None else f"{result.status} {after}: {result.reason}"
    )


def _value(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = config
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            made_by = config.get("provenance", {}).get("versions", {}).get("feedbackhook", "unknown")
            raise StoreError(
                f"it belongs to another version ({made_by}): its config.yaml has no {'.'.join(keys)}"
            )
        value = value[key]
    return value


def _scan(parts: Mapping[str, str], condition: ds.Expression) -> pd.DataFrame:
    """Read the rows of these files for which a condition holds, with the names that the runs have here."""
    reading = ds.ParquetFileFormat(
        read_options=ds.ParquetReadOptions(dictionary_columns=_TEXTS),  # a tenth of the memory
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True),
    )
    columns = [
        column.with_type(pa.dictionary(pa.int32(), pa.string())) if column.name in _TEXTS else column
        for column in schema()
    ]
    names = list(dict.fromkeys(parts.values()))
    code = {name: number for number, name in enumerate(names)}
    batches, codes = [], [np.empty(0, np.int32)]
    files = list(parts)
    for start in range(0, len(files), _AT_ONCE):
        source = ds.dataset(files[start : start + _AT_ONCE], schema=pa.schema(columns), format=reading)
        for batch, fragment in source.scanner(columns=schema().names, filter=condition).scan_batches():
            batches.append(batch)
            codes.append(np.full(batch.num_rows, code[parts[fragment.path]], np.int32))
    run = pa.DictionaryArray.from_arrays(np.concatenate(codes), pa.array(names, pa.string()))
    table = pa.Table.from_batches(batches, pa.schema(columns)).set_column(0, "run", run)
    return (
        table.unify_dictionaries().to_pandas(split_blocks=True, self_destruct=True).astype({"depth": "Int64"})
    )
