"""Shared by the recipes that are sweeps: their command lines, how they run, and their colors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import ArgumentParser

from feedbackhook import cli
from feedbackhook.experiments import profiling
from feedbackhook.experiments.config import SweepConfig
from feedbackhook.report import theme

SMOKE = {
    "data.val_fraction": "0",
    "data.train_images": "60",
    "data.test_images": "50",
    "protocol.epochs": "1",
    "protocol.batch_size": "20",
}
"""Options that make a sweep on digits take seconds."""


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """Build a parser for a recipe's own options; call its `parse_known_args` to get the others.

    It is argparse's, because jsonargparse does not parse some options and return the rest.
    """
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other option is passed to `feedbackhook sweep` (see `feedbackhook sweep --help`).",
        allow_abbrev=False,
    )
    made.add_argument("--output", type=Path, default=Path(output), help=f"output folder (default: {output})")
    made.add_argument("--smoke", action="store_true", help="run on very little data to check that it works")
    return made


def options(settings: Mapping[str, str]) -> list[str]:
    """Turn settings into command-line options."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def configured(yaml: Path, given: Sequence[str]) -> SweepConfig:
    """Return the sweep in `yaml` with the given options, without running it."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_class_arguments(SweepConfig)
    parsed = parser.instantiate(parser.parse_args(["--config", str(yaml), *given]))
    return SweepConfig(**{field.name: parsed[field.name] for field in fields(SweepConfig)})


def profile(yaml: Path, folder: Path, given: Sequence[str], modes: Sequence[str]) -> None:
    """Profile the sweep's network on its first dataset before any training; print and write the profile.

    A profile that is in `folder` already is not repeated.
    """
    if (folder / "profile.csv").exists():
        print(f"profile: {folder}/profile.csv")
        return
    sweep = configured(yaml, given)
    found = profiling.profile(
        profiling.ProfileConfig(
            str(sweep.model.name),
            replace(sweep.data, name=sweep.datasets[0]),
            weights=sweep.model.weights,
            options=sweep.model.options,
            trainable=sweep.model.trainable,
            modes=list(modes),
            batch_size=sweep.protocol.batch_size,
            seed=sweep.protocol.seed,
            device=sweep.protocol.device,
            threads=sweep.protocol.threads or 1,
        )
    )
    print(found, *found.write(folder), sep="\n")


def sweep(yaml: Path, folder: Path, given: Sequence[str]) -> None:
    """Run the sweep in `yaml` with the given options, then print and write its table.

    Finished runs are not repeated. If the sweep cannot start or a run fails, the process exits with the
    status of `feedbackhook sweep`.
    """
    for arguments in (["sweep", str(yaml), *given, "--output", str(folder)], ["table", str(folder)]):
        if status := cli.main(arguments):
            sys.exit(status)


def condition_colors(conditions: Iterable[str]) -> dict[str, object]:
    """Return the theme's colors for backprop and random feedback, and a scale for the other conditions."""
    fixed = {name: theme.look(name).color for name in ("backprop", "random")}
    others = [name for name in conditions if name not in fixed]
    return fixed | dict(zip(others, theme.sequence(len(others)), strict=True))
