"""Describe a sweep for its reports: write sweep.yaml and manifest.json into its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import SweepConfig, rule_name
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.published import PUBLICATIONS, published_errors
from feedbackhook.experiments.sweep.controls import REFERENCE, is_control
from feedbackhook.experiments.sweep.grid import PlannedRun
from feedbackhook.rules import make_rule, rule_values
from feedbackhook.store import manifest
from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.manifest import Manifest, ManifestCondition, ManifestRun, Published, PublishedPoint


def write(config: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    """Write the sweep's configuration and its manifest into its folder."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "sweep.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    manifest.write(describe(config, runs), folder)


def describe(config: SweepConfig, runs: Sequence[PlannedRun]) -> Manifest:
    """Return the manifest of a sweep.

    Args:
        config: configuration of the sweep, as :func:`feedbackhook.experiments.sweep.grid.shrink` returns it.
        runs: its plan.
    """
    own = isinstance(config.conditions, dict)
    one_of_each = {run.condition: run for run in runs}
    conditions = {name: _condition(run, own) for name, run in one_of_each.items()}
    p = config.protocol
    return Manifest(
        datasets={name: _note(name) for name in config.datasets},
        conditions=conditions,
        reference=next(iter(conditions)) if own else REFERENCE,
        epochs=p.epochs,
        batch_size=p.batch_size,
        batch_sizes=p.batch_sizes,
        seed=p.seed,
        seeds=p.seeds,
        val_fraction=config.data.val_fraction,
        published=_published(config.datasets, conditions),
        runs=[_run(run) for run in runs],
        lr_pruning=p.lr_pruning,
    )


def _run(run: PlannedRun) -> ManifestRun:
    protocol = run.config.protocol
    return ManifestRun(
        name=run.name,
        dataset=run.dataset,
        condition=run.condition,
        lr_factor=run.lr_factor,
        lr=run.config.optimizer.lr,
        seed=run.seed,
        batch_size=protocol.batch_size,
        batch_sizes=protocol.batch_sizes,
        procedure=run.procedure.name or None,
    )


def _condition(run: PlannedRun, own: bool) -> ManifestCondition:
    """Describe the condition of a run; ``own``: whether the sweep defines its conditions itself."""
    rule = rule_name(run.mode)
    if is_control(run.condition):
        return ManifestCondition(rule, control=True)
    if own:
        return ManifestCondition(rule)
    known = Condition.parse(run.condition)
    series = known.without("concordance").name
    if known.feedback is None:
        return ManifestCondition(rule, series)
    values = rule_values(make_rule(known.feedback, dict(known.options)))
    return ManifestCondition(rule, series, values.get("concordance"))


def _note(dataset: str) -> str:
    return DATASETS[dataset].note if dataset in DATASETS else ""


def _published(datasets: Sequence[str], conditions: Mapping[str, ManifestCondition]) -> Published | None:
    """The errors for these datasets and conditions, of the first publication that has any."""
    rows = published_errors()
    rows = rows[rows["dataset"].isin(list(datasets))]
    if rows.empty:
        return None
    publication = PUBLICATIONS[rows["publication"].iloc[0]]
    rows = rows[rows["publication"] == publication.name]
    errors: dict[str, dict[str, float]] = {}
    for row in rows[rows["condition"].isin([*conditions, publication.reference])].itertuples():
        errors.setdefault(row.dataset, {})[row.condition] = row.error
    series = {condition.series for condition in conditions.values() if condition.concordance is not None}
    curves = [
        PublishedPoint(row.dataset, row.series, row.concordance, row.error)
        for row in rows[rows["series"].isin(series)].dropna(subset="concordance").itertuples()
    ]
    return Published(publication.citation, publication.name, publication.reference, errors, curves)
