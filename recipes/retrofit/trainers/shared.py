"""Shared by the recipes for other trainers: the digits, and what is printed at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import feedbackhook


def digits() -> TensorDataset:
    """Return scikit-learn's digits: images `[N, 1, 8, 8]` from 0 to 1, and labels `[N]`."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return TensorDataset(images, torch.from_numpy(found.target).long())


def make_console() -> Console:
    """Return a console that is wide enough for the layers' names."""
    return Console(soft_wrap=True, width=200)


def summarize(
    console: Console, patch: feedbackhook.Patch, losses: Sequence[float], show: bool = True
) -> None:
    """Print each layer's calls, rerouted error signals and weight angle, and the training loss.

    Args:
        console: Where to print.
        patch: The patch on the model.
        losses: Training losses, in the order of the steps or epochs.
        show: Whether this process prints. Measuring gathers sharded weights, so all processes must call.
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
