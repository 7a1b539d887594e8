"""Activation checkpointing: what a checkpoint recomputes in the backward is rerouted as its forward was."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
    probe,
    read_gradients,
)
from support.problems import MLP_UPSTREAM, draw, mlp, patched_copy, random_feedback, redrawn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import feedbackhook

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])

KINDS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Linear(4, 4),
    "rectangle": lambda: nn.Linear(4, 6),
    "convolution": lambda: nn.Conv1d(4, 6, 1),
}


class Checkpointed(nn.Module):
    """Three layers, the middle one and its activation in a checkpoint; `reentrant=None` is without one."""

    def __init__(self, kind: str, how: str, reentrant: bool | None, frozen: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), KINDS[kind]()
        self.c = nn.Linear(self.b.weight.shape[0], 3)
        self.b.requires_grad_(not frozen)
        self.how, self.reentrant = how, reentrant

    def by_weight(self, h: Tensor) -> Tensor:
        """The layer's weight without a call of its module."""
        if isinstance(self.b, nn.Conv1d):
            return torch.tanh(F.conv1d(h[..., None], self.b.weight, self.b.bias).flatten(1))
        return torch.tanh(F.linear(h, self.b.weight, self.b.bias))

    def by_module(self, h: Tensor) -> Tensor:
        return torch.tanh(self.b(h[..., None]).flatten(1) if isinstance(self.b, nn.Conv1d) else self.b(h))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        part = HOW[self.how](self)
        h = part(h) if self.reentrant is None else checkpoint(part, h, use_reentrant=self.reentrant)
        return self.c(h)


HOW: dict[str, Callable[[Checkpointed], Callable[[Tensor], Tensor]]] = {
    "function": lambda model: lambda h: model.by_weight(h),
    "method": lambda model: model.by_weight,
    "function that calls the module": lambda model: lambda h: model.by_module(h),
    "method that calls the module": lambda model: model.by_module,
}


@FROZEN
@REENTRANT
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recomputed_is_rerouted(kind, how, reentrant, frozen):
    """In every step, and not in the first alone, which is audited."""
    plain, x = redrawn(Checkpointed(kind, how, None, frozen)), draw(3, 4)
    feedback = random_feedback(plain)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    feedbackhook.patch(model, "tensor", feedback=feedback)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = gradients(model, x)
        assert_matches_oracle(got, plain, feedback, x, unlike=["input", "a.weight"])
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("how", HOW)
def test_a_recomputation_uses_the_v_of_its_forward_also_after_a_redraw(how):
    """A non-reentrant checkpoint has built its graph in the forward, and only fills it in the backward."""
    plain, x = redrawn(Checkpointed("rectangle", how, None)), draw(3, 4)
    model = copy.deepcopy(plain)
    model.reentrant = False
    patch = feedbackhook.patch(model, "brSF")
    feedback = {name: patch.feedback(name) for name in "abc"}
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    patch.redraw()
    probe(output).backward()
    assert not torch.equal(patch.feedback("b"), feedback["b"])
    assert_matches_oracle(
        read_gradients(model, leaf, output), plain, feedback, x, unlike=["input", "a.weight"]
    )


@REENTRANT
def test_brsf_learns_with_checkpoints_as_without(reentrant):
    """Several steps, with V redrawn after each."""
    models = [redrawn(Checkpointed("rectangle", "method", way)) for way in (None, reentrant)]
    for model in models:
        feedbackhook.patch(model, "brSF")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    start, x = copy.deepcopy(models[0].state_dict()), draw(3, 4).requires_grad_()
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            probe(model(x)).backward()
            optimizer.step()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
        assert not torch.equal(parameter, start[name])


def nested(model: nn.Sequential, x: Tensor, outer: bool, inner: bool) -> Tensor:
    """The first four modules in a checkpoint, which checkpoints the middle layer's weight inside."""

    def weight_alone(h: Tensor) -> Tensor:
        return F.linear(h, model[2].weight, model[2].bias)

    def first_four(h: Tensor) -> Tensor:
        return model[3](checkpoint(weight_alone, model[1](model[0](h)), use_reentrant=inner))

    return model[4](checkpoint(first_four, x, use_reentrant=outer))


class Nested(nn.Sequential):
    """`mlp`, whose own forward nests checkpoints."""

    outer = inner = False

    def forward(self, x: Tensor) -> Tensor:
        return nested(self, x, self.outer, self.inner)


@pytest.mark.parametrize("inner", [True, False], ids=["inner reentrant", "inner non-reentrant"])
@pytest.mark.parametrize("outer", [True, False], ids=["outer reentrant", "outer non-reentrant"])
def test_a_checkpoint_in_a_checkpoint(outer, inner):
    plain, x = mlp(), draw(3, 4)
    feedback = random_feedback(plain)
    model = Nested(*copy.deepcopy(plain))
    model.outer, model.inner = outer, inner
    feedbackhook.patch(model, "tensor", feedback=feedback)
    for _ in range(2):
        assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=MLP_UPSTREAM)


