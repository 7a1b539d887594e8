"""Every way into a model with direct feedback gives the oracle's gradients or an error by name; the error at
the output belongs to one forward and one backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.direct import by_hooks, matrices_of
from support.oracle import (
    TOLERANCE,
    assert_bit_equal,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    call,
    gradients,
    probe,
    read_gradients,
)
from support.problems import CNN_INPUT, InPlaceNet, Net, draw, mlp, redrawn
from support.ways_in import WAYS_IN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook

SITES = {
    "at layers": {},
    "at blocks": {"sites": "blocks[.].*"},
    "at layers, named output": {"output": "classifier"},
    "at blocks, named output": {"sites": "blocks[.].*", "output": "classifier"},
    "at layers, shared": {"shared": True},
    "at layers, shared, named output": {"shared": True, "output": "classifier"},
}

WITHOUT_ROOT = {
    "root's forward called as a method",
    "features, then head",
    "part by part",
    "layer by layer",
    "blocks checkpointed, non-reentrant",
    "blocks checkpointed, reentrant",
    "checkpointed sequence, non-reentrant",
    "checkpointed sequence, reentrant",
    "checkpoint in a checkpoint",
}
"""The model is not called, so its output is not seen."""

RECOMPUTED_WITHOUT_ROOT = {"blocks checkpointed, reentrant", "checkpointed sequence, reentrant"}
"""The graph of a block exists only in the backward, and nothing says which forward it belongs to."""


def refused(way: str, where: str) -> bool:
    if way == "layer by layer" and "at blocks" in where:
        return True  # the blocks are not called
    return way in (RECOMPUTED_WITHOUT_ROOT if "named output" in where else WITHOUT_ROOT)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_is_the_oracle_or_refused_by_name(way, where):
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "DFA", **SITES[where])
    if refused(way, where):
        with pytest.raises(RuntimeError, match=r"'(blocks|classifier|stem).*(output|sites)= in feedbackhook"):
            gradients(model, x, WAYS_IN[way])
        gradients(model, x)  # the model works as before
    else:
        got = gradients(model, x, WAYS_IN[way])
        want = by_hooks(plain, matrices_of(patch), x)
        assert_same_gradients(got, want)
        assert_unlike(got, by_backprop(plain, x), ["stem.weight"])
    assert torch._C._len_torch_function_stack() == 0
    patch.remove()
    assert_bit_equal(gradients(model, x), by_backprop(plain, x))


class Checkpointed(Net):
    """Checkpoints inside its own forward."""

    reentrant = nested = False

    def checkpointed_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.nested:
            x = checkpoint(self.checkpointed_blocks, x, use_reentrant=self.reentrant)
        else:
            x = self.checkpointed_blocks(x)
        return self.forward_head(x)


@pytest.mark.parametrize("where", ["at layers", "at blocks", "at layers, named output"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "a checkpoint in a checkpoint"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_inside_the_model(reentrant, nested, where):
    plain, model, x = redrawn(Net()), redrawn(Checkpointed()), draw(*CNN_INPUT)
    model.reentrant, model.nested = reentrant, nested
    patch = feedbackhook.patch(model, "DFA", **SITES[where])
    for _ in range(2):
        got = gradients(model, x)
        assert_same_gradients(got, by_hooks(plain, matrices_of(patch), x))


def test_a_shared_matrix_asks_for_checkpoints_that_are_not_reentrant():
    """The width of what a reentrant checkpoint hides is not known when the matrix is first needed."""
    model, x = redrawn(Checkpointed()), draw(*CNN_INPUT)
    model.reentrant = True
    patch = feedbackhook.patch(model, "DFA", shared=True, include=["blocks.0.conv2", "classifier"])
    with pytest.raises(RuntimeError, match=r"'blocks.0.conv2'.*use_reentrant=False"):
        gradients(model, x)
    model.reentrant = False
    plain = redrawn(Net())
    assert_same_gradients(gradients(model, x), by_hooks(plain, matrices_of(patch), x))


def test_two_forwards_before_one_backward_keep_their_own_error():
    plain, model = mlp(), mlp()
    patch = feedbackhook.patch(model, "DFA")
    batches = [draw(3, 4, seed=seed) for seed in (1, 2)]
    leaves = [x.clone().requires_grad_() for x in batches]
    (probe(model(leaves[0])) + 3 * probe(model(leaves[1]))).backward()
    for leaf, x, factor in zip(leaves, batches, (1, 3), strict=True):
        want = by_hooks(plain, matrices_of(patch), x).input * factor
        assert (leaf.grad - want).norm() <= TOLERANCE * want.norm()


def test_backwards_in_the_other_order_than_forwards():
    plain, model = mlp(), mlp()
    patch = feedbackhook.patch(model, "DFA")
    leaves = [draw(3, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    losses = [probe(model(leaf)) for leaf in leaves]
    for leaf, loss in reversed(list(zip(leaves, losses, strict=True))):
        loss.backward()
        want = by_hooks(plain, matrices_of(patch), leaf).input
        assert (leaf.grad - want).norm() <= TOLERANCE * want.norm()


def test_gradients_accumulate():
    plain, model = mlp(), mlp()
    patch = feedbackhook.patch(model, "DFA")
    batches = [draw(3, 4, seed=seed) for seed in (1, 2)]
    for x in batches:
        probe(model(x)).backward()
    wants = [by_hooks(plain, matrices_of(patch), x).parameters for x in batches]
    for name, p in model.named_parameters():
        want = wants[0][name] + wants[1][name]
        assert (p.grad - want).norm() <= TOLERANCE * want.norm()


def test_several_backwards_through_one_graph_have_their_own_error():
    model, x = mlp(), draw(3, 4).requires_grad_()
    patch = feedbackhook.patch(model, "DFA")
    output = model(x)
    for column in range(3):
        (got,) = torch.autograd.grad(output[:, column].sum(), x, retain_graph=True)
        want = patch.projection("0")[:, column].expand(3, 4)
        assert (got - want).norm() <= TOLERANCE * want.norm()


def test_a_model_that_is_fed_its_own_output():
    """The second forward's first site sends its own error to the output of the first forward."""
    model = redrawn(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)))
    patch = feedbackhook.patch(model, "DFA")
    x = draw(2, 3).requires_grad_()
    output = model(model(x))
    (e,) = torch.autograd.grad(probe(output), output, retain_graph=True)
    probe(output).backward()
    b = patch.projection("0")
    want = (e @ b.T) @ b.T
    assert (x.grad - want).norm() <= TOLERANCE * want.norm()


