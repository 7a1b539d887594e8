"""One patched layer of every kind between two others: what changes, what never changes, and what remains."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import bounds
from support.oracle import (
    ORACLES,
    assert_bit_equal,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    distances,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    PATCHABLE,
    PROBLEMS,
    Net,
    draw,
    layer_names,
    mlp,
    patched,
    random_feedback,
    redrawn,
)
from support.rules import INEXACT, PATCH_ALL
from support.traces import global_hooks, traces
from torch import nn

import feedbackhook

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
EVERY_KIND = pytest.mark.parametrize("kind", PROBLEMS)
RULES = {
    **{mode: {"mode": mode, **options} for mode, options in INEXACT.items()},
    "sign, magnitude uniform": {"mode": "sign", "magnitude": "uniform"},
    "sign, magnitude weight": {"mode": "sign", "magnitude": "weight", "concordance": 0.5},
    "sign, concordance 0.8": {"mode": "sign", "concordance": 0.8, "scale": None},
    "sign, redrawn": {"mode": "sign", "redraw": "update", "scale": "fan_in"},
    "random, std": {"mode": "random", "std": 0.3},
    "brSF, concordance 0.75": {"mode": "brSF", "concordance": 0.75},
    "frSF, concordance 0.25": {"mode": "frSF", "concordance": 0.25},
    "angle, 120 degrees": {"mode": "angle", "degrees": 120, "redraw": "update"},
    "quantized, 1 bit": {"mode": "quantized", "bits": 1, "scale": None},
    "low_rank, rank 1": {"mode": "low_rank", "rank": 1, "std": 0.3},
    "svd, pseudoinverse": {"mode": "svd", "power": -1, "scale": None},
}

# what lies upstream of a rerouted layer; the output layer's own gradients are backprop's
REROUTED = ["input", "upstream.weight", "upstream.bias", "layer.weight"]


# --- every layer kind and option -------------------------------------------------------------------------


@EVERY_KIND
@given(data=st.data())
def test_gradients_are_both_oracles_and_the_forward_keeps_its_bits(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    model, patch = patched(problem)
    with patch:
        got = gradients(model, x)
        feedback = {name: patch.feedback(name) for name in layer_names(plain)}
    assert_matches_oracle(got, plain, feedback, x, unlike=REROUTED, oracles=ORACLES)
    assert_same_gradients(gradients(model, x), by_backprop(plain, x), tolerance=0.0)


@EVERY_KIND
@given(data=st.data())
def test_a_layer_patched_alone_leaves_its_neighbours_exact(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    feedback = random_feedback(plain, ["layer"])
    model, _ = patched(problem, include=["layer"], feedback=feedback)
    got, exact = gradients(model, x), by_backprop(plain, x)
    upstream = ["input", "upstream.weight", "upstream.bias"]
    assert_matches_oracle(got, plain, feedback, x, unlike=upstream, oracles=ORACLES)
    for name, grad in got.parameters.items():
        if name not in upstream:
            assert torch.equal(grad, exact.parameters[name]), name


@EVERY_KIND
@given(data=st.data())
def test_symmetric_feedback_is_backprop(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    model, patch = patched(problem, "symmetric")
    got = gradients(model, x)
    assert torch.equal(got.output, plain(x))
    assert_same_gradients(got, by_backprop(plain, x))
    assert [row.rerouted for row in patch.layers] == [1, 1, 1]


@EVERY_KIND
@given(data=st.data())
def test_a_disabled_patch_is_backprop_to_the_bit(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    model, patch = patched(problem)
    patch.enabled = False
    assert_bit_equal(gradients(model, x), by_backprop(plain, x))
    patch.enabled = True
    assert_unlike(gradients(model, x), by_backprop(plain, x), REROUTED)


@EVERY_KIND
@given(data=st.data())
def test_exact_runs_backprop_and_then_feedback_on_one_graph(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain = problem.model()
    model, patch = patched(problem)
    x = problem.input().requires_grad_()
    output = model(x)
    loss = probe(output)
    with patch.exact():
        loss.backward(retain_graph=True)
    exact = read_gradients(model, x, output)
    model.zero_grad()
    x.grad = None
    loss.backward()
    assert_same_gradients(exact, by_backprop(plain, x))
    feedback = {name: patch.feedback(name) for name in layer_names(plain)}
    assert_matches_oracle(read_gradients(model, x, output), plain, feedback, x, unlike=REROUTED)


@EVERY_KIND
@given(data=st.data(), rule=st.sampled_from(list(RULES)))
def test_every_rule_sends_errors_through_the_v_that_it_shows(kind, data, rule):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    assume(not rule.startswith("angle") or plain.layer.weight.numel() > 1)  # which "angle" refuses
    model, patch = patched(problem, **RULES[rule], **PATCH_ALL)
    got = gradients(model, x)
    feedback = {name: patch.feedback(name) for name in layer_names(plain)}
    for name, v in feedback.items():
        weight = model.get_submodule(name).weight
        assert v.shape == weight.shape
        assert v.dtype == weight.dtype
        assert not v.requires_grad
    for oracle in ORACLES.values():
        assert_same_gradients(got, oracle(plain, feedback, x))
    assert torch.equal(got.output, plain(x))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_but_symmetric_differs_from_backprop(rule):
    plain, x = mlp(), draw(3, 4)
    model, patch = patched(mlp(), **RULES[rule], **PATCH_ALL)
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    unlike = ["input", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=unlike, oracles=ORACLES)


@pytest.mark.parametrize("name", ["0", "2", "4"])
def test_tensor_feedback_is_the_users_own(name):
    model = mlp()
    feedback = random_feedback(model)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    assert torch.equal(patch.feedback(name), feedback[name])


# --- corners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(nn.Linear(4, 3), (2, 4), id="Linear"),
        pytest.param(nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5), id="Conv2d"),
        pytest.param(nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 2, 5), id="ConvTranspose1d"),
    ],
)
def test_the_root_may_itself_be_the_layer(layer, shape):
    plain, model = redrawn(layer), copy.deepcopy(layer).double()
    model.load_state_dict(plain.state_dict())
    feedback = {"": draw(*layer.weight.shape, seed=5)}
    with feedbackhook.patch(model, "tensor", feedback=feedback):
        got = gradients(model, draw(*shape))
    assert_matches_oracle(got, plain, feedback, draw(*shape), unlike=["input"], oracles=ORACLES)


@pytest.mark.parametrize(
    "options",
    [{"output_size": [10]}, {"output_size": (2, 3, 9)}],
    ids=["spatial", "whole"],
)
def test_output_size_of_a_transposed_convolution(options):
    class Upsample(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre = nn.Conv1d(2, 2, 1)
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(torch.tanh(self.pre(x)), **options)

    plain, model, x = redrawn(Upsample()), redrawn(Upsample()), draw(2, 2, 5)
    feedback = random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    assert_matches_oracle(
        gradients(model, x), plain, feedback, x, unlike=["input", "pre.weight"], oracles=ORACLES
    )


def test_an_input_passed_by_keyword_is_rerouted():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.conv, self.fc2 = nn.Linear(4, 4), nn.Conv1d(1, 2, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.tanh(self.fc1(input=x)).unsqueeze(1)
            return self.fc2(input=torch.tanh(self.conv(input=x)).flatten(1))

    plain, model, x = redrawn(ByKeyword()), redrawn(ByKeyword()), draw(3, 4)
    feedback = random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "fc1.weight"])


def test_an_empty_batch_gives_zero_gradients():
    model, _ = patched(mlp())
    got = gradients(model, torch.zeros(0, 4, dtype=torch.float64))
    assert got.output.shape == (0, 3)
    assert got.input.shape == (0, 4)
    assert all(not grad.any() for grad in got.parameters.values())


def test_channels_last_memory_is_rerouted():
    plain, model = (redrawn(Net()).to(memory_format=torch.channels_last) for _ in range(2))
    x = draw(2, 2, 9, 9).to(memory_format=torch.channels_last)
    feedback = random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["stem.weight"], oracles=ORACLES)


def test_a_layer_called_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    plain, model, x = redrawn(Twice()), redrawn(Twice()), draw(3, 4)
    feedback = random_feedback(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    assert_matches_oracle(
        gradients(model, x), plain, feedback, x, unlike=["fc.weight", "input"], oracles=ORACLES
    )
    assert {row.name: row.calls for row in patch.layers} == {"fc": 2, "out": 1}


def test_the_first_layer_has_no_upstream_and_raises_no_error():
    plain, model, x = mlp(), mlp(), draw(3, 4)
    feedback = random_feedback(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    got = gradients(model, x, input_requires_grad=False)
    assert_matches_oracle(
        got, plain, feedback, x, unlike=["0.weight", "2.weight"], oracles=ORACLES, input_requires_grad=False
    )
    assert got.input is None
    rows = {row.name: row for row in patch.layers}
    assert [bool(rows[name].input_requires_grad) for name in ("0", "2", "4")] == [False, True, True]
    assert [rows[name].calls for name in ("0", "2", "4")] == [1, 1, 1]
    assert [rows[name].rerouted for name in ("0", "2", "4")] == [0, 1, 1]


def test_rows_name_each_layer_its_kind_shape_and_rule():
    model = redrawn(Net())
    patch = feedbackhook.patch(model, "sign")
    rows = {row.name: row for row in patch.layers}
    assert list(rows) == layer_names(model)
    for name, row in rows.items():
        layer = model.get_submodule(name)
        assert type(layer).__name__.lower() in row.kind.replace("_", "").lower()
        assert tuple(row.shape) == tuple(layer.weight.shape)
        assert "sign" in str(row.rule)
        assert row.calls == row.rerouted == 0


@pytest.mark.parametrize("kind", PATCHABLE, ids=lambda kind: kind.__name__)
def test_float32_stays_float32(kind):
    options = {} if kind is nn.Linear else {"kernel_size": 3, "padding": 1}
    plain = redrawn(nn.Sequential(kind(2, 4, **options), nn.Tanh(), kind(4, 2, **options))).float()
    x = draw(3, 2, *[5] * (plain[0].weight.dim() - 2)).float()
    model, feedback = copy.deepcopy(plain), random_feedback(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    got = gradients(model, x)
    assert patch.feedback("0").dtype == got.input.dtype == torch.float32
    assert_matches_oracle(
        got, plain, feedback, x, unlike=["input", "0.weight"], tolerance=bounds.HALF_OF_FLOAT32
    )


# --- enabled, exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_the_forward",
    [
        pytest.param(True, id="enabled, disabled before the backward"),
        pytest.param(False, id="disabled, enabled before the backward"),
    ],
)
def test_enabled_is_read_in_the_forward_not_in_the_backward(in_the_forward):
    plain, x = mlp(), draw(3, 4)
    model, patch = patched(mlp())
    leaf = x.clone().requires_grad_()
    patch.enabled = in_the_forward
    output = model(leaf)
    patch.enabled = not in_the_forward
    probe(output).backward()
    got = read_gradients(model, leaf, output)
    if in_the_forward:
        assert_matches_oracle(got, plain, random_feedback(plain), x)
    else:
        assert_bit_equal(got, by_backprop(plain, x))


def test_exact_ends_with_its_context_even_after_an_error():
    plain, x = mlp(), draw(3, 4)
    model, patch = patched(mlp())
    with pytest.raises(ZeroDivisionError), patch.exact():
        raise ZeroDivisionError
    assert_matches_oracle(gradients(model, x), plain, random_feedback(plain), x)


# --- what never changes ----------------------------------------------------------------------------------


def test_state_dict_and_parameters_are_unchanged_while_patched():
    plain, model = redrawn(Net()), redrawn(Net())
    own = dict(model.named_parameters())
    _, patch = patched(model)
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
        assert list(dict(model.named_parameters())) == list(own)
        assert all(parameter is own[name] for name, parameter in model.named_parameters())
        assert list(dict(model.named_buffers())) == list(dict(plain.named_buffers()))
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        gradients(model, draw(2, 2, 9, 9))
    patch.remove()
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


def test_random_numbers_of_the_forward_are_unchanged():
    """The global generator is left alone by patching, forward, backward and redraw."""
    model = mlp()
    state = torch.get_rng_state()
    patch = feedbackhook.patch(model, "sign", redraw="update", concordance=0.5)
    gradients(model, draw(3, 4))
    patch.redraw()
    patch.feedback("2")
    patch.remove()
    assert torch.equal(torch.get_rng_state(), state)


# --- several patches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_patches_on_disjoint_parts(first_out):
    plain, model, x = redrawn(Net()), redrawn(Net()), draw(3, 2, 9, 9)
    before, hooks = traces(model), global_hooks()
    feedback = random_feedback(plain)
    parts = {
        prefix: {name[len(prefix) + 1 :]: v for name, v in feedback.items() if name.startswith(f"{prefix}.")}
        for prefix in ("blocks.0", "blocks.1")
    }
    patches = [
        feedbackhook.patch(model.get_submodule(prefix), "tensor", feedback=own)
        for prefix, own in parts.items()
    ]

    def of(*prefixes):
        return {f"{prefix}.{name}": v for prefix in prefixes for name, v in parts[prefix].items()}

    both = gradients(model, x)
    assert_matches_oracle(both, plain, of(*parts), x, unlike=["stem.weight", "blocks.0.conv1.weight"])

    patches[first_out].remove()
    kept = list(parts)[1 - first_out]
    one = gradients(model, x)
    assert_matches_oracle(one, plain, of(kept), x, unlike=["stem.weight"])
    assert max(distances(one, both).values()) > 1e-3

    patches[1 - first_out].remove()
    assert traces(model) == before
    assert global_hooks() <= hooks
    assert_bit_equal(gradients(model, x), by_backprop(plain, x))


def test_two_models_in_one_backward():
    first, second, plain = mlp(), redrawn(nn.Linear(3, 2)), mlp()
    head = redrawn(nn.Linear(3, 2))
    feedback, head_feedback = random_feedback(plain), {"": draw(2, 3, seed=4)}
    feedbackhook.patch(first, "tensor", feedback=feedback)
    feedbackhook.patch(second, "tensor", feedback=head_feedback)
    x = draw(3, 4)
    got = gradients(nn.Sequential(first, second), x)
    want = by_saved_tensors(
        nn.Sequential(plain, head),
        {**{f"0.{name}": v for name, v in feedback.items()}, "1": head_feedback[""]},
        x,
    )
    assert torch.equal(got.output, want.output)
    assert_same_gradients(got, want)
    assert_unlike(got, by_backprop(nn.Sequential(plain, head), x), ["0.0.weight", "0.4.weight"])
