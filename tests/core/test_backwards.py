"""Backwards of every form: repeated, accumulated, through frozen weights, under a user's own hooks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    Gradients,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    CNN_INPUT,
    MLP_UPSTREAM,
    Net,
    draw,
    mlp,
    patched_copy,
    redrawn,
)
from torch import Tensor, nn

import feedbackhook
from feedbackhook.core import torch_internals


def test_a_second_backward_adds_the_same_again():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    probe(output).backward(retain_graph=True)
    assert_matches_oracle(read_gradients(model, leaf, output), plain, feedback, x, unlike=MLP_UPSTREAM)
    once = by_saved_tensors(plain, feedback, x)
    probe(output).backward()
    twice = Gradients(once.output, 2 * once.input, {name: 2 * grad for name, grad in once.parameters.items()})
    assert_same_gradients(read_gradients(model, leaf, output), twice)


@pytest.mark.parametrize("order", ["one after the other", "both forwards first", "backwards in reverse"])
def test_gradients_of_two_batches_add_up(order):
    plain, batches = mlp(), [draw(3, 4), draw(2, 4, seed=1)]
    model, feedback = patched_copy(plain)
    model.zero_grad()
    if order == "one after the other":
        for x in batches:
            probe(model(x)).backward()
    else:
        losses = [probe(model(x)) for x in batches]
        for loss in losses if order == "both forwards first" else losses[::-1]:
            loss.backward()

    options = {"input_requires_grad": False}
    feedback_sum = _sum([by_saved_tensors(plain, feedback, x, **options) for x in batches])
    exact_sum = _sum([by_backprop(plain, x, **options) for x in batches])
    got = read_gradients(model, batches[0], feedback_sum.output)
    assert_same_gradients(got, feedback_sum)
    assert_unlike(got, exact_sum, ["0.weight", "2.weight"])


def _sum(parts: list[Gradients]) -> Gradients:
    """The sum of parameter gradients; the output is of no account."""
    names = parts[0].parameters
    return Gradients(
        parts[0].output, None, {name: sum(part.parameters[name] for part in parts) for name in names}
    )


def test_autograd_grad_instead_of_backward():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    names, parameters = zip(*model.named_parameters(), strict=True)
    of_input, *of_parameters = torch.autograd.grad(probe(output), [leaf, *parameters])
    got = Gradients(output.detach(), of_input, dict(zip(names, of_parameters, strict=True)))
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)
    assert all(parameter.grad is None for parameter in parameters)


def test_autograd_grad_of_the_input_alone():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(probe(model(leaf)), leaf)
    torch.testing.assert_close(got, by_saved_tensors(plain, feedback, x).input, rtol=1e-9, atol=1e-12)
    assert (got - by_backprop(plain, x).input).norm() > 1e-3 * got.norm()


def test_a_forward_without_grad_keeps_its_bits_and_the_next_step_is_right():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert [row.calls for row in feedbackhook.get_patch(model).layers] == [0, 0, 0]
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=MLP_UPSTREAM)


class Enabling(nn.Module):
    """Its forward builds a graph whether or not its caller does."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.functional = nn.Linear(4, 4), nn.Linear(4, 3), functional

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = torch.tanh(self.fc1(x))
            return F.linear(hidden, self.fc2.weight) if self.functional else self.fc2(hidden)


def without_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_gradients_enabled_inside_a_forward_without():
    plain, x = redrawn(Enabling(functional=False)), draw(3, 4)
    model, feedback = patched_copy(plain)
    got = gradients(model, x, without_grad)
    assert_matches_oracle(got, plain, feedback, x, unlike=["input", "fc1.weight"])


def test_gradients_enabled_inside_a_forward_without_and_a_weight_used_without_its_module():
    """Such a forward opens no mode, so the guard must raise."""
    model, x = redrawn(Enabling(functional=True)), draw(3, 4)
    feedbackhook.patch(model, "sign")
    with pytest.raises(feedbackhook.ExactGradientError, match="'fc2'"):
        gradients(model, x, without_grad)


