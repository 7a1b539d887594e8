"""What direct feedback cannot do is one error that says what is wrong, and leaves the model as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.direct import by_hooks, matrices_of
from support.oracle import assert_bit_equal, assert_same_gradients, by_backprop, gradients, probe
from support.problems import CNN_INPUT, Net, draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook
from feedbackhook import ExactGradientError


def untouched(model: nn.Module, plain: nn.Module) -> None:
    """Without the patch, the model is plain: hooks, attributes, parameters."""
    if feedbackhook.get_patch(model) is not None:
        feedbackhook.unpatch(model)
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys()
        assert not a._forward_hooks
        assert not a._forward_pre_hooks
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a._backward_hooks
    assert torch._C._len_torch_function_stack() == 0


# --- when patching -----------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "an output that is no module": (
        {"output": "clasifier"},
        ValueError,
        "output='clasifier' names no module of WithList; did you mean 'classifier'",
    ),
    "an output of a wrong type": (
        {"output": 3},
        TypeError,
        "output must be the full name of a module, not 3",
    ),
    "sites that match nothing": ({"sites": "layers"}, ValueError, "sites: 'layers' matches no layer"),
    "a site that can never run": (
        {"sites": "modules_of"},
        ValueError,
        "selects 'modules_of', a ModuleList, which is never called; select the modules in it",
    ),
    "sites of a wrong type": (
        {"sites": [nn.Conv2d]},
        TypeError,
        "sites must be a regular expression or a list",
    ),
    "no sites": ({"sites": []}, ValueError, "sites is empty"),
    "sites and layers": (
        {"sites": "stem", "exclude": ["stem"]},
        TypeError,
        "include and exclude choose layers; with sites=",
    ),
    "shared that is no bool": ({"shared": 1}, TypeError, "shared must be True or False, not 1"),
    "an unknown scale": (
        {"scale": "norm"},
        ValueError,
        "scale must be 'fan_out', 'kaiming', None or a number",
    ),
    "a negative scale": ({"scale": -1}, ValueError, "scale must be finite and at least 0"),
    "an unknown option": ({"site": "stem"}, TypeError, "has no option 'site'.*did you mean 'sites'"),
}


class WithList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.modules_of = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_that_are_refused(options, kind, message):
    model, plain = redrawn(WithList()), redrawn(WithList())
    with pytest.raises(kind, match=message if ".*" in message else re.escape(message)):
        feedbackhook.patch(model, "DFA", **options)
    untouched(model, plain)


def test_a_mapping_of_modes_takes_no_sites_and_one_output():
    model, plain = redrawn(Net()), redrawn(Net())
    with pytest.raises(ValueError, match="sites= needs a single mode"):
        feedbackhook.patch(model, {"stem": {"mode": "DFA", "sites": "blocks"}})
    with pytest.raises(ValueError, match="take the error from one output"):
        feedbackhook.patch(model, {"stem": "DFA", "classifier": {"mode": "DFA", "output": "classifier"}})
    untouched(model, plain)


# --- in the forward ----------------------------------------------------------------------------------------


class Net2(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.run = forward

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def plain_forward(net: Net2, x: Tensor) -> Tensor:
    return net.second(torch.tanh(net.first(x)))


def twice(net: Net2, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    return net.second(h) + net.second(-h)


def first_after_second(net: Net2, x: Tensor) -> Tensor:
    return net.first(torch.ones_like(x)).sum() + net.second(torch.tanh(net.first(x)))


BAD_FORWARDS = {
    "an output that is no tensor": (
        lambda net, x: (plain_forward(net, x), x),
        {},
        TypeError,
        "the model's output is a tuple, but direct feedback needs the gradient of one tensor.*output=",
    ),
    "logits that are no tensor": (
        lambda net, x: {"logits": [plain_forward(net, x)]},
        {},
        TypeError,
        "the model's output is a dict",
    ),
    "an output that runs twice": (
        twice,
        {"output": "second", "include": ["first"]},
        RuntimeError,
        "the output of 'second' ran twice in one forward",
    ),
    "a layer after the output": (
        lambda net, x: net.spare(torch.tanh(net.first(x))) + plain_forward(net, x),
        {"output": "spare"},
        RuntimeError,
        "'first' ran after the output of 'spare'",
    ),
    "a site that never runs": (
        plain_forward,
        {"sites": "first|spare"},
        RuntimeError,
        "these sites have not run: 'spare'",
    ),
    "another batch": (
        lambda net, x: plain_forward(net, torch.cat([x, x]))[:3],
        {},
        RuntimeError,
        r"batches of the model's output and of the input of 'first' \(and 1 more\) differ"
        r".*\(3, 3\) and \(6, 4\).*exclude=\['first', 'second'\]",
    ),
    "another batch at a module": (
        lambda net, x: plain_forward(net, torch.cat([x, x]))[:3],
        {"sites": "second"},
        RuntimeError,
        "the input of 'second' differ",
    ),
}


@pytest.mark.parametrize(("forward", "options", "kind", "message"), BAD_FORWARDS.values(), ids=BAD_FORWARDS)
def test_forwards_that_are_refused(forward, options, kind, message):
    model, plain = redrawn(Net2(forward)), redrawn(Net2(forward))
    x = draw(3, 4).requires_grad_()
    feedbackhook.patch(model, "DFA", **options)
    for _ in range(2):
        with pytest.raises(kind, match=message):
            model(x)
    model.eval()
    with torch.no_grad():
        model(x)  # nothing to refuse without a graph
    untouched(model.train(), plain)


def test_a_forward_works_after_one_that_was_refused():
    model, plain, x = redrawn(Net2(plain_forward)), redrawn(Net2(plain_forward)), draw(3, 4)
    patch = feedbackhook.patch(model, "DFA", include=["first", "second"])
    model.run = BAD_FORWARDS["another batch"][0]
    with pytest.raises(RuntimeError, match="batches"):
        model(x.clone().requires_grad_())
    model.run = plain_forward
    assert_same_gradients(gradients(model, x), by_hooks(plain, matrices_of(patch), x))


def test_a_site_that_gets_its_input_in_an_object():
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Opens(nn.Module):
        def forward(self, box: Box) -> Tensor:
            return box.x

    model = nn.Sequential(nn.Linear(4, 3), nn.Identity(), Opens(), nn.Linear(3, 2)).double()
    model[1].register_forward_hook(lambda module, args, output: Box(output))
    feedbackhook.patch(model, "DFA", sites=["2"])
    with pytest.raises(RuntimeError, match=r"the site '2' gets a tensor .* inside a Box"):
        model(draw(3, 4))


def test_nested_tensors_and_transforms_are_refused():
    model = mlp()
    feedbackhook.patch(model, "DFA")
    nested = torch.nested.nested_tensor([draw(2, 4), draw(3, 4)], layout=torch.jagged, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"the input of '0' is a nested tensor"):
        model(nested)
    with pytest.raises(RuntimeError, match=r"'0' under a transform of torch.func"):
        torch.func.grad(lambda x: model(x).sum())(draw(3, 4))


# --- in the backward ---------------------------------------------------------------------------------------

BAD_LOSSES = {
    "from the features": (lambda model, x: probe(model.forward_features(x)), "needs|output"),
    "from the features of the same forward": (lambda model, x: probe(seen_features(model, x)[1]), "output"),
    "in part from the features": (
        lambda model, x: sum(map(probe, seen_features(model, x))),
        "a part of this loss does not come from the model's output: it reaches '.*' by another path",
    ),
}


def seen_features(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    seen = []
    handle = model.blocks.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(x)
    handle.remove()
    return output, seen[0]


@pytest.mark.parametrize("options", [{}, {"sites": "blocks[.].*"}], ids=["layers", "blocks"])
@pytest.mark.parametrize(("loss", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_losses_that_do_not_come_from_the_output(loss, message, options):
    plain, model, x = redrawn(Net()), redrawn(Net()), draw(*CNN_INPUT)
    patch = feedbackhook.patch(model, "DFA", **options)
    with pytest.raises(RuntimeError, match=message) as error:
        loss(model, x).backward()
    assert "output=" in str(error.value)
    got = gradients(model, x)
    assert_same_gradients(got, by_hooks(plain, matrices_of(patch), x))
    patch.remove()
    assert_bit_equal(gradients(model, x), by_backprop(plain, x))
    untouched(model, plain)


def test_a_penalty_on_the_weights_is_no_loss_from_elsewhere():
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    for options in ({}, {"sites": "blocks[.].*"}):
        model = copy.deepcopy(plain)
        patch = feedbackhook.patch(model, "DFA", **options)
        penalty = sum(p.square().sum() for p in model.parameters())
        (probe(model(x)) + penalty).backward()
        want = by_hooks(plain, matrices_of(patch), x, input_requires_grad=False).parameters
        for name, p in model.named_parameters():
            assert (p.grad - want[name] - 2 * p).norm() <= 1e-12 * p.grad.norm()
        model.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()
        assert all(torch.equal(p.grad, 2 * p) for p in model.parameters())


def test_a_backward_past_sites_that_were_not_called():
    """No hook of a block runs, so the guards on the parameters must notice."""
    model, x = redrawn(Net()), draw(*CNN_INPUT)
    feedbackhook.patch(model, "DFA", sites="blocks[.].*")
    h = torch.tanh(model.stem(x))
    for block in model.blocks:
        h = block.forward(h)
    with pytest.raises(ExactGradientError, match=r"does not come from the model's output.*output="):
        probe(model.forward_head(h)).backward()


BAD_TARGETS = {
    "a loss that is no cross-entropy": (lambda output, y: probe(output), None, "DRTP needs the targets"),
    "one negative entry by chance": (
        lambda output, y: (output * torch.tensor([1.0, -1.0, 2.0]).double()).sum(),
        None,
        "DRTP needs the targets",
    ),
    "soft labels": (
        lambda output, y: F.cross_entropy(0 * output, torch.tensor([[0.5, 0.5, 0.0]] * 3).double()),
        None,
        "exactly one negative entry.*patch.targets",
    ),
    "a wrong shape": (F.cross_entropy, torch.zeros(2, dtype=torch.long), r"shape \(2,\).*needs shape \(3,\)"),
}


@pytest.mark.parametrize(("loss", "targets", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_targets_that_are_missing_or_do_not_fit(loss, targets, message):
    model, plain, y = mlp(), mlp(), torch.tensor([0, 1, 2])
    patch = feedbackhook.patch(model, "DRTP")
    if targets is not None:
        patch.targets(targets)
    with pytest.raises(ValueError, match=message):
        loss(model(draw(3, 4)), y).backward()
    model.zero_grad()
    F.cross_entropy(model(draw(3, 4)), y).backward()  # wrong targets are not kept for the next forward
    untouched(model, plain)


def test_targets_are_integers_and_float16_has_no_place_for_its_loss_scale():
    model = mlp().half()
    patch = feedbackhook.patch(model, "DRTP")
    with pytest.raises(TypeError, match="targets must be a tensor of integers"):
        patch.targets(torch.zeros(3))
    with pytest.raises(ValueError, match="float16"):
        F.cross_entropy(model(draw(3, 4).half()), torch.tensor([0, 1, 2])).backward()


def test_second_derivatives_are_refused():
    for options in ({}, {"sites": ["2"]}):
        model, x = mlp(), draw(3, 4).requires_grad_()
        feedbackhook.patch(model, "DFA", **options)
        (g,) = torch.autograd.grad(probe(model(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot differentiate a gradient that went through feedback"):
            g.sum().backward()
