"""The rows of `Patch.layers`, and the table that `print(patch)` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from feedbackhook.core.discovery import LayerInfo, layers_in
from feedbackhook.core.layer import Patched
from feedbackhook.core.projection import Projection
from feedbackhook.core.state import PatchState
from feedbackhook.rules import describe


@dataclass(frozen=True)
class LayerRow:
    """One row of `Patch.layers`: a patched layer, or a site at a module's input, and what has happened to it.

    Args:
        info: the layer's name, kind, weight shape and fan-in. A tied weight is named after the first module
            that holds it.
        rule: the rule, with the options that differ from their defaults.
        calls: number of forward calls with gradients enabled.
        rerouted: number of error signals that went through V or B.
        input_requires_grad: whether the layer's input required a gradient. If not, as in most first layers,
            there is no error signal to reroute. None before the first call.
        depth: position, from 0, in the order of the forward's calls. None before the first call.
    """

    info: LayerInfo
    rule: str
    calls: int
    rerouted: int
    input_requires_grad: bool | None
    depth: int | None

    @property
    def name(self) -> str:
        """The layer's full name."""
        return self.info.name

    @property
    def kind(self) -> str:
        """The layer's kind, such as "Linear" or "Conv2d"."""
        return self.info.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.info.shape


def table(model: nn.Module, state: PatchState) -> str:
    """Return a table of what is patched, with rules and counts, and what the reader should know about it."""
    direct = bool(state.projections)
    head = ["layer" if state.layers else "site", "kind", "weight", "rule", "calls", "rerouted"]
    if direct:
        head += ["B", "error from above"]
    rows = [_row(each, direct) for each in state.patched]
    lines = aligned([head, *rows])
    if direct:
        lines += _about_direct(state)
    if state.layers and (exact := _exact_layers(model, state)):
        lines.append(f"exact: {', '.join(exact)}")
    return "\n".join(line.rstrip() for line in lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(each: Patched, direct: bool) -> list[str]:
    info = each.info
    row = [
        info.name or "(root)",
        info.kind,
        "x".join(map(str, info.shape)) or "-",
        describe(each.feedback.rule, leave_out=("sites", "output")),
        str(each.calls),
        "input needs no grad" if each.input_requires_grad is False else str(each.rerouted),
    ]
    if direct:
        row += [_matrix(each), {None: "", True: "gets past", False: "stops"}[each.bypassed]]
    return row


def _matrix(each: Patched) -> str:
    """Return the shape of B, (D, K), and whether it acts on each position."""
    last = each.feedback.last if isinstance(each.feedback, Projection) else None
    if last is None:
        return ""
    fits = last.fits
    return f"{fits.features}x{fits.source}{' per position' if fits.positions else ''}"


def _about_direct(state: PatchState) -> list[str]:
    sizes: dict[object, int] = {}
    for projection in state.projections:
        sizes |= projection.sizes()
    where = f"the output of {state.output!r}" if state.output else "the model's output"
    memory = "not known before the first forward"
    if sizes and any(projection.recompute for projection in state.projections):
        memory = f"none kept, the largest {_mebibytes(max(sizes.values()))}"
    elif sizes:
        memory = _mebibytes(sum(sizes.values()))
    lines = [f"error from {where}; memory of all B: {memory}"]
    past = [each.info.name for each in state.patched if each.bypassed]
    if past:
        lines.append(
            f"the error from above gets past {len(past)} of {len(state.patched)}: what is before them also "
            "receives it by exact backprop, along another path such as a skip connection; with sites= at the "
            "inputs of whole blocks it does not"
        )
    return lines


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _exact_layers(model: nn.Module, state: PatchState) -> list[str]:
    """Return the names of the layers that could be patched but are not."""
    patched = {name for layer in state.layers for name in layer.names}
    # a patched module may have been given another name since then
    modules = {target.place.module for layer in state.layers for target in layer.targets}
    return [
        name or "(root)"
        for name, module in layers_in(model).items()
        if name not in patched and module not in modules
    ]