class InSegments(nn.Sequential):
    """A sequence whose own forward is `checkpoint_sequential`."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(list(self), 2, x, use_reentrant=self.reentrant)


@REENTRANT
@pytest.mark.parametrize("inside", [True, False], ids=["inside the forward", "instead of the forward"])
def test_checkpoint_sequential(reentrant, inside):
    plain, x = mlp(), draw(3, 4)
    feedback = random_feedback(plain)
    model = InSegments(*copy.deepcopy(plain))
    model.reentrant = reentrant
    feedbackhook.patch(model, "tensor", feedback=feedback)
    got = gradients(model, x, InSegments.__call__ if inside else InSegments.forward)
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)


def keep_as_they_are() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "early stop disabled": lambda: set_checkpoint_early_stop(False),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "hooks of one's own": keep_as_they_are,
}


@REENTRANT
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_contexts_around_a_checkpoint(around, how, reentrant):
    plain, x = redrawn(Checkpointed("square", how, None)), draw(3, 4)
    feedback = random_feedback(plain)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    feedbackhook.patch(model, "tensor", feedback=feedback)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with around():
            return model(x)

    for _ in range(2):
        got = gradients(model, x, step)
        assert_matches_oracle(got, plain, feedback, x, unlike=["input", "a.weight"])


@pytest.mark.parametrize("around", [torch.autograd.graph.save_on_cpu, keep_as_they_are])
def test_saved_tensors_hooks_without_a_checkpoint(around):
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with around():
            return model(x)

    assert_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike=MLP_UPSTREAM)


class Exact(Checkpointed):
    """Uses the middle weight in its checkpoint once more, by `second`."""

    second: Callable[[Tensor, Tensor], Tensor] = staticmethod(torch.inner)

    def by_weight(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h, self.b.weight) + self.b(h))


def exact(second: Callable[[Tensor, Tensor], Tensor], reentrant: bool | None, frozen: bool) -> Exact:
    model = redrawn(Exact("square", "method", reentrant, frozen))
    model.second = second
    return model


@pytest.mark.parametrize(
    ("second", "reentrant", "frozen"),
    [
        pytest.param(torch.matmul, True, False, id="matmul, reentrant, trainable"),
        pytest.param(torch.matmul, True, True, id="matmul, reentrant, frozen"),
        pytest.param(torch.matmul, False, False, id="matmul, non-reentrant, trainable"),
        pytest.param(torch.matmul, False, True, id="matmul, non-reentrant, frozen"),
        pytest.param(torch.inner, True, False, id="inner, reentrant, trainable"),
        pytest.param(torch.inner, True, True, id="inner, reentrant, frozen"),
        pytest.param(torch.inner, False, False, id="inner, non-reentrant, trainable"),
    ],
)
def test_a_use_that_cannot_be_rerouted_is_found_in_a_checkpoint(second, reentrant, frozen):
    """Reentrant checkpoints build their graph in the backward alone."""
    model, x = exact(second, reentrant, frozen), draw(3, 4).requires_grad_()
    feedbackhook.patch(model)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
            model(x).sum().backward()
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    "around", [None, torch.autograd.graph.save_on_cpu], ids=["checkpoint", "save_on_cpu"]
)
def test_a_frozen_weight_that_hooks_have_packed_is_out_of_sight_and_exact(around):
    """A known limit: the graph holds what the hooks made of the weight, and no weight. A function that is
    watched, such as matmul, is refused there, too."""
    plain, x = exact(torch.inner, None, frozen=True), draw(3, 4)
    model, feedback = patched_copy(plain)
    model.reentrant = False if around is None else None

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with around() if around is not None else contextlib.nullcontext():
            return model(x)

    got = gradients(model, x, step)
    unseen = copy.deepcopy(plain)
    unseen.second = lambda h, w: torch.inner(h, w.clone())
    assert_same_gradients(got, by_saved_tensors(unseen, feedback, x))


@REENTRANT
def test_after_removal_a_checkpoint_is_backprop(reentrant):
    plain, x = redrawn(Checkpointed("square", "method", reentrant)), draw(3, 4)
    model, feedback = patched_copy(plain)
    patched = gradients(model, x)
    assert_same_gradients(patched, by_saved_tensors(without_checkpoint(plain), feedback, x))
    feedbackhook.unpatch(model)
    exact = by_backprop(plain, x)
    assert_same_gradients(gradients(model, x), exact, tolerance=0.0)
    assert_unlike(patched, exact, ["input", "a.weight"])


def without_checkpoint(model: Checkpointed) -> Checkpointed:
    twin = copy.deepcopy(model)
    twin.reentrant = None
    return twin
