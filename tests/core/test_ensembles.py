"""torch.func.vmap over models and over data: each member, and each sample, learns as it would alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.oracle import (
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
    probe,
    read_gradients,
)
from support.problems import MLP_UPSTREAM, Net, draw, mlp, patched_copy, redrawn
from support.rules import EVERY_RULE, LEARNS
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import feedbackhook
from feedbackhook.core import torch_internals


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(), nn.Tanh(), nn.Linear(2 * 6 * 6, 3),
    )  # fmt: skip


NETWORKS = {"linear layers": (small, (3, 4)), "convolutions": (convolutions, (2, 2, 5, 5))}


def member(plain: nn.Module, rule: str, recompute: bool = False) -> nn.Module:
    twin = copy.deepcopy(plain)
    feedbackhook.patch(twin, rule, recompute=recompute, **EVERY_RULE[rule])
    return twin


@pytest.mark.parametrize("recompute", [False, True], ids=["parts kept", "parts recomputed"])
@pytest.mark.parametrize("rule", [rule for rule in EVERY_RULE if rule not in LEARNS])
@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_each_member_of_an_ensemble_learns_as_it_does_alone(build, shape, rule, recompute):
    members, x = [redrawn(build(), seed) for seed in range(3)], draw(*shape)
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    feedbackhook.patch(base, rule, recompute=recompute, **EVERY_RULE[rule])

    def of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    outputs = vmap(of_one)(parameters, buffers)
    sum(probe(output) for output in outputs).backward()
    for place, plain in enumerate(members):
        alone = gradients(member(plain, rule, recompute), x)
        torch.testing.assert_close(outputs[place], alone.output, rtol=1e-9, atol=1e-9)
        for name, gradient in alone.parameters.items():
            torch.testing.assert_close(parameters[name].grad[place], gradient, rtol=1e-9, atol=1e-9)
        exact = by_backprop(plain, x)
        if rule != "symmetric":  # which is backprop
            assert_unlike(alone, exact, ["input", "0.weight"])


def assert_parts_belong_to_no_transform(patch: feedbackhook.Patch) -> None:
    for layer in patch.state.layers:
        parts = layer.feedback.parts(layer.weight())
        assert not any(torch_internals.is_wrapped(part) for part in parts.values())


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("random", {}),
        ("brSF", {}),
        ("frSF", {"concordance": 0.7}),
        ("sign", {"magnitude": "weight", "concordance": 0.7}),
        ("angle", {"degrees": 70}),
        ("svd", {"power": -1}),
    ],
    ids=str,
)
def test_parts_that_are_drawn_under_vmap_are_of_use_outside(rule, options):
    """Loaded, moved or redrawn parts are first drawn where they are needed, which may be inside vmap."""
    members, x = [redrawn(small(), seed) for seed in range(2)], draw(3, 4)
    base = copy.deepcopy(members[0])
    patch = feedbackhook.patch(base, rule, **options)
    for layer in patch.state.layers:
        layer.feedback.redraw()  # without the draw that `patch.redraw()` does at once
    parameters, buffers = stack_module_state(members)
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    probe(outputs).backward()
    assert_parts_belong_to_no_transform(patch)
    plain = copy.deepcopy(base)
    feedbackhook.unpatch(plain)
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    assert_same_gradients(gradients(base, x), by_saved_tensors(plain, feedback, x))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_gradients_of_samples_by_vmap_are_those_of_the_batch(frozen):
    """A saliency map: the input's gradient, through a model that need not learn."""
    plain, x = mlp(), draw(3, 4)
    plain.requires_grad_(not frozen)
    model, feedback = patched_copy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients(model, x, lambda model, x: vmap(model)(x))
    want = by_saved_tensors(plain, feedback, x)
    assert_same_gradients(got, want)
    assert_unlike(got, by_backprop(plain, x), ["input"] if frozen else MLP_UPSTREAM)


def test_vmap_over_data_with_nothing_upstream():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    options = {"input_requires_grad": False}
    got = gradients(model, x, lambda model, x: vmap(model)(x), **options)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x, **options))
    assert_unlike(got, by_backprop(plain, x, **options), ["0.weight", "2.weight"])


def test_vmap_in_vmap():
    plain, x = mlp(), draw(2, 3, 4)
    model, feedback = patched_copy(plain)
    got = gradients(model, x, lambda model, x: vmap(vmap(model))(x))
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), MLP_UPSTREAM)


def test_an_ensemble_whose_members_see_data_of_their_own():
    members, x = [redrawn(small(), seed) for seed in range(3)], draw(3, 5, 4)
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    feedbackhook.patch(base, "sign")
    leaf = x.clone().requires_grad_()
    outputs = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, leaf)
    sum(probe(output) for output in outputs).backward()
    for place, plain in enumerate(members):
        alone = gradients(member(plain, "sign"), x[place])
        torch.testing.assert_close(leaf.grad[place], alone.input, rtol=1e-9, atol=1e-9)
        for name, gradient in alone.parameters.items():
            torch.testing.assert_close(parameters[name].grad[place], gradient, rtol=1e-9, atol=1e-9)


def test_vmap_over_samples_of_a_convolutional_network():
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    output = vmap(lambda sample: model(sample[None])[0])(leaf)
    probe(output).backward()
    got = read_gradients(model, leaf, output)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "stem.weight", "blocks.0.conv1.weight"])
