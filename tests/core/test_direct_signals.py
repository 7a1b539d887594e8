"""Direct rules: error signals and gradients equal those of formulas written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.direct import by_hooks, matrices_of, per_sample, per_token
from support.oracle import (
    TOLERANCE,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    gradients,
    probe,
)
from support.problems import CNN_INPUT, Net, draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).norm() <= TOLERANCE * want.norm()


class Attention(nn.Module):
    """Two pre-norm blocks of attention and an MLP on tokens; the output is per token or per image."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
            self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
            self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
            return x + self.fc2(torch.tanh(self.fc1(self.norm2(x))))

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Linear(6, 5)
        self.per_token = per_token

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x if self.per_token else x.mean(1))


def cnn() -> nn.Module:
    return redrawn(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    )


NETWORKS = {
    "three linear layers": (mlp, (3, 4), per_sample),
    "two convolutions": (cnn, (2, 2, 7, 7), per_sample),
    "residual": (lambda: redrawn(Net()), CNN_INPUT, per_sample),
    "attention, per token": (lambda: redrawn(Attention(True)), (2, 3, 4), per_token),
    "attention, per image": (lambda: redrawn(Attention(False)), (2, 3, 4), per_sample),
}
RULES = {"DFA": lambda e: e, "sDFA": torch.sign}


@pytest.mark.parametrize("shared", [False, True], ids=["own B", "shared B"])
@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize(("build", "shape", "send"), NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_those_of_the_formula_at_every_layer(build, shape, send, mode, shared):
    plain, x = build(), draw(*shape)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, mode, shared=shared)
    got, exact = gradients(model, x), by_backprop(plain, x)
    assert torch.equal(got.output, exact.output)
    matrices = matrices_of(patch)
    assert len(matrices) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    assert_same_gradients(got, by_hooks(plain, matrices, x, signal=RULES[mode], send=send))
    assert_unlike(got, exact, ["input"])


BLOCKS = {
    "residual": (lambda: redrawn(Net()), CNN_INPUT, per_sample, "blocks.0.conv2.weight"),
    "attention, per token": (
        lambda: redrawn(Attention(True)), (2, 3, 4), per_token, "blocks.0.fc1.weight",
    ),
    "attention, per image": (
        lambda: redrawn(Attention(False)), (2, 3, 4), per_sample, "blocks.0.fc1.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "send", "unlike"), BLOCKS.values(), ids=BLOCKS)
def test_gradients_are_those_of_the_formula_at_blocks(build, shape, send, unlike):
    plain, x = build(), draw(*shape)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "DFA", sites=r"blocks\..*")
    got = gradients(model, x)
    assert [row.name for row in patch.layers] == ["blocks.0", "blocks.1"]
    assert_same_gradients(got, by_hooks(plain, matrices_of(patch), x, send=send))
    exact = by_backprop(plain, x)
    assert torch.equal(got.output, exact.output)
    assert_unlike(got, exact, [unlike])
    last = {name for name in got.parameters if name.startswith(("blocks.1", "head", "classifier"))}
    for name in last:  # above the last site everything is exact
        close(got.parameters[name], exact.parameters[name])


def test_three_linear_layers_without_autograd():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DFA")
    got = gradients(model, x)
    b = {name: patch.projection(name) for name in ("0", "2", "4")}
    with torch.no_grad():
        h1 = torch.tanh(model[0](x))
        h2 = torch.tanh(model[2](h1))
    e = torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3) + got.output  # of `probe`
    below2 = (e @ b["4"].T) * (1 - h2**2)
    below1 = (e @ b["2"].T) * (1 - h1**2)
    close(got.parameters["4.weight"], e.T @ h2)
    close(got.parameters["2.weight"], below2.T @ h1)
    close(got.parameters["2.bias"], below2.sum(0))
    close(got.parameters["0.weight"], below1.T @ x)
    close(got.input, e @ b["0"].T)


def test_two_convolutions_without_autograd():
    model, x = cnn(), draw(2, 2, 7, 7)
    patch = feedbackhook.patch(model, "DFA")
    got = gradients(model, x)
    with torch.no_grad():
        h = torch.tanh(model[0](x))
    e = torch.linspace(-1, 2, 4, dtype=torch.float64).reshape(2, 2) + got.output
    below = (e @ patch.projection("2").T).reshape(h.shape) * (1 - h**2)
    close(got.parameters["0.bias"], below.sum((0, 2, 3)))
    close(got.parameters["0.weight"], nn.grad.conv2d_weight(x, model[0].weight.shape, below))
    from_head = (e @ patch.projection("4").T).reshape(2, 4, 3, 3)
    close(got.parameters["2.weight"], nn.grad.conv2d_weight(h, model[2].weight.shape, from_head))


