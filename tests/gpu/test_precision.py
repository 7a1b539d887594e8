"""Memory layout and half precision on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.gpu import (
    DEVICE,
    assert_follows,
    assert_half_follows,
    cnn,
    feedback_of,
    home,
    moved,
    under_autocast,
)
from support.oracle import (
    Gradients,
    Step,
    assert_same_gradients,
    assert_unlike,
    gradients,
    read_gradients,
    swapped_saved_tensors,
)
from support.problems import Net, draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook
from feedbackhook import Patch


@pytest.mark.parametrize("mode", ["tensor", "sign", "frSF", "brSF", "random"])
def test_channels_last(mode):
    plain, x = redrawn(Net()), draw(2, 2, 9, 9)
    model, patch = moved(plain.to(memory_format=torch.channels_last), mode)
    batch = x.to(DEVICE, memory_format=torch.channels_last)
    for _ in range(2):
        got = gradients(model, batch)
        assert_follows(got, plain, feedback_of(patch), x, unlike=["input", "stem.weight"])
    laid_out = feedbackhook.patch(redrawn(Net()).to(DEVICE), mode, **_own_tensors(mode, patch))
    for name, v in feedback_of(patch).items():
        # draws depend on the position in the matrix, not in memory
        tolerance = bounds.HALF_OF_FLOAT64 * v.norm()
        assert (feedback_of(laid_out)[name] - v).norm() <= tolerance, name


def _own_tensors(mode: str, patch: Patch) -> dict[str, dict[str, Tensor]]:
    return {"feedback": feedback_of(patch)} if mode == "tensor" else {}


HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


HALF_NETWORKS = {
    "mlp": (mlp, draw(32, 4)),
    "cnn": (cnn, draw(8, 2, 9, 9)),
}


@HALVES
@pytest.mark.parametrize("network", HALF_NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["uSF", "frSF", "brSF", "random"])
def test_autocast_follows_v(mode, layout, network, dtype):
    build, x = HALF_NETWORKS[network]
    if layout == torch.channels_last and x.dim() != 4:
        pytest.skip("has no channels")
    plain = build()
    model, patch = moved(plain.float().to(memory_format=layout), mode)
    plain.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        batch = x.float().to(DEVICE)
        if layout == torch.channels_last:
            batch = batch.to(memory_format=layout)
        got = gradients(model, batch, under_autocast(dtype))
        assert got.parameters["0.weight"].dtype == torch.float32
        assert_half_follows(got, plain, feedback, x, dtype)
        optimizer.step()


def loss_gradients(plain: nn.Module, x: Tensor, loss_of: Step, feedback: Mapping[str, Tensor]) -> Gradients:
    """Return the gradients of a loss by the saved-tensor oracle; without feedback, by backprop."""
    model = copy.deepcopy(plain)
    with swapped_saved_tensors(model, feedback):
        output = model(x.clone().requires_grad_())
        loss_of(output).backward()
    return read_gradients(model, output.detach(), output)


def draws_of(patch: Patch) -> set[int]:
    return {layer["draws"] for layer in patch.state_dict()["layers"].values()}


@HALVES
@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_training_in_half_precision_learns_and_follows_v(mode, dtype):
    """For float16 with a gradient scaler, which skips steps that overflow; those do not redraw V either."""
    plain, x = mlp(), draw(32, 4)
    target = 2 + draw(32, 3, seed=1)
    model, patch = moved(plain.float(), mode)
    plain.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**30, enabled=dtype == "float16")
    losses, skipped = [], 0

    def loss_of(output: Tensor) -> Tensor:
        return F.mse_loss(output, target.to(output))

    for _ in range(60):
        plain.load_state_dict(model.state_dict())
        feedback, before = feedback_of(patch), draws_of(patch)
        optimizer.zero_grad()
        output = under_autocast(dtype)(model, x.float().to(DEVICE))
        loss = loss_of(output)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        got = home(read_gradients(model, output.detach(), output))
        finite = all(grad.isfinite().all() for grad in got.parameters.values())
        if finite:
            want, exact = (loss_gradients(plain, x, loss_of, v) for v in (feedback, {}))
            # The error signal at the output is a difference, with the output's rounding errors.
            cancels = (want.output.norm() / (want.output - target).norm()).item()
            assert_same_gradients(got, want, (1 + cancels) * bounds.of_autocast(3, dtype))
            assert_unlike(got, exact, ["0.weight", "2.weight"])
            losses.append(loss.item())
        skipped += not finite
        scaler.step(optimizer)
        scaler.update()
        assert (draws_of(patch) != before) == (finite and mode == "brSF")
    assert losses[-1] < losses[0] / 2
    assert (skipped > 0) == (dtype == "float16")
