"""Direct Kolen-Pollack: B learns from the site's input and the output's error."""

from __future__ import annotations

import copy

import pytest
import torch
from support.oracle import TOLERANCE, probe
from support.problems import Net, draw, mlp, redrawn
from torch import nn

import feedbackhook


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() <= TOLERANCE * want.norm())


NETWORKS = {
    "linear": (mlp, (3, 4)),
    "convolutional": (lambda: redrawn(Net()), (3, 2, 9, 9)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_b_gets_the_inputs_product_with_the_error(network):
    build, shape = NETWORKS[network]
    model, x = build(), draw(*shape)
    patch = feedbackhook.patch(model, "DKP")
    model(x)
    assert all(p.grad is None for p in patch.parameters())
    inputs: dict[str, torch.Tensor] = {}
    for row in patch.layers:
        model.get_submodule(row.name).register_forward_pre_hook(
            lambda layer, args, name=row.name: inputs.update({name: args[0].detach()})
        )
    output = model(x)
    output.retain_grad()
    probe(output).backward()
    learned = dict(patch.named_parameters())
    assert len(learned) == len(patch.layers) - 1  # the first layer has nothing upstream
    for name, parameter in learned.items():
        site = inputs[name.removesuffix(".B")].flatten(1)
        assert close(parameter.grad, site.mT @ output.grad), name


def test_the_last_layers_b_learns_as_kolen_pollack_does():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DKP")
    model(x)
    lr, decay = 0.05, 0.1
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=lr, weight_decay=decay)
    start = (model[4].weight.mT - patch.projection("4")).detach()
    for _ in range(30):
        optimizer.zero_grad()
        probe(model(x)).backward()
        optimizer.step()
    left = (model[4].weight.mT - patch.projection("4")).detach()
    want = (1 - lr * decay) ** 30 * start
    assert (left - want).norm() <= 1e-6 * want.norm()


def test_sites_at_modules_learn_too():
    model, x = redrawn(Net()), draw(3, 2, 9, 9)
    patch = feedbackhook.patch(model, "DKP", sites=r"blocks\.1|classifier")
    model(x)
    inputs: dict[str, torch.Tensor] = {}
    for name in ("blocks.1", "classifier"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].detach()})
        )
    output = model(x)
    output.retain_grad()
    probe(output).backward()
    learned = dict(patch.named_parameters())
    assert set(learned) == {"blocks.1.B", "classifier.B"}
    for name, parameter in learned.items():
        assert close(parameter.grad, inputs[name.removesuffix(".B")].flatten(1).mT @ output.grad)


def test_b_has_no_shape_before_the_first_forward_and_is_missed_by_an_optimizer_without_it():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DKP")
    with pytest.raises(RuntimeError, match="run the model once"):
        list(patch.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe(model(x)).backward()
    with pytest.raises(RuntimeError, match="no optimizer holds what the feedback of '2', '4' has learned"):
        optimizer.step()


def test_a_state_restores_b_in_a_patch_that_has_not_run():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DKP")
    model(x)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.mul_(3)
    saved = copy.deepcopy(patch.state_dict())
    twin = mlp()
    other = feedbackhook.patch(twin, "DKP", seed=4)
    other.load_state_dict(saved)
    twin(x)
    for name in ("2", "4"):
        assert torch.equal(other.projection(name), patch.projection(name))


def test_a_shared_matrix_cannot_learn():
    with pytest.raises(ValueError, match="DKP learns a matrix for each site"):
        feedbackhook.patch(nn.Sequential(nn.Linear(2, 2)), "DKP", shared=True)
