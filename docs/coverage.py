"""Compare a model of every architecture of timm and torchvision with the oracles, and write docs/coverage.md.

    python docs/coverage.py                                                          # all models: hours
    python docs/coverage.py --models '[alexnet, convnext]' --output /tmp/some.md     # some, elsewhere

The tests in tests/libraries make the same comparisons. It needs `pip install -e ".[dev]"`.
"""

from __future__ import annotations

import math
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from jsonargparse import auto_cli
from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))  # for `support`

from support.coverage import direct, timm_models, torchvision_models  # noqa: E402
from support.coverage.comparison import Row  # noqa: E402

TABLE = HERE / "coverage.md"
HEAD = """# Models that were tried

Written by `python docs/coverage.py`. The tests in `tests/libraries` make the same comparisons (`make
test-all`).

Each model is as small as possible, on two images, in train mode and in float64, without dropout or drop
path; parameters that start at a small constant, zero included, are drawn at random. It is patched with
`mode="sign", magnitude="uniform"`, so V = sign(W) scaled to the norm of W, for derived weights too. It must
give the forward output and the buffers of the unpatched model in every bit; the gradients of the oracles,
which share nothing with the library (relative distance at most 2^-30, with 2^-13 of the largest gradient as
the least scale); gradients unlike backprop's wherever an error signal has passed a V, and backprop's
elsewhere; and a rerouted error signal for each call of a patched weight whose input requires a gradient. The
first layer's input, the image, requires none.

- *layers*, *calls*, *rerouted*: patched weights, their calls in one forward, and the error signals sent
  through V in one backward.
- *error*: the largest relative distance of a gradient from an oracle's, rounded up to a power of ten.
- *oracles*: "functions" replaces `F.linear` and the convolutions by functions with V's gradient; "saved
  tensors" swaps W for V among the tensors that autograd saves, which says nothing about a weight that is
  derived from parameters.

In "timm with direct feedback" the same models are patched with `"DFA"`, at layers and at blocks (`sites`).
Their oracle, "pieces", cuts an unpatched model at the sites and gives each piece its error signal. Layers
whose batch is not that of the output, such as those inside the windows of Swin, are excluded, as the error
that names them says.
"""


@dataclass(frozen=True)
class Library:
    """A library whose models are compared: its name, version, models, and the comparison of one."""

    name: str
    version: str
    models: Sequence[str]
    fill: Callable[[Row], None]


LIBRARIES = (
    Library("timm", timm.__version__, timm_models.IDS, timm_models.fill),
    Library("timm with direct feedback", timm.__version__, direct.IDS, direct.fill),
    Library("torchvision", torchvision.__version__, torchvision_models.IDS, torchvision_models.fill),
)


def main(
    libraries: list[str] | None = None, models: list[str] | None = None, output: str = str(TABLE)
) -> int:
    """Write the tables of docs/coverage.md.

    Args:
        libraries: some of timm, "timm with direct feedback" and torchvision; null: all.
        models: names in the tables' column "module"; null: all. A table of some models may not
            replace that of all, so this needs another `output`.
        output: the file to write; sections that are not compared are those of docs/coverage.md.
    """
    if models is not None and Path(output).resolve() == TABLE:
        raise SystemExit("a table of some models would replace that of all: give another --output")
    chosen = [library for library in LIBRARIES if libraries is None or library.name in libraries]
    known = {name for library in chosen for name in library.models}
    if unknown := set(models or ()) - known:
        raise SystemExit(f"unknown models {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*belong to no layer that can be patched")  # it is in the table
    text, failures = TABLE.read_text(), 0
    for library in chosen:
        names = [name for name in library.models if models is None or name in models]
        if names:
            rows = [compared(library, name) for name in names]
            failures += sum(failed(row) for row in rows)
            text = with_section(text, library.name, section(library, rows))
    Path(output).write_text(text)
    return 1 if failures else 0


def compared(library: Library, name: str) -> Row:
    """The row of one model, also if the comparison fails."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    row = Row(name, name)
    try:
        library.fill(row)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # the others still count
        reason = str(error).splitlines()[0] if str(error) else ""
        row.result = f"FAILED: {type(error).__name__}: {reason}"[:200]
    console.print(f"{library.name} {name}: {row.result}")
    return row


def failed(row: Row) -> bool:
    return row.result.startswith("FAILED")


def section(library: Library, rows: Sequence[Row]) -> str:
    """The table of one library in Markdown, with its heading."""
    versions = f"torch {torch.__version__}, {library.name.split()[0]} {library.version}"
    lines = [
        f"## {library.name}",
        "",
        f"{len(rows)} models, {sum(failed(row) for row in rows)} failures; "
        f"Python {platform.python_version()}, {versions}, on {platform.machine()}.",
        "",
        "| module | model | input | layers | calls | rerouted | error | oracles | result |",
        "|---|---|---|---:|---:|---:|---:|---|---|",
        *(
            f"| {row.family} | {row.model} | {row.input} | {row.layers} | {row.calls} | {row.rerouted} "
            f"| {power_of_ten(row.error)} | {row.oracles} | {row.result.replace('|', '/')} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def with_section(text: str, name: str, section: str) -> str:
    """The file's text with one section replaced or added, and with the head as above."""
    parts = {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in text.split("\n## ")[1:]}
    parts[name] = section
    return "\n".join([HEAD, *(parts[title] for title in sorted(parts, key=_place))])


def _place(title: str) -> tuple[bool, str]:
    """transformers first, which is written by hand, then the libraries by name."""
    return title != "transformers", title


def power_of_ten(error: float) -> str:
    """The error, rounded up to a power of ten so that the last bits of a machine leave no trace."""
    if not math.isfinite(error):
        return "-"
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error))}"


if __name__ == "__main__":
    raise SystemExit(auto_cli(main, as_positional=False))
