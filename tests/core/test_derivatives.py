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
from support.problems import CNN_INPUT, MLP_UPSTREAM, Net, draw, mlp, patched_copy, random_feedback, redrawn
from torch import Tensor, nn
from torch.autograd import forward_ad

import feedbackhook


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


def penalty_on_the_input(model: nn.Module, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum()


def penalty_on_features(model: nn.Module, x: Tensor) -> Tensor:
    """What a critic with a linear head is trained with: the error signal at the head needs no gradient."""
    features = model[:-1](x)
    score = model[-1](features)
    (slope,) = torch.autograd.grad(score.sum(), features, create_graph=True)
    return score.square().mean() + (slope.norm(dim=1) - 1).square().mean()


def penalty_on_a_weights_gradient(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    (slope,) = torch.autograd.grad(output.mean(), model[0].weight, create_graph=True)
    return output.square().mean() + slope.square().sum()


def penalty_of_parameters(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def score(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()

    return lambda weights: sum(slope.square().sum() for slope in torch.func.grad(score)(weights).values())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def penalty_in_exact(model: nn.Module, x: Tensor) -> None:
    features = model[:-1](x)
    score = model[-1](features)
    with feedbackhook.get_patch(model).exact():
        (slope,) = torch.autograd.grad(score.sum(), features, create_graph=True)
    slope.square().sum().backward()


DERIVATIVES_THAT_MEAN_NOTHING = {
    "penalty on the input": lambda model, x: penalty_on_the_input(model, x).backward(),
    "penalty on features": lambda model, x: penalty_on_features(model, x).backward(),
    "penalty on features, for one weight": lambda model, x: torch.autograd.grad(
        penalty_on_features(model, x), model[-1].weight
    ),
    "penalty on a weight's gradient": lambda model, x: penalty_on_a_weights_gradient(model, x).backward(),
    "penalty in exact": penalty_in_exact,
    "grad of grad for parameters": lambda model, x: torch.func.grad(penalty_of_parameters(model, x))(
        weights_of(model)
    ),
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
@pytest.mark.parametrize("mode", ["tensor", "symmetric", "uSF", "KP"])
def test_derivatives_that_v_has_not_raise_with_the_way_out(derivative, mode):
    model = mlp()
    options = {"feedback": random_feedback(model)} if mode == "tensor" else {}
    feedbackhook.patch(model, mode, **options)
    x = draw(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        derivative(model, x)


@pytest.mark.parametrize("penalty", [penalty_on_the_input, penalty_on_a_weights_gradient])
@pytest.mark.parametrize("mode", ["DFA", "DKP"])
def test_derivatives_that_b_has_not_raise_with_the_way_out(penalty, mode):
    model = mlp()
    feedbackhook.patch(model, mode)
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        penalty(model, draw(3, 4).requires_grad_()).backward()


def test_a_penalty_raises_for_learned_feedback_of_a_frozen_weight():
    """The gradient then depends on nothing that requires one but on V."""
    model = mlp()
    patch = feedbackhook.patch(model, "symmetric-alignment")
    model.requires_grad_(False)
    penalty = penalty_on_the_input(model[-1:], draw(3, 5).requires_grad_())
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        torch.autograd.grad(penalty, list(patch.parameters()), allow_unused=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("score", [probe, torch.sum], ids=["probe", "sum"])
def test_gradients_that_keep_their_graph_can_be_used(score):
    """With `create_graph=True` alone, nothing is differentiated twice."""
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    found = {}
    for create_graph in (False, True):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        parameters = dict(model.named_parameters())
        slopes = torch.autograd.grad(score(output), [leaf, *parameters.values()], create_graph=create_graph)
        found[create_graph] = Gradients(
            output.detach(), slopes[0].detach(), dict(zip(parameters, slopes[1:], strict=True))
        )
    assert_same_gradients(found[True], found[False])
    if score is probe:
        assert_matches_oracle(found[True], plain, feedback, x, unlike=MLP_UPSTREAM)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    score(model(x)).backward(create_graph=True)
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad.detach())
        p.grad = None


def test_a_penalty_that_lies_inside_a_forward_raises_in_the_backward():
    """Not already in the audit of the forward, to which V's product is no exact use of W."""

    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return penalty_on_features(self.net, x)

    model = Penalized()
    feedbackhook.patch(model, "symmetric")
    penalty = model(draw(3, 4))
    with pytest.raises(RuntimeError, match=r"patch\.enabled = False"):
        penalty.backward()
