"""The manifest of a sweep: the runs that it planned, and what its reports need to know about them.

A sweep writes `manifest.json` beside its `sweep.yaml`. Reports read it, so that they need neither plan the
sweep again nor import the code that ran it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.errors import StoreError, one_line

NAME = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class ManifestRun:
    """One planned run.

    Args:
        name: name of its run folder, inside the sweep's folder.
        dataset: name of its data.
        condition: name of its condition, a key of `Manifest.conditions`.
        lr_factor: factor that `lr` contains.
        lr: learning rate of the first epoch.
        seed: seed of the run.
        batch_size: global batch size.
        batch_sizes: batch sizes that take effect when an epoch ends.
        procedure: name of the second training procedure that its condition allows; None for the usual one.
    """

    name: str
    dataset: str
    condition: str
    lr_factor: float
    lr: float
    seed: int
    batch_size: int
    batch_sizes: dict[int, int] = field(default_factory=dict)
    procedure: str | None = None


@dataclass(frozen=True)
class ManifestCondition:
    """One condition.

    Args:
        rule: rule of its feedback weights, "mixed" for several; None for backprop.
        series: name that conditions share if they differ in concordance alone; None for a condition that the
            sweep defines itself.
        concordance: its concordance, 0 to 1; None if `series` has none.
        control: whether it is a control, in which no error signal passes below the classifier.
    """

    rule: str | None = None
    series: str | None = None
    concordance: float | None = None
    control: bool = False


@dataclass(frozen=True)
class PublishedPoint:
    """One point of a published curve of error, in percent, against concordance."""

    dataset: str
    series: str
    concordance: float
    error: float


@dataclass(frozen=True)
class Published:
    """Published errors to show beside those of the sweep.

    Args:
        citation: where they are published.
        label: the citation in a few words, for legends.
        reference: condition with which the publication compares the others.
        errors: test error in percent, by dataset and condition: those of the sweep, and the reference.
        curves: errors against concordance, for the series of the sweep.
    """

    citation: str
    label: str
    reference: str
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: list[PublishedPoint] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """What a sweep planned.

    Args:
        datasets: a note on each dataset, shown wherever its results are; empty if there is nothing to say.
        conditions: its conditions by name, in order.
        reference: condition with which the others are compared.
        epochs: passes over the training set.
        batch_size: global batch size.
        batch_sizes: batch sizes that take effect when an epoch ends.
        seed: the first seed.
        seeds: number of seeds.
        val_fraction: fraction of each class of the training set that is held out for validation.
        published: published errors for these datasets and conditions; None if there are none.
        runs: the planned runs, in the order in which they start.
        lr_pruning: epochs after which the worse half of the learning rates was pruned.
    """

    datasets: dict[str, str]
    conditions: dict[str, ManifestCondition]
    reference: str
    epochs: int
    batch_size: int
    batch_sizes: dict[int, int]
    seed: int
    seeds: int
    val_fraction: float
    published: Published | None
    runs: list[ManifestRun]
    lr_pruning: list[int] = field(default_factory=list)


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a manifest."""
    return (Path(folder) / NAME).is_file()


def write(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Write the manifest into a sweep's folder; a kill leaves the old file or the new one."""
    content = {"version": _VERSION, **asdict(manifest)}
    runs = ",\n".join(f"    {json.dumps(run, ensure_ascii=False)}" for run in content.pop("runs"))
    shared = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}")
    with atomic_write(Path(folder) / NAME) as temporary:
        temporary.write_text(f'{shared},\n  "runs": [\n{runs}\n  ]\n}}\n', encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest in a sweep's folder.

    Raises:
        StoreError: the folder holds no sweep, its manifest is missing or damaged, or another version of
            feedbackhook wrote it.
    """
    path = sweep_file(folder, NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("version")
        if version == _VERSION:
            return _parsed(content)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({one_line(error)}): {_rerun(folder)}") from error
    raise StoreError(
        f"{path} has version {version}, but this feedbackhook reads {_VERSION}: {_rerun(folder)}"
    )


def sweep_file(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of one of the files that a sweep leaves in its folder.

    Raises:
        StoreError: there is no such file; the message says what the folder holds instead.
    """
    path = Path(folder) / name
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise StoreError(f"there is no folder {folder}")
    if (path.parent / "sweep.yaml").is_file():
        raise StoreError(f"{folder} has a sweep.yaml but no {name}: {_rerun(folder)}")
    if (path.parent.parent / "sweep.yaml").is_file():
        raise StoreError(f"{folder} holds no sweep, but is a run of the one in {path.parent.parent}")
    if (path.parent / "config.yaml").is_file():
        raise StoreError(
            f"{folder} is a single run, not a sweep: `feedbackhook plot {folder}` draws it, and "
            "`feedbackhook compare` compares it with others"
        )
    raise StoreError(f"{folder} holds no sweep: there is no {path}")


def _rerun(folder: str | os.PathLike[str]) -> str:
    file = Path(folder) / "sweep.yaml"
    return (
        f"run `feedbackhook sweep {file} --output {folder}` to write it again; runs that have ended are not "
        "repeated"
    )


def _parsed(content: Mapping[str, Any]) -> Manifest:
    published = content["published"]
    if published is not None:
        curves = [PublishedPoint(**point) for point in published["curves"]]
        published = Published(**{**published, "curves": curves})
    fields = {
        **content,
        "conditions": {name: ManifestCondition(**given) for name, given in content["conditions"].items()},
        "batch_sizes": _by_epoch(content["batch_sizes"]),
        "published": published,
        "runs": [
            ManifestRun(**{**run, "batch_sizes": _by_epoch(run["batch_sizes"])}) for run in content["runs"]
        ],
    }
    return Manifest(**fields)


def _by_epoch(sizes: Mapping[str, int]) -> dict[int, int]:
    """Batch sizes by epoch: JSON has no keys but text."""
    return {int(epoch): size for epoch, size in sizes.items()}
