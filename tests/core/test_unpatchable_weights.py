"""Weights that no layer holds are named in one warning; transformers' Conv1D is a layer, and is rerouted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.oracle import (
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
)
from support.problems import draw, patched_copy, redrawn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import feedbackhook
from feedbackhook.core.audit import Finding

FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])


class Own(nn.Module):
    """A module of no known kind, with a weight of its own that `function` uses."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def between_layers(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> nn.Sequential:
    return redrawn(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Own(function, shape), nn.Tanh(), nn.Linear(4, 3))
    )


def grouped(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ngi,gio->ngo", x.view(3, 2, 2), w).reshape(3, 4)


OWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "matmul": (lambda x, w: x @ w, (4, 4)),
    "mm": (torch.mm, (4, 4)),
    "addmm": (lambda x, w: torch.addmm(x.new_zeros(4), x, w), (4, 4)),
    "bmm": (lambda x, w: torch.bmm(x[None], w)[0], (1, 4, 4)),
    "einsum": (lambda x, w: torch.einsum("ni,io->no", x, w), (4, 4)),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (4, 4, 4)),
    "grouped": (grouped, (2, 2, 2)),
    "experts": (lambda x, w: torch.stack([x @ expert for expert in w]).mean(0), (3, 4, 4)),
    "linear": (F.linear, (4, 4)),
    "convolution": (lambda x, w: F.conv1d(x[..., None], w[..., None]).flatten(1), (4, 4)),
    "inner": (torch.inner, (4, 4)),
    "cdist": (torch.cdist, (4, 4)),
    "aten.mm": (torch.ops.aten.mm, (4, 4)),
    "mv": (lambda x, w: torch.stack([torch.mv(w, row) for row in x]), (4, 4)),
    "two chunks": (lambda x, w: x @ w.chunk(2)[0].t() @ w.chunk(2)[1], (4, 4)),
}
COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normalized": lambda x, w: x @ F.normalize(w),
    "softmax": lambda x, w: x @ w.softmax(-1),
    "masked": lambda x, w: x @ (w * torch.ones(4, 4).tril()),
}
ELEMENTWISE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "scale": (lambda x, w: x * w, (3, 4)),
    "position": (lambda x, w: x + w, (3, 4)),
    "layer norm": (lambda x, w: F.layer_norm(x, (3, 4), w, w), (3, 4)),
    "slope": (lambda x, w: F.prelu(x, w[0]), (1, 4)),
    "norm": (lambda x, w: x / w.norm(), (4, 4)),
}


def warnings_of(model: nn.Module, x: Tensor, **options: bool) -> list[str]:
    """What two steps of training say."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            gradients(model, x, **options)
    return [str(warning.message) for warning in said]


@FROZEN
@pytest.mark.parametrize(("function", "shape"), OWN.values(), ids=OWN)
def test_a_weight_that_no_layer_holds_is_named_once(function, shape, frozen):
    model, x = between_layers(function, shape), draw(3, 4)
    model[2].requires_grad_(not frozen)
    patch = feedbackhook.patch(model, "sign")
    (said,) = warnings_of(model, x)
    assert "belong to no layer that can be patched" in said
    assert "'2.w'" in said
    findings = patch.audit(model(x))  # on request it is found each time
    assert {(finding.name, finding.patched, finding.shape) for finding in findings} == {("2.w", False, shape)}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
def test_so_is_one_that_a_product_meets_computed(function):
    model = between_layers(function, (4, 4))
    feedbackhook.patch(model, "sign")
    (said,) = warnings_of(model, draw(3, 4))
    assert "'2.w'" in said


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
def test_but_not_what_was_computed_from_a_frozen_one(function):
    """A known limit: the graph has no trace of it."""
    model, x = between_layers(function, (4, 4)), draw(3, 4)
    model[2].requires_grad_(False)
    patch = feedbackhook.patch(model, "sign")
    assert warnings_of(model, x) == []
    assert patch.audit(model(x)) == []


@FROZEN
@pytest.mark.parametrize(("function", "shape"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_scales_positions_and_norms_are_not_named(function, shape, frozen):
    model, x = between_layers(function, shape), draw(3, 4)
    model[2].requires_grad_(not frozen)
    patch = feedbackhook.patch(model, "sign")
    assert warnings_of(model, x) == []
    assert patch.audit(model(x)) == []


class TwoOwn(nn.Module):
    """Data meet a weight of the module's own, then activations another."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x @ self.w1) @ self.w2)


