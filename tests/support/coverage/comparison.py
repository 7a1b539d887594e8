"""One comparison of a whole model under a patch with an unpatched one and two oracles."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import feedbackhook
from support import oracle
from support.coverage.models import outputs
from support.coverage.replaced_functions import RULE, Seen, replaced_functions
from support.oracle import Gradients


@dataclass
class Row:
    """One row of the table."""

    case: str  # its name among the library's cases
    family: str = ""
    model: str = ""
    input: str = ""
    layers: int = 0
    calls: int = 0
    rerouted: int = 0
    error: float = math.nan  # the largest relative one of all parameters
    oracles: str = ""
    result: str = "ok"


def compare(
    model: nn.Module,
    x: Tensor,
    row: Row,
    *,
    step: oracle.Step = outputs,
    exclude: Sequence[type[nn.Module]] = (),
    saved_tensors: bool = True,
    tolerance: float = oracle.TOLERANCE,
) -> None:
    """Assert that `model` under a patch agrees with the oracles, and put the measurements into `row`.

    Args:
        model: prepared and unpatched. It cannot be used again, since the last run works on it and not on a
            copy.
        x: the batch.
        row: receives the counts and the error.
        step: runs the model and returns one tensor.
        exclude: types of layers that stay exact; none that calls a function in `FUNCTIONS`.
        saved_tensors: whether the saved-tensor oracle must agree. If not, it must disagree, so that a case is
            not left out for longer than needed.
        tolerance: relative, for gradients.
    """
    row.input = "x".join(map(str, x.shape))

    def run(model: nn.Module) -> Gradients:
        torch.manual_seed(0)
        result = oracle.gradients(model, x, step, input_requires_grad=False)
        model.zero_grad()
        return result

    untouched, patched = copy.deepcopy(model), copy.deepcopy(model)
    exact = run(untouched)
    patch = feedbackhook.patch(patched, **RULE, exclude=list(exclude) or None)
    got = run(patched)
    row.layers = len(patch.layers)
    row.calls = sum(layer.calls for layer in patch.layers)
    row.rerouted = sum(layer.rerouted for layer in patch.layers)
    for (name, a), b in zip(untouched.named_buffers(), patched.buffers(), strict=True):
        assert torch.equal(a, b), f"the buffer {name} has changed"
    del untouched  # large models would not fit in so many copies
    literal = copy.deepcopy(model)
    with replaced_functions(literal) as seen:
        want = run(literal)
    behind = seen.behind_feedback(literal)
    seen.edges.clear()
    del literal

    assert torch.equal(got.output, exact.output), "the forward has changed"
    assert torch.equal(want.output, exact.output), "the oracle's forward has changed"
    assert exact.output.isfinite().all(), "the forward is not finite"

    apart = oracle.distances(got, want)
    row.error = max(apart.values())
    row.oracles = "functions"
    assert all(d <= tolerance for d in apart.values()), f"gradients differ from the oracle's: {worst(apart)}"
    assert_counted(patch, seen)
    assert row.rerouted == sum(seen.rerouted.values()) > 0
    assert_unlike_backprop(got, exact, behind)
    del want, exact

    feedback = {name: patch.feedback(name) for name in seen.input_requires_grad}
    patch.remove()
    del patch, patched
    with oracle.swapped_saved_tensors(model, feedback):
        swapped = run(model)
    apart = oracle.distances(got, swapped)
    agree = all(d <= tolerance for d in apart.values())
    if saved_tensors:
        row.oracles += ", saved tensors"
        row.error = max(row.error, *apart.values())
        assert agree, f"gradients differ from the saved-tensor oracle's: {worst(apart)}"
    else:
        assert not agree, "the saved-tensor oracle agrees: it need not be left out any more"
    row.result += remarks(seen)


def remarks(seen: Seen) -> str:
    """What the table says about weights that are not plain parameters of a layer, or get no error signal."""
    text = ""
    if seen.derived:
        text += f"; {len(seen.derived)} derived weights"
    if seen.foreign:
        text += f"; exact, for no layer holds the weight: {', '.join(sorted(seen.foreign))}"
    expected = seen.input_requires_grad
    if unused := [name for name, count in expected.items() if seen.rerouted[name] < count]:
        text += f"; no error signal comes to: {', '.join(sorted(unused))}"
    return text


def assert_counted(patch: feedbackhook.Patch, seen: Seen) -> None:
    """Assert that the patch counted the calls and the error signals that the oracle saw."""
    counted = {layer.name: (layer.calls, layer.rerouted) for layer in patch.layers if layer.calls}
    expected = {name: (seen.calls[name], seen.rerouted[name]) for name in seen.calls}
    wrong = {name: (counted.get(name), expected.get(name)) for name in {*counted, *expected}}
    wrong = {name: both for name, both in wrong.items() if both[0] != both[1]}
    assert not wrong, f"(calls, rerouted) of the patch, and what they must be: {wrong}"


def worst(apart: dict[str, float], count: int = 5) -> str:
    """The largest distances, for a message."""
    rows = sorted(apart.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)
    return f"{sum(d > 0 for d in apart.values())} of {len(apart)}, the worst {rows[:count]}"


def assert_unlike_backprop(got: Gradients, exact: Gradients, behind: set[str]) -> None:
    """Assert that gradients behind a V differ from backprop's, and that all others equal backprop's.

    A gradient is left out if both are below `TOLERANCE` of the largest: in theory it is zero, such as that of
    a bias before a normalization.
    """
    largest = max(g.norm().item() for g in exact.parameters.values() if g is not None)
    apart = oracle.distances(got, exact)
    alike, unlike = [], []
    for name, a in got.parameters.items():
        b = exact.parameters[name]
        assert (a is None) == (b is None), f"only one of the two gives {name} a gradient"
        if a is None or (size := max(a.norm().item(), b.norm().item())) <= oracle.TOLERANCE * largest:
            continue
        distance = (a - b).norm().item() / size
        if name in behind and not distance > oracle.UNLIKE:
            alike.append((name, distance))
        if name not in behind and not apart[name] <= oracle.TOLERANCE:
            unlike.append((name, apart[name]))
    assert behind, "no gradient came through a feedback weight"
    assert not alike, f"backprop's gradients, behind feedback weights: {alike}"
    assert not unlike, f"not backprop's gradients, though not behind feedback weights: {unlike}"
