"""Feedback that learns, in every way of training: right, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support import bounds
from support.oracle import probe
from support.paths import python_path
from support.problems import draw, mlp, redrawn
from torch import nn
from torch.utils.checkpoint import checkpoint

import feedbackhook
from feedbackhook.core import torch_internals

LEARNING = ["KP", "information", "symmetric-alignment", "activation-alignment", "PFA", "PFA-o", "LDFA"]


def learned(patch: feedbackhook.Patch) -> dict[str, torch.Tensor]:
    """The gradients of the learned tensors; those of the first layer, which sends nothing on, left out."""
    return {name: p.grad.clone() for name, p in patch.named_parameters() if not name.startswith("0.")}


def plainly(mode: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = mlp()
    patch = feedbackhook.patch(model, mode)
    probe(model(x)).backward()
    return learned(patch)


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - factor * gradient).norm() <= bounds.HALF_OF_FLOAT64 * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", LEARNING)
def test_checkpoints_recompute_what_is_learned_from(mode, reentrant):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, mode)
    hidden = checkpoint(model[:3], x.clone().requires_grad_(reentrant), use_reentrant=reentrant)
    probe(model[3:](hidden)).backward()
    assert_close(learned(patch), plainly(mode, x))


@pytest.mark.parametrize("mode", LEARNING)
def test_a_second_backward_of_one_graph_adds_the_same_again(mode):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, mode)
    loss = probe(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(learned(patch), plainly(mode, x), factor=2)


@pytest.mark.parametrize("mode", LEARNING)
def test_compiled_code_learns_alike(mode):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, mode)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    probe(compiled(x)).backward()
    assert_close(learned(patch), plainly(mode, x))


@pytest.mark.parametrize("mode", LEARNING)
def test_autocast_rounds_and_nothing_else(mode):
    model, x = mlp().float(), draw(3, 4).float()
    patch = feedbackhook.patch(model, mode)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    probe(output.float()).backward()
    for name, gradient in plainly(mode, draw(3, 4)).items():
        got = dict(patch.named_parameters())[name].grad
        assert got.dtype == torch.float32
        assert (got.double() - gradient).norm() <= bounds.of_autocast(3, "bfloat16") * 8 * gradient.norm()


def test_measuring_leaves_gradients_alone():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "KP")
    loss = probe(model(x))
    feedbackhook.measure(patch, loss)
    assert all(p.grad is None for p in patch.parameters())
    loss.backward()
    assert_close(learned(patch), plainly("KP", x))


def test_an_exact_backward_learns_from_exact_gradients():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "KP")
    loss = probe(model(x))
    with patch.exact():
        loss.backward()
    plain = mlp()
    probe(plain(x)).backward()
    assert_close(learned(patch), {f"{n}.V": plain[int(n)].weight.grad for n in "24"})


def test_second_derivatives_and_transforms_are_refused():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "KP")
    (gradient,) = torch.autograd.grad(probe(model(x)), model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot differentiate a gradient that went through feedback"):
        gradient.sum().backward()
    parameters = dict(model.named_parameters())

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return probe(torch.func.functional_call(model, {**parameters, "2.weight": weight}, (x,)))

    with pytest.raises(RuntimeError, match=r"feedback of '2' learns in backward\(\).*patch.freeze\(\)"):
        torch.func.grad(loss)(model[2].weight.detach())
    patch.freeze()
    torch.func.grad(loss)(model[2].weight.detach())


def test_v_that_changes_between_forward_and_backward_is_an_error_as_for_w():
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    loss = probe(model(draw(3, 4)))
    with torch.no_grad():
        dict(patch.named_parameters())["2.V"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- weights that are derived ------------------------------------------------------------------------------


def test_a_derived_weight_is_refused_where_its_gradient_would_be_taken_for_its_update():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(TypeError, match="KolenPollack moves V along W's own gradient, but the weight of '2'"):
        feedbackhook.patch(model, "KP")
    patch = feedbackhook.patch(model, "symmetric-alignment")
    probe(model(draw(3, 4))).backward()
    v = dict(patch.named_parameters())["2.V"]
    assert torch.allclose(v.grad, v.detach() - model[2].weight.detach())


def test_a_weight_standardized_in_the_forward_is_refused_too():
    class Standardized(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean(1, keepdim=True)
            return nn.functional.linear(x, weight, self.bias)

    model = redrawn(nn.Sequential(nn.Linear(4, 6), Standardized(6, 5)))
    feedbackhook.patch(model, "KP")
    with pytest.raises(TypeError, match="the weight of '1' is computed from other parameters"):
        model(draw(3, 4))


# --- loss scales -------------------------------------------------------------------------------------------


def scaled_step(patch: feedbackhook.Patch, model: nn.Module, parameters: list[nn.Parameter]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler.scale(probe(model(draw(3, 4)))).backward()
    scaler.step(optimizer)


def test_a_grad_scaler_treats_w_and_v_alike():
    ours, theirs = mlp(), mlp()
    first, second = feedbackhook.patch(ours, "KP"), feedbackhook.patch(theirs, "KP")
    scaled_step(first, ours, [*ours.parameters(), *first.parameters()])
    optimizer = torch.optim.SGD([*theirs.parameters(), *second.parameters()], lr=0.1)
    probe(theirs(draw(3, 4))).backward()
    optimizer.step()
    assert torch.allclose(first.feedback("2"), second.feedback("2"))


def test_a_grad_scaler_must_not_divide_what_does_not_carry_its_scale():
    model = mlp()
    patch = feedbackhook.patch(model, "information")
    with pytest.raises(RuntimeError, match="GradScaler divided the gradients of the V of '0'"):
        scaled_step(patch, model, [*model.parameters(), *patch.parameters()])
    own = torch.optim.SGD(patch.parameters(), lr=0.1)
    scaled_step(patch, model, list(model.parameters()))
    own.step()


# --- one rule for each layer, and from one to another ------------------------------------------------------


def test_layers_follow_rules_of_their_own():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, {"0": "KP", "2": {"mode": "LDFA", "rank": 2}, "4": "sign"})
    assert [name for name, _ in patch.named_parameters()] == ["0.V", "2.Q", "2.P"]
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)
    probe(model(x)).backward()
    optimizer.step()
    metrics = {(r.layer, r.metric): r.value for r in feedbackhook.measure(patch, probe(model(x)))}
    assert all(0 < metrics[layer, "weight_angle"] < 180 for layer in ("0", "2", "4"))


def test_mirrors_first_then_v_as_it_is():
    model = mlp()
    patch = feedbackhook.patch(model, "WM")
    patch.mirror(steps=300)
    v = {row.name: patch.feedback(row.name) for row in patch.layers}
    patch.set(mode="frozen")
    assert {row.rule for row in patch.layers} == {"tensor(feedback=...)"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        probe(model(draw(3, 4))).backward()
        optimizer.step()
    for name, tensor in v.items():
        assert torch.equal(patch.feedback(name), tensor)
    twin, other = mlp(), None
    other = feedbackhook.patch(twin, "WM", seed=5)
    other.load_state_dict(patch.state_dict())
    assert torch.equal(other.feedback("2"), v["2"])


def test_set_gives_layers_other_rules_or_changes_nothing():
    model = mlp()
    patch = feedbackhook.patch(model, "FA")
    patch.set({"2": "KP"})
    assert [row.rule for row in patch.layers] == ["FA", "KP", "FA"]
    assert [name for name, _ in patch.named_parameters()] == ["2.V"]
    with pytest.raises(ValueError, match="direct rules cannot be set"):
        patch.set(mode="DFA")
    with pytest.raises(ValueError, match="unknown mode"):
        patch.set({"0": "sign", "4": "no such rule"})
    assert [row.rule for row in patch.layers] == ["FA", "KP", "FA"]


def test_a_new_rule_that_learns_is_missed_by_the_old_optimizer():
    model = mlp()
    patch = feedbackhook.patch(model, "FA")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe(model(draw(3, 4))).backward()
    optimizer.step()
    patch.set(mode="KP")
    probe(model(draw(3, 4))).backward()
    with pytest.raises(RuntimeError, match="no optimizer holds what the feedback of '2', '4' has learned"):
        optimizer.step()


# --- the protocol ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halfway:
    """V turns to half of W."""

    learns_from: ClassVar[str] = "activity"

    def initial(self, weight, rng):
        return {"V": rng.normal(weight)}

    def local_gradient(self, local, parts):
        return {"V": parts["V"] - local.weight / 2}

    def feedback(self, weight, parts):
        return parts["V"]


def test_a_rule_of_ones_own_learns():
    feedbackhook.register_rule("halfway")(Halfway)
    model = mlp()
    patch = feedbackhook.patch(model, "halfway")
    optimizer = torch.optim.SGD(patch.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        probe(model(draw(3, 4))).backward()
        optimizer.step()
    assert torch.allclose(patch.feedback("2"), model[2].weight.detach() / 2)


def test_a_rule_must_say_what_it_learns_from_and_keep_to_it():
    @dataclass(frozen=True)
    class Unsaid(Halfway):
        learns_from: ClassVar[str] = "data"

    with pytest.raises(TypeError, match="lacks learns_from, a class attribute that is one of 'gradient'"):
        feedbackhook.register_rule("unsaid")(Unsaid)

    @dataclass(frozen=True)
    class Peeking(Halfway):
        def local_gradient(self, local, parts):
            return {"V": local.weight_gradient}

    feedbackhook.register_rule("peeking")(Peeking)
    model = mlp()
    feedbackhook.patch(model, "peeking")
    with pytest.raises(TypeError, match=r"cannot read `local.weight_gradient`, which takes 'error' or"):
        probe(model(draw(3, 4))).backward()


def test_a_gradient_of_the_wrong_shape_is_named():
    @dataclass(frozen=True)
    class Crooked(Halfway):
        def local_gradient(self, local, parts):
            return {"V": parts["V"].sum(0)}

    feedbackhook.register_rule("crooked")(Crooked)
    model = mlp()
    feedbackhook.patch(model, "crooked")
    with pytest.raises(ValueError, match=r"Crooked\.local_gradient returned gradients of the shapes"):
        probe(model(draw(3, 4))).backward()


# --- several processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_as_one_does():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(
        [*command, "-m", "support.learning_worker"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=bounds.HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("passed ")]) == 30


# --- private names of PyTorch ------------------------------------------------------------------------------


def test_steps_for_scaler_knows_who_steps():
    seen, weight = [], nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: seen.append(torch_internals.steps_for_scaler()))
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
    optimizer.step()
    assert seen == [True, False, False]


def test_running_ddp_is_the_one_whose_forward_runs(tmp_path):
    assert torch_internals.running_ddp() is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        seen, model = [], nn.Linear(2, 2)
        model.register_forward_hook(lambda *args: seen.append(torch_internals.running_ddp()))
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(torch.ones(1, 2))
        assert seen == [wrapped]
        assert torch_internals.running_ddp() is None
    finally:
        torch.distributed.destroy_process_group()
