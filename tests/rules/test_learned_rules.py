"""Rules that learn: their gradients against autograd of the published loss or the formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import bounds
from support.oracle import TOLERANCE, by_saved_tensors, gradients, probe
from support.problems import NETWORKS, Net, draw, mlp, redrawn
from torch import nn

import feedbackhook

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def by_name(patch: feedbackhook.Patch) -> dict[str, torch.Tensor]:
    """The learned tensors of a patch that have a gradient, detached."""
    return {name: p.detach() for name, p in patch.named_parameters() if p.grad is not None}


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() <= TOLERANCE * want.norm())


# --- Kolen-Pollack -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_kp_gives_v_the_gradient_of_w(network):
    build, shape = NETWORKS[network]
    plain, model, x = build(), build(), draw(*shape)
    patch = feedbackhook.patch(model, "KP")
    feedback = {row.name: patch.feedback(row.name) for row in patch.layers}
    gradients(model, x)
    want = by_saved_tensors(plain, feedback, x).parameters
    learned = dict(patch.named_parameters())
    assert len(learned) == len(feedback) == len(patch.layers)
    for name in feedback:
        assert close(learned[f"{name}.V"].grad, want[f"{name}.weight"]), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_difference_of_w_and_v_shrinks_by_its_recursion(decay, momentum):
    model, x = mlp(), draw(6, 4)
    patch = feedbackhook.patch(model, "KP")
    lr = 0.05
    parameters = [*model.parameters(), *patch.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    rows = ["2", "4"]  # the first layer sends no error signal on
    start = {name: patch.weight(name).clone() - patch.feedback(name) for name in rows}
    factor, velocity = 1.0, 0.0
    for _ in range(40):
        optimizer.zero_grad()
        probe(model(x)).backward()
        optimizer.step()
        velocity = momentum * velocity + decay * factor  # of W - V, in which the gradients cancel
        factor -= lr * velocity
    for name in rows:
        difference = patch.weight(name) - patch.feedback(name)
        scale = patch.weight(name).norm() + patch.feedback(name).norm()
        assert (difference - factor * start[name]).norm() <= 1e-6 * abs(factor) * start[name].norm()
        assert (difference - factor * start[name]).norm() <= 40 * bounds.HALF_OF_FLOAT64 * scale
    if not momentum:
        assert factor == pytest.approx((1 - lr * decay) ** 40)
    assert (factor == 1) == (decay == 0)


def test_kp_turns_v_to_w_while_it_trains():
    model, x = redrawn(Net()), draw(4, 2, 9, 9)
    patch = feedbackhook.patch(model, "KP")
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1, weight_decay=0.5)

    def angle() -> float:
        return next(
            r.value
            for r in feedbackhook.measure(patch)
            if (r.layer, r.metric) == ("classifier", "weight_angle")
        )

    before = angle()
    for _ in range(150):
        optimizer.zero_grad()
        model(x).sub(draw(4, 4, seed=3)).square().mean().backward()
        optimizer.step()
    assert before > 60
    assert angle() < 1


def test_gradients_accumulate_over_backwards_and_calls():
    model, x, y = mlp(), draw(3, 4), draw(5, 4, seed=2)
    patch = feedbackhook.patch(model, "KP")
    for part in (x, y):
        probe(model(part)).backward()
    (probe(model(x)) + probe(model(y))).backward()
    learned = dict(patch.named_parameters())
    for name in ("2", "4"):
        assert close(learned[f"{name}.V"].grad, model.get_parameter(f"{name}.weight").grad)


def test_a_weight_that_is_used_twice_and_one_that_is_tied():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.third.weight = self.second.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            return self.third(torch.tanh(self.second(torch.tanh(self.second(x)))))

    model = redrawn(Twice())
    patch = feedbackhook.patch(model, "KP")
    probe(model(draw(3, 4))).backward()
    learned = dict(patch.named_parameters())
    assert set(learned) == {"first.V", "second.V"}
    assert close(learned["second.V"].grad, model.second.weight.grad)


@pytest.mark.parametrize("self_attention", [True, False])
def test_attention_learns_in_its_stacked_projections(self_attention):
    model = redrawn(nn.MultiheadAttention(6, 2, batch_first=True))
    patch = feedbackhook.patch(model, "KP")
    query = draw(2, 3, 6).requires_grad_()
    key = query if self_attention else draw(2, 4, 6, seed=3).requires_grad_()
    probe(model(query, key, key, need_weights=False)[0]).backward()
    learned = dict(patch.named_parameters())
    assert set(learned) == {"in_proj_weight.V", "out_proj.V"}
    assert close(learned["in_proj_weight.V"].grad, model.in_proj_weight.grad)
    assert close(learned["out_proj.V"].grad, model.out_proj.weight.grad)


# --- the learned tensors -----------------------------------------------------------------------------------


def test_learned_tensors_belong_to_the_patch_and_not_to_the_model():
    model = mlp()
    keys, count = list(model.state_dict()), len(list(model.parameters()))
    patch = feedbackhook.patch(model, "KP")
    assert [name for name, _ in patch.named_parameters()] == ["0.V", "2.V", "4.V"]
    assert all(isinstance(p, nn.Parameter) for p in patch.parameters())
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == count
    patch.remove()
    assert list(model.state_dict()) == keys


def test_they_follow_the_models_dtype_and_keep_their_identity():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    before = list(patch.parameters())
    model.float()
    model(draw(3, 4).float()).sum().backward()
    assert all(p.dtype == torch.float32 for p in patch.parameters())
    assert all(a is b for a, b in zip(before, patch.parameters(), strict=True))
    assert before[1].grad.dtype == torch.float32


def test_a_state_restores_what_was_learned_in_place():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    state = copy.deepcopy(patch.state_dict())
    first = next(patch.parameters())
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.mul_(2)
    v = patch.feedback("2")
    patch.load_state_dict(state)
    assert torch.equal(patch.feedback("2"), v / 2)
    assert next(patch.parameters()) is first


def test_two_patches_with_one_seed_start_alike_and_another_seed_differs():
    ours, theirs, others = (feedbackhook.patch(mlp(), "KP", seed=seed).feedback("2") for seed in (1, 1, 2))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, others)
    assert math.isfinite(ours.norm())


# --- what is said at the first step -----------------------------------------------------------------------


def test_no_optimizer_holds_the_learned_tensors():
    model = mlp()
    feedbackhook.patch(model, "KP")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(draw(3, 4)).sum().backward()
    before = model[2].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"no optimizer holds what the feedback of '2', '4' has learned"):
        optimizer.step()
    assert torch.equal(model[2].weight, before)


def test_learned_tensors_that_were_only_counted_are_held_by_no_optimizer():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    assert sum(p.numel() for p in patch.parameters()) == 69
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(draw(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="no optimizer holds"):
        optimizer.step()


@pytest.mark.parametrize("weights_first", [True, False])
def test_another_optimizer_may_hold_the_learned_tensors(weights_first):
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    ours, theirs = (torch.optim.SGD(p, lr=0.1) for p in (model.parameters(), patch.parameters()))
    model(draw(3, 4)).sum().backward()
    before = patch.feedback("2")
    for optimizer in (ours, theirs) if weights_first else (theirs, ours):
        optimizer.step()
    assert not torch.equal(patch.feedback("2"), before)


def test_a_layer_that_never_runs_is_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    patch = feedbackhook.patch(model, "KP")
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)
    model["b"](model["a"](torch.ones(2, 4))).sum().backward()
    with pytest.warns(UserWarning, match="'idle' has not run before the optimizer's first step"):
        optimizer.step()


def test_requires_grad_that_is_off_is_named():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    dict(patch.named_parameters())["2.V"].requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)
    model(draw(3, 4)).sum().backward()
    with pytest.warns(UserWarning, match="requires_grad is off for 2.V"):
        optimizer.step()


def test_a_frozen_weight_is_named_and_its_v_gets_no_gradient():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)
    model(draw(3, 4)).sum().backward()
    assert dict(patch.named_parameters())["2.V"].grad is None
    with pytest.warns(UserWarning, match="the weight of '2' is frozen, so V stays as it is"):
        optimizer.step()
