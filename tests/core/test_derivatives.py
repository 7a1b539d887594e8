"""torch.func and derivatives beyond the first: right, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.oracle import (
    Gradients,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    probe,
)
from support.problems import CNN_INPUT, MLP_UPSTREAM, Net, draw, mlp, patched_copy, redrawn
from torch import Tensor, nn
from torch.autograd import forward_ad


def test_functional_call_with_other_parameters():
    """`torch.func.functional_call` puts other tensors in the parameters' place for one forward."""
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    leaf = x.clone().requires_grad_()
    output = torch.func.functional_call(model, others, (leaf,))
    probe(output).backward()
    got = Gradients(output.detach(), leaf.grad, {name: p.grad for name, p in others.items()})
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)


def test_torch_func_grad():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return probe(torch.func.functional_call(model, parameters, (x,)))

    weights = {name: p.detach() for name, p in model.named_parameters()}
    of_parameters, of_input = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    got = Gradients(plain(x).detach(), of_input, of_parameters)
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)


@pytest.mark.parametrize(
    ("build", "shape"), [(mlp, (3, 4)), (lambda: redrawn(Net()), CNN_INPUT)], ids=["mlp", "cnn"]
)
def test_gradients_of_single_samples_by_vmap(build, shape):
    plain, x = build(), draw(*shape)
    model, feedback = patched_copy(plain)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return probe(torch.func.functional_call(model, parameters, (sample.unsqueeze(0),)))

    weights = {name: p.detach() for name, p in model.named_parameters()}
    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for number, sample in enumerate(x):
        want = by_saved_tensors(plain, feedback, sample.unsqueeze(0))
        exact = by_backprop(plain, sample.unsqueeze(0))
        got = Gradients(want.output, want.input, {name: g[number] for name, g in of_samples.items()})
        assert_same_gradients(got, want)
        assert_unlike(
            got, exact, [name for name in exact.parameters if name.startswith("0.") or "stem" in name]
        )


def test_forward_mode_over_parameters_that_need_no_gradient_is_the_forwards():
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    for net in (plain, model):
        net.requires_grad_(False)
    tangents = [torch.func.jvp(net, (x,), (torch.ones_like(x),))[1] for net in (plain, model)]
    assert torch.equal(*tangents)


def test_a_gradient_of_the_gradient_is_refused():
    """V's product is no derivative of the forward: a second derivative through it would mean nothing."""
    model, _ = patched_copy(mlp())
    leaf = draw(3, 4).requires_grad_()
    (slope,) = torch.autograd.grad(probe(model(leaf)), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        slope.square().sum().backward()


def squares(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


DERIVATIVES_THAT_MEAN_NOTHING = {
    "grad of grad": lambda model, x: torch.func.grad(
        lambda x: torch.func.grad(squares(model))(x).square().sum()
    )(x),
    "backward of grad": lambda model, x: torch.func.grad(squares(model))(x).square().sum().backward(),
    "hessian": lambda model, x: torch.func.hessian(squares(model))(x),
    "forward mode": dual,
}


@pytest.mark.parametrize(
    "derivative", DERIVATIVES_THAT_MEAN_NOTHING.values(), ids=DERIVATIVES_THAT_MEAN_NOTHING
)
def test_derivatives_that_v_has_not_raise_with_the_way_out(derivative):
    model, _ = patched_copy(mlp())
    x = draw(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        derivative(model, x)