@pytest.mark.parametrize(
    ("upstream", "named"), [(False, ["w2"]), (True, ["w1", "w2"])], ids=["data", "what requires a gradient"]
)
def test_a_weight_that_data_meet_has_no_error_signal_to_send_on(upstream, named):
    model = redrawn(TwoOwn())
    feedbackhook.patch(model, "sign")
    (said,) = warnings_of(model, draw(3, 4), input_requires_grad=upstream)
    assert [name for name in ("w1", "w2") if f"'{name}'" in said] == named


@pytest.mark.parametrize("first", ["linear", "aten.mm"])
def test_a_layer_after_data_times_a_weight_of_ones_own_is_rerouted(first):
    """What is told of does not change what is learned."""
    model, x = between_layers(*OWN[first]), draw(3, 4)
    plain = copy.deepcopy(model)
    model, feedback = patched_copy(plain)
    with pytest.warns(UserWarning, match=r"'2\.w'"):
        got = gradients(model, x)
    assert_matches_oracle(got, plain, feedback, x, unlike=["input", "0.weight", "2.w"])


# --- GPT-2 -----------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    return redrawn(transformers.GPT2LMHeadModel(config))


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def with_linear_layers(model: nn.Module) -> nn.Module:
    """The same network, each Conv1D replaced by the nn.Linear that computes the same."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, dtype=module.weight.dtype)
            linear.weight = nn.Parameter(module.weight.detach().t().clone())
            linear.bias = module.bias
            parent, _, key = name.rpartition(".")
            setattr(twin.get_submodule(parent), key, linear)
    return twin


def test_gpt2_is_rerouted_as_if_of_linear_layers():
    plain, tokens = gpt2(), torch.tensor([[1, 2, 3, 4], [10, 0, 5, 7]])
    conv1ds = [name for name, module in plain.named_modules() if isinstance(module, Conv1D)]
    assert len(conv1ds) == 8
    names = [*conv1ds, "lm_head"]
    feedback = {n: draw(*plain.get_submodule(n).weight.shape, seed=i) / 2 for i, n in enumerate(names)}
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    options = {"input_requires_grad": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients(model, tokens, logits, **options)
    assert [(row.name, row.rerouted) for row in patch.layers] == [(name, 1) for name in names]

    linear = with_linear_layers(plain)
    turned = {name: v.t().contiguous() if name in conv1ds else v for name, v in feedback.items()}
    want = by_saved_tensors(linear, turned, tokens, logits, **options)
    for name in conv1ds:
        want.parameters[f"{name}.weight"] = want.parameters[f"{name}.weight"].t()
    torch.testing.assert_close(got.output, want.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, want)
    exact = by_backprop(plain, tokens, logits, **options)
    assert_unlike(got, exact, ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
    assert patch.audit(model(tokens).logits) == []


def test_the_fan_in_of_a_conv1d_is_that_of_the_linear_layer_it_is():
    """Its weight is transposed: the first dimension feeds, so a rule that scales by fan-in scales alike."""
    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 3))
    seen = {}

    @feedbackhook.register_rule("noting fan-in")
    @dataclass(frozen=True)
    class NotingFanIn:
        def draw(self, weight, rng):
            seen[rng.layer.name] = (rng.layer.kind, rng.layer.fan_in)
            return {}

        def feedback(self, weight, parts):
            return weight

    feedbackhook.patch(model, "noting fan-in")
    assert seen == {"0": ("Conv1D", 4), "1": ("Linear", 6)}


def test_a_conv1d_that_is_excluded_is_exact_and_not_warned_of():
    plain, x = redrawn(nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4), nn.Linear(4, 3))), draw(3, 4)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "random", exclude=["1"])
    feedback = {name: patch.feedback(name) for name in ("0", "2")}
    assert warnings_of(model, x) == []
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "0.weight", "1.weight"])
    assert patch.audit(model(x)) == []


def test_a_finding_tells_name_kind_shape_and_operation():
    model = between_layers(torch.mm, (4, 4))
    patch = feedbackhook.patch(model)
    with pytest.warns(UserWarning, match=r"'2\.w' \(MmBackward0\)"):
        output = model(draw(3, 4))
    assert patch.audit(output) == [Finding(name="2.w", patched=False, shape=(4, 4), operation="MmBackward0")]