def test_the_first_layers_error_signal_does_not_depend_on_the_layers_above():
    x, seen = draw(3, 4), []
    for seed in (0, 5):
        model = mlp()
        with torch.no_grad():  # the same output, by other weights in the middle
            model[2].weight.copy_(draw(5, 6, seed=seed))
            model[2].bias.zero_()
            model[4].weight.zero_()
        patch = feedbackhook.patch(model, "DFA")
        patch.on_error_signal("2", lambda grad_input, grad_output: seen.append(grad_input.clone()))
        gradients(model, x)
    assert torch.equal(*seen)


def test_a_frozen_last_layer_changes_nothing_for_the_others():
    x, found = draw(3, 4), []
    for frozen in (False, True):
        model = mlp()
        model[4].requires_grad_(not frozen)
        feedbackhook.patch(model, "DFA")
        found.append(gradients(model, x).parameters)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(found[0][name], found[1][name])
    assert found[1]["4.weight"] is None


def test_drtp_sends_the_targets():
    plain, x, y = mlp(), draw(3, 4), torch.tensor([2, 0, 1])
    one_hot = F.one_hot(y, 3).double()

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    for given in (False, True):
        model = copy.deepcopy(plain)
        patch = feedbackhook.patch(model, "DRTP")
        if given:
            patch.targets(y)
        leaf = x.clone().requires_grad_()
        loss(model(leaf)).backward()
        want = by_hooks(plain, matrices_of(patch), x, signal=lambda e: one_hot, loss=loss)
        close(leaf.grad, want.input)
        for name, p in model.named_parameters():
            close(p.grad, want.parameters[name])


def test_ignored_targets_send_nothing_and_given_ones_do_not_ask_for_a_loss():
    model, x, y = mlp(), draw(3, 4).requires_grad_(), torch.tensor([2, -100, 1])
    patch = feedbackhook.patch(model, "DRTP")
    patch.targets(y)
    probe(model(x)).backward()
    b = patch.projection("0")
    close(x.grad, torch.stack([b[:, 2], torch.zeros(4, dtype=torch.float64), b[:, 1]]))


def test_all_sites_share_the_first_rows_of_one_matrix():
    model, x = redrawn(Net()), draw(*CNN_INPUT)
    patch = feedbackhook.patch(model, "DFA", shared=True)
    gradients(model, x)
    widest = patch.projection("stem")
    assert widest.shape == (162, 4)
    for name, b in matrices_of(patch).items():
        assert torch.equal(b, widest[: len(b)]), name
    assert widest.abs().max() <= 162**-0.5


def test_a_layer_called_twice_sends_the_error_at_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))

    plain, x = redrawn(Twice()), draw(3, 4)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "DFA")
    got = gradients(model, x)
    assert {row.name: row.rerouted for row in patch.layers} == {"first": 1, "again": 2, "last": 1}
    assert_same_gradients(got, by_hooks(plain, matrices_of(patch), x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("per_token_output", [False, True], ids=["per image", "per token"])
def test_inside_multihead_attention_the_batch_is_found(batch_first, per_token_output):
    """As many positions as samples, so that a batch in the wrong place would go unnoticed by shapes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(x if per_token_output else x.mean(int(batch_first)))

    model = redrawn(Net())
    patch = feedbackhook.patch(model, "DFA", include=["attention.in_proj_weight", "attention.out_proj"])
    seen = {}
    for name in ("attention.in_proj_weight", "attention.out_proj"):
        patch.on_error_signal(name, lambda grad_input, _, name=name: seen.__setitem__(name, grad_input))
    x = draw(3, 3, 2)
    output = model(x)
    (e,) = torch.autograd.grad(probe(output), output, retain_graph=True)
    probe(output).backward()
    for name, signal in seen.items():
        b = patch.projection(name)
        # With an output per token this has the layout of the model, otherwise the batch is in front.
        want = e @ b.T if per_token_output else (e @ b.T).reshape(3, 3, 4)
        if batch_first or not per_token_output:
            want = want.transpose(0, 1)  # positions in front, as inside the attention
        close(signal, want.reshape(signal.shape))
