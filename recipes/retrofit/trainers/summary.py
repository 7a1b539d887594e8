"""What each of these recipes prints at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

import feedbackhook


def summarise(
    console: Console, patch: feedbackhook.Patch, losses: Sequence[float], show: bool = True
) -> None:
    """Prints which layers were rerouted and how often in this process, the angle between V and W, and the
    training loss.

    Args:
        console: where to.
        patch: the patch, on the model.
        losses: in the order of the steps or epochs.
        show: whether this process prints. Where weights are sharded every process must call, since they are
            gathered.
    """
    angles = {row.layer: row.value for row in feedbackhook.measure(patch) if row.metric == "weight_angle"}
    if not show:
        return
    table = Table("layer", "rule", "calls", "rerouted", "weight angle [°]", box=box.SIMPLE, pad_edge=False)
    for row in patch.layers:
        rerouted = "input needs no grad" if row.input_requires_grad is False else str(row.rerouted)
        table.add_row(row.name, row.rule, str(row.calls), rerouted, f"{angles[row.name]:.1f}")
    console.print(table)
    if not any(row.calls for row in patch.layers):
        console.print("no call was counted: the model ran as compiled code, or not at all")
    console.print(f"training loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
