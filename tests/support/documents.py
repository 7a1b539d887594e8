"""The pages of the site: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        path for folder in ("docs", "recipes", "analysis/results") for path in (ROOT / folder).rglob("*.md")
    ),
]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    ((?:python|feedbackhook|pip|dask|torchrun|make) [^\n]*)", flags=re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language ("" if it names none) and its text."""

    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in _FENCE.findall(page.read_text(encoding="utf-8"))]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line on a page, without its comment."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page) if block.language in ("", "bash") for line in _joined(block.text)]
    for line in [*lines, *_INDENTED.findall(_FENCE.sub("", text))]:
        if words := shlex.split(line, comments=True):
            yield words


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()
