"""`feedbackhook inspect`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from feedbackhook.cli.parsers import Command, config_from
from feedbackhook.cli.printing import plain_table, print_whole

if TYPE_CHECKING:
    from feedbackhook.experiments.models.inspection import Inspection


def _arguments(parser: ArgumentParser) -> None:
    from feedbackhook.experiments.models.inspection import InspectConfig

    parser.add_class_arguments(InspectConfig, as_positional=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _inspect(given: Namespace) -> int:
    from feedbackhook.experiments.models.inspection import InspectConfig, inspect

    found = inspect(config_from(InspectConfig, given))
    if given.json:
        content = {**vars(found), "layers": [layer._asdict() for layer in found.layers]}
        print(json.dumps(_without_nan(content), indent=2))
    else:
        print_whole(_layer_table(found), *_totals(found))
    return 0


def _layer_table(found: Inspection) -> Table:
    table = plain_table()
    numbers = ("depth", "weights", "angle V, W", "norm V / W")
    for heading in ("depth", "layer", "kind", "shape", "weights", "rule", "input grad", *numbers[2:]):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            "unused" if layer.depth is None else str(layer.depth),
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            layer.rule or "exact",
            {True: "yes", False: "no", None: ""}[layer.input_requires_grad],
            _number(layer.weight_angle, ".1f", "°"),
            _number(layer.norm_ratio, ".2f"),
        )
    return table


def _number(value: float | None, how: str, unit: str = "") -> str:
    """The value in its format; "-" if there is none, as for a direct rule, which has no V."""
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:{how}}{unit}"


def _totals(found: Inspection) -> list[str]:
    patched = sum(layer.rule is not None for layer in found.layers)
    rerouted = sum(layer.rule is not None and bool(layer.input_requires_grad) for layer in found.layers)
    share = 100 * found.patched_weights / found.parameters
    channels, height, width = found.image
    image = f"an image of {channels}x{height}x{width}" if height > 1 else f"{channels} features"
    return [
        f"{found.model} on {image}: {len(found.layers)} layers, {patched} patched, "
        f"{rerouted} of these send an error signal to their input",
        f"{found.parameters:,} parameters, {found.patched_weights:,} of them ({share:.1f}%) patched weights",
    ]


def _without_nan(content: Any) -> Any:
    """The same content with null for NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


INSPECT = Command(
    name="inspect",
    help="show a model's layers and what a patch would do",
    description="Show a model's layers in forward order, which ones would be patched, and what V would be.",
    arguments=_arguments,
    run=_inspect,
)
