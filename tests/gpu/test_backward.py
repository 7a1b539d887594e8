"""The backward on a GPU, in its separate thread: exact gradients, guard, audit, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.gpu import DEVICE, assert_follows, feedback_of, home, moved
from support.oracle import assert_same_gradients, by_backprop, gradients, probe, read_gradients
from support.problems import MLP_UPSTREAM, Net, draw, mlp, outside_every_forward, redrawn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook


def test_exact_runs_backprop_and_then_feedback_on_one_graph():
    plain, x = redrawn(Net()), draw(2, 2, 9, 9)
    model, patch = moved(plain)
    leaf = x.to(DEVICE).requires_grad_()
    output = model(leaf)
    with patch.exact():
        probe(output).backward(retain_graph=True)
    exact = home(read_gradients(model, leaf, output))
    model.zero_grad()
    leaf.grad = None
    probe(output).backward()
    assert_same_gradients(exact, by_backprop(plain, x), bounds.HALF_OF_FLOAT64)
    assert_follows(read_gradients(model, leaf, output), plain, feedback_of(patch), x, unlike=["input"])


@pytest.mark.parametrize("warmed_up", [False, True], ids=["never called", "after a good step"])
def test_the_guard_names_a_weight_that_was_used_outside_every_forward(warmed_up):
    plain, x = mlp(), draw(3, 4)
    model, patch = moved(plain)
    if warmed_up:
        gradients(model, x.to(DEVICE))
    with pytest.raises(feedbackhook.ExactGradientError, match=r"'[02]'"):
        probe(outside_every_forward(model, x.to(DEVICE))).backward()
    assert_follows(gradients(model, x.to(DEVICE)), plain, feedback_of(patch), x, unlike=MLP_UPSTREAM)


def test_the_audit_names_a_weight_in_another_function():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc1(x)) @ self.fc2.weight.T

    model, _ = moved(redrawn(Odd()), "sign")
    with pytest.raises(feedbackhook.ExactGradientError, match="'fc2'"):
        probe(model(draw(3, 4).to(DEVICE))).backward()


class Checkpointed(nn.Module):
    """A checkpointed convolution with dropout, between two layers; no checkpoint if `reentrant` is None."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.reentrant, self.dropout = reentrant, dropout

    def part(self, h: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.b(h)), self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = self.part(h) if self.reentrant is None else checkpoint(self.part, h, use_reentrant=self.reentrant)
        return self.c(h.mean((-2, -1)))


REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@REENTRANT
@pytest.mark.parametrize("mode", ["tensor", "sign", "brSF"])
def test_what_a_checkpoint_recomputes_is_rerouted(mode, reentrant):
    """Not only in the first step, which is audited, but in every step, also when V is redrawn."""
    plain, x = redrawn(Checkpointed(None)), draw(2, 2, 7, 7)
    model, patch = moved(plain, mode)
    model.reentrant = reentrant
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        assert_follows(
            gradients(model, x.to(DEVICE)), plain, feedback, x, unlike=["input", "a.weight", "b.weight"]
        )
        optimizer.step()


@REENTRANT
def test_dropout_is_the_same_in_a_checkpoint_as_without(reentrant):
    plain, x = redrawn(Checkpointed(None, dropout=0.5)), draw(2, 2, 7, 7).to(DEVICE)
    got = {}
    for way in (None, reentrant):
        model, _ = moved(plain, "brSF")
        model.reentrant = way
        torch.manual_seed(0)
        got[way] = gradients(model, x)
    assert_same_gradients(got[reentrant], got[None], bounds.HALF_OF_FLOAT64)
