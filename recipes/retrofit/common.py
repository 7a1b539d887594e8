"""What the recipes share that are sweeps: their options, running them, and colours."""

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
"""What makes a sweep on digits one of seconds."""


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """Of the options that are a recipe's own; all others are those of `feedbackhook sweep`."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other option is one of `feedbackhook sweep` (see `feedbackhook sweep --help`).",
        allow_abbrev=False,
    )
    made.add_argument("--output", type=Path, default=Path(output), help=f"the folder; {output} if not given")
    made.add_argument("--smoke", action="store_true", help="on little, to see that it works: seconds")
    return made


def options(settings: Mapping[str, str]) -> list[str]:
    """Settings as options of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def sweep(yaml: Path, folder: Path, given: Sequence[str]) -> None:
    """Run the sweep in ``yaml`` with these options, and print and write its table; what has ended is not
    repeated. Where it cannot run, or a run failed, the process ends with the command line's status."""
    for arguments in (["sweep", str(yaml), *given, "--output", str(folder)], ["table", str(folder)]):
        if status := cli.main(arguments):
            sys.exit(status)


def colours(conditions: Iterable[str]) -> dict[str, object]:
    """Backprop and random feedback have their own, the others are a scale, in their order."""
    own = {name: theme.look(name).color for name in ("backprop", "random")}
    scale = [name for name in conditions if name not in own]
    return own | dict(zip(scale, theme.sequence(len(scale)), strict=True))
