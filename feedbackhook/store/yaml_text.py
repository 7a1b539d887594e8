"""YAML text of configurations, read and written ten times as fast with libyaml where it is installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml  # type: ignore[import-untyped]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def dump(content: Mapping[str, Any]) -> str:
    """Return `content` as YAML, in the order of its keys."""
    text: str = yaml.dump(dict(content), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return text


def load(text: str) -> Any:
    """Return the content of YAML text."""
    return yaml.load(text, _LOADER)


def load_shared(text: str) -> Any:
    """Return the content of YAML text; do not change it, since equal sections are shared between calls.

    The configurations of a sweep have most sections in common. To parse each section once saves minutes for
    ten thousand of them.
    """
    sections = re.findall(r"^\w+:.*\n(?:[ -].*\n)*", text, re.MULTILINE)
    if "".join(sections) != text or "&" in text:  # not as `dump` writes it, or sections that share objects
        return load(text)
    content: dict[str, Any] = {}
    try:
        for section in sections:
            content.update(_section(section))
    except (yaml.YAMLError, TypeError, ValueError):
        return load(text)  # whose error names the line
    return content


@cache
def _section(text: str) -> Any:
    return load(text)
