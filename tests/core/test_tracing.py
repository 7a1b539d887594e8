"""TorchScript, torch.export and ONNX are refused, with what to do instead, and leave the model as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from support.oracle import assert_matches_oracle, gradients, probe
from support.problems import MLP_UPSTREAM, draw, mlp, outside_every_forward
from torch import Tensor, nn

import feedbackhook

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def script(model: nn.Module, x: Tensor) -> object:
    return torch.jit.script(model)


def trace(model: nn.Module, x: Tensor) -> object:
    return torch.jit.trace(model, x)


def export(model: nn.Module, x: Tensor) -> object:
    return torch.export.export(model, (x,), strict=False)


def export_strictly(model: nn.Module, x: Tensor) -> object:
    return torch.export.export(model, (x,), strict=True)


def export_for_onnx(model: nn.Module, x: Tensor) -> object:
    """By the exporter that traces, as far as it gets without the package `onnx`."""
    return torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)


TRACERS = (script, trace, export, export_strictly, export_for_onnx)
NO_PATCH_NEEDED = (script, trace, export, export_strictly)
ENABLED = pytest.mark.parametrize("enabled", [True, False], ids=["with gradients", "under no_grad"])


def assert_as_before(model: nn.Sequential, patch: feedbackhook.Patch) -> None:
    """Eager gradients, `exact`, `measure` and the guard."""
    plain, x = copy.deepcopy(model), draw(3, 4)
    feedbackhook.unpatch(plain)
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=MLP_UPSTREAM)

    leaf = x.clone().requires_grad_()
    with patch.exact():
        probe(model(leaf)).backward()
    expected = gradients(plain, x)
    torch.testing.assert_close(leaf.grad, expected.input, rtol=1e-9, atol=1e-12)

    rows = feedbackhook.measure(patch, probe(model(x)))
    assert {row.layer for row in rows} >= {"0", "2", "4"}

    with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of '[02]'"):
        outside_every_forward(model, x.clone().requires_grad_()).sum().backward()


@ENABLED
@pytest.mark.parametrize("part", ["", "2"], ids=["whole", "part"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_patched_model_cannot_be_traced_and_is_as_before(tracer, part, enabled):
    model = mlp()
    patch = feedbackhook.patch(model, "sign")
    module = model.get_submodule(part)
    with (
        torch.set_grad_enabled(enabled),
        pytest.raises(Exception, match=r"[Rr]emove the patch first") as raised,
    ):
        tracer(module, draw(3, 6 if part else 4))
    assert "feedbackhook.unpatch(model)" in str(raised.value)
    if tracer is not export_strictly:  # dynamo wraps whatever is raised while it traces
        assert type(raised.value) is RuntimeError
    assert torch._C._len_torch_function_stack() == 0
    assert_as_before(model, patch)


@pytest.mark.parametrize("tracer", NO_PATCH_NEEDED)
def test_after_removal_it_can_be_traced(tracer):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    with pytest.raises(Exception, match=r"[Rr]emove the patch first"):
        tracer(model, x)
    patch.remove()
    traced = tracer(model, x)
    run: Callable[[Tensor], Tensor] = traced.module() if hasattr(traced, "module") else traced
    torch.testing.assert_close(run(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tracer", [trace, export])
def test_tracing_another_model_disturbs_no_patched_one(tracer):
    model, other = mlp(), mlp()
    patch = feedbackhook.patch(model, "sign")
    gradients(model, draw(3, 4))
    tracer(other, draw(3, 4))
    assert_as_before(model, patch)


def test_a_copy_of_a_part_can_be_scripted_once_its_marks_are_off():
    """They come off when the copy is first looked at, or run."""
    model = mlp()
    feedbackhook.patch(model)
    part = copy.deepcopy(model[2])
    assert feedbackhook.get_patch(part) is None
    x = draw(3, 6)
    torch.testing.assert_close(torch.jit.script(part)(x), part(x))