class Recursive(nn.Module):
    """Calls itself without gradients, as a moving target does, before it uses a weight without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, deeper: bool = True) -> Tensor:
        if deeper:
            with torch.no_grad():
                self(x, deeper=False)
        return F.linear(torch.tanh(self.fc1(x)), self.fc2.weight)


def test_a_module_that_calls_itself_without_grad():
    plain, x = redrawn(Recursive()), draw(3, 4)
    model, feedback = patched_copy(plain)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "fc1.weight"])


def test_a_weight_changed_between_forward_and_backward_is_an_error_as_in_backprop():
    for model in (mlp(), patched_copy(mlp())[0]):
        loss = probe(model(draw(3, 4)))
        with torch.no_grad():
            model[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


FROZEN = {
    "a hidden weight": ["2.weight"],
    "a hidden layer": ["2.weight", "2.bias"],
    "the output layer": ["4.weight", "4.bias"],
    "all but the first layer": ["2.weight", "2.bias", "4.weight", "4.bias"],
    "all weights": ["0.weight", "2.weight", "4.weight"],
    "every parameter": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_weights_pass_error_signals_on_through_v(frozen):
    plain, x = mlp(), draw(3, 4)
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    model, feedback = patched_copy(plain)
    unlike = [name for name in MLP_UPSTREAM if name not in frozen]
    got = gradients(model, x)
    assert_matches_oracle(got, plain, feedback, x, unlike=unlike)
    assert all(got.parameters[name] is None for name in frozen)


def test_freezing_and_thawing_after_patching():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    for frozen in (True, False):
        for net in (plain, model):
            net[2].weight.requires_grad_(not frozen)
        assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight", "2.bias"])


def test_training_follows_the_oracle_step_by_step():
    """Ten steps of SGD with momentum, beside a plain model into which the oracle's gradients are written."""
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    start = copy.deepcopy(plain.state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in (model, plain)]
    for _ in range(10):
        want = by_saved_tensors(plain, feedback, x)
        for name, parameter in plain.named_parameters():
            parameter.grad = want.parameters[name]
        gradients(model, x)
        for optimizer in optimizers:
            optimizer.step()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-12)


# --- hooks of the user's ---------------------------------------------------------------------------------


def test_a_full_backward_hook_of_the_users_sees_the_error_signal_through_v():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    seen = {}

    def keep(layer, grad_input, grad_output):
        seen[layer] = grad_input[0], grad_output[0]

    for layer in (model[2], model[4]):
        layer.register_full_backward_hook(keep)
    got = gradients(model, x)
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)
    for name, layer in (("2", model[2]), ("4", model[4])):
        grad_input, grad_output = seen[layer]
        torch.testing.assert_close(grad_input, grad_output @ feedback[name], rtol=1e-12, atol=1e-12)


def test_hooks_of_the_users_run_and_survive_removal():
    model, x, log = mlp(), draw(3, 4), []
    handles = [model[2].register_forward_hook(lambda *_: log.append("before patch"))]
    patch = feedbackhook.patch(model, "sign")
    handles.append(model[2].register_forward_hook(lambda *_: log.append("after patch")))
    handles.append(model[2].register_forward_pre_hook(lambda *_: log.append("pre")))
    handles.append(model[2].weight.register_hook(lambda _: log.append("gradient")))
    for _ in range(2):
        gradients(model, x)
        assert sorted(log) == ["after patch", "before patch", "gradient", "pre"]
        log.clear()
        patch.remove()
    for handle in handles:
        handle.remove()
    gradients(model, x)
    assert log == []


def test_after_backward_calls_when_the_backward_that_runs_has_ended():
    """A private name of PyTorch, as those in test_torch_internals.py."""
    seen: list[object] = []
    x = torch.ones(2, requires_grad=True)
    inner = torch.ones(2, requires_grad=True)

    def hook(gradient: Tensor) -> None:
        torch_internals.after_backward(lambda: seen.append("outer ended"))
        with torch.enable_grad():
            y = (inner * 2).sum()
        y.register_hook(lambda _: torch_internals.after_backward(lambda: seen.append("inner ended")))
        y.backward()
        seen.append("hook ended")

    y = x * 3
    y.register_hook(hook)
    x.register_hook(lambda _: seen.append("gradient arrived"))
    y.sum().backward()
    assert seen == ["inner ended", "hook ended", "gradient arrived", "outer ended"]
    with pytest.raises(RuntimeError):
        torch_internals.after_backward(lambda: None)


def test_compiler_is_loaded_follows_torch():
    code = "import torch; from feedbackhook.core.torch_internals import compiler_is_loaded as loaded\n"
    code += "assert not loaded(); import torch._dynamo; assert loaded()"
    subprocess.run([sys.executable, "-c", code], check=True)
