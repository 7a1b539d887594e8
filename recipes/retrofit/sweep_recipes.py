"""Shared by the recipes that are sweeps: their command lines, how they run, and their colors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from feedbackhook import cli
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