def test_activations_in_place():
    class Plain(InPlaceNet):
        """The same without changes in place, for full backward hooks."""

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem[0](x))
            y = nn.functional.leaky_relu(self.conv(x) + x, 0.3).mean((-2, -1))
            return self.classifier(torch.sigmoid(self.fc(y))) * 2

    x = draw(3, 2, 6, 6)
    model = redrawn(InPlaceNet())
    patch = feedbackhook.patch(model, "DFA")
    assert_same_gradients(gradients(model, x), by_hooks(redrawn(Plain()), matrices_of(patch), x))


def test_an_output_that_is_changed_in_place_after_the_forward():
    plain, model, x = mlp(), mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DFA")

    def doubled(output: Tensor) -> Tensor:
        return probe(output * 2)

    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.mul_(2)
    probe(output).backward()
    want = by_hooks(plain, matrices_of(patch), x, loss=doubled)
    assert (leaf.grad - want.input).norm() <= TOLERANCE * want.input.norm()


class Wrapped(nn.Module):
    """Returns the logits in a container."""

    def __init__(self, pack: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.pack = mlp(), pack

    def forward(self, x: Tensor) -> object:
        return self.pack(self.net(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.hidden = logits, None


@pytest.mark.parametrize("pack", [lambda y: {"logits": y}, Output], ids=["mapping", "object"])
def test_an_output_with_logits(pack):
    plain, model, x = mlp(), Wrapped(pack), draw(3, 4)
    patch = feedbackhook.patch(model, "DFA")
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    probe(output["logits"] if isinstance(output, dict) else output.logits).backward()
    matrices = {name.removeprefix("net."): b for name, b in matrices_of(patch).items()}
    want = by_hooks(plain, matrices, x)
    assert (leaf.grad - want.input).norm() <= TOLERANCE * want.input.norm()


def test_an_ordinary_rule_beside_a_direct_one():
    plain, model, x = mlp(), mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, {"0|2": "DFA", "4": "symmetric"})
    got = gradients(model, x)
    matrices = {name: patch.projection(name) for name in ("0", "2")}
    assert_same_gradients(got, by_hooks(plain, matrices, x))


def test_exact_and_disabled_are_backprop():
    plain, model, x = redrawn(Net()), redrawn(Net()), draw(*CNN_INPUT)
    for options in SITES.values():
        with feedbackhook.patch(model, "DFA", **options) as patch:
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            output = model(leaf)
            with patch.exact():
                probe(output).backward()
            assert_same_gradients(read_gradients(model, leaf, output), by_backprop(plain, x))
            patch.enabled = False
            assert_bit_equal(gradients(model, x, call), by_backprop(plain, x))


def test_a_graph_outlives_the_patch():
    """It keeps B, and its e."""
    for options in SITES.values():
        plain, model, x = redrawn(Net()), redrawn(Net()), draw(*CNN_INPUT)
        patch = feedbackhook.patch(model, "DFA", **options)
        want = gradients(model, x)
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        output = model(leaf)
        patch.remove()
        probe(output).backward()
        assert_same_gradients(read_gradients(model, leaf, output), want, tolerance=0)
        assert_bit_equal(gradients(model, x), by_backprop(plain, x))


def test_other_networks_around_the_model_are_left_alone():
    """What is before and after it gets its own exact gradients from what arrives there."""
    plain, model = mlp(), mlp()
    before, after = redrawn(nn.Linear(4, 4), seed=3), redrawn(nn.Linear(3, 2), seed=4)
    patch = feedbackhook.patch(model, "DFA")
    x = draw(3, 4)
    probe(after(model(before(x)))).backward()
    want = by_hooks(plain, matrices_of(patch), before(x), loss=lambda output: probe(after(output)))
    for name, p in model.named_parameters():
        assert (p.grad - want.parameters[name]).norm() <= TOLERANCE * p.grad.norm()
    assert (before.weight.grad - want.input.T @ x).norm() <= TOLERANCE * before.weight.grad.norm()
