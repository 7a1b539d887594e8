"""The same on a GPU: gradients against the oracle, which runs on the CPU in float64, and against backprop.

A backward on a GPU runs in a thread of its own, compiled code is Triton's and replayed by CUDA graphs, and
half precision is what such machines train in: none of it is seen by the other tests. To try these tests
where there is no GPU, `FEEDBACKHOOK_TEST_DEVICE=cpu` runs them all on the CPU.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import bounds
from support.model_coverage import prepared
from support.oracle import (
    ORACLES,
    Gradients,
    Step,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    distances,
    gradients,
    probe,
    read_gradients,
    swapped_saved_tensors,
)
from support.problems import (
    MLP_UPSTREAM,
    PROBLEMS,
    InPlaceNet,
    Net,
    Problem,
    draw,
    layer_names,
    mlp,
    outside_every_bracket,
    random_feedback,
    redrawn,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import feedbackhook
from feedbackhook import CounterRNG, LayerInfo, Patch, Recorder, read
from feedbackhook.rules import _RULES

DEVICE = os.environ.get("FEEDBACKHOOK_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU; FEEDBACKHOOK_TEST_DEVICE=cpu tries it on the CPU", allow_module_level=True)
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="is about a GPU alone")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

RULES = {
    "symmetric": {},
    "sign": {"concordance": 0.7},
    "random": {"redraw": "update"},
    "tensor": {},
    "uSF": {},
    "NuSF": {},
    "frSF": {"concordance": 0.5},
    "brSF": {"concordance": 0.75},
    "RndF": {},
}
BY_HASH_ALONE = ["uSF", "NuSF", "frSF", "brSF"]
"""Whose V takes the hash's uniform numbers, products and signs: no sum, no inverse error function."""
NORMAL = ["random", "RndF"]


# --- between the devices ---------------------------------------------------------------------------------


def moved(plain: nn.Module, mode: str = "tensor", **options) -> tuple[nn.Module, Patch]:
    """A copy of `plain` on the device, patched there; random V if none is given to the rule "tensor"."""
    model = copy.deepcopy(plain).to(DEVICE)
    if mode == "tensor" and "feedback" not in options:
        with feedbackhook.patch(copy.deepcopy(plain), "symmetric") as patch:
            shapes = {row.name: row.shape for row in patch.layers}
        options["feedback"] = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return model, feedbackhook.patch(model, mode, **options)


def feedback_of(patch: Patch) -> dict[str, Tensor]:
    """V by layer, on the CPU in float64."""
    return {row.name: patch.feedback(row.name).cpu().double() for row in patch.layers}


def home(got: Gradients) -> Gradients:
    """The same on the CPU in float64."""

    def back(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu().double()

    parameters = {name: back(grad) for name, grad in got.parameters.items()}
    return Gradients(got.output.cpu().double(), back(got.input), parameters)


def assert_follows(
    got: Gradients,
    plain: nn.Module,
    feedback: Mapping[str, Tensor],
    x: Tensor,
    tolerance: float = bounds.HALF_OF_FLOAT64,
    **options,
) -> None:
    """What the device gave is the oracle's, computed on the CPU."""
    assert_matches_oracle(home(got), plain, feedback, x, tolerance=tolerance, bit_equal=False, **options)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- every rule and kind of layer ------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.before(x))
        return self.attention(x, x, x, need_weights=False)[0]


class Embedded(nn.Module):
    """The embedding itself has no V: what arrives there has passed the layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(self.embedding(x))))


def between(layer: Callable[[], nn.Module], *shape: int) -> tuple[Callable[[], nn.Module], Tensor, list[str]]:
    problem = Problem(layer, "", shape)
    return problem.model, problem.input(), ["input", "upstream.weight", "layer.weight"]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "linear": between(lambda: nn.Linear(5, 4), 3, 2),
    "linear on sequences": between(lambda: nn.Linear(5, 4), 3, 6, 2),
    "conv1d": between(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 3, 2, 9),
    "conv2d": between(lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), 3, 2, 7, 8),
    "grouped conv2d": between(lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), 3, 2, 7, 8),
    "depthwise conv2d": between(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), 3, 2, 7, 8),
    "conv3d": between(lambda: nn.Conv3d(3, 4, 2, stride=2), 2, 2, 4, 5, 6),
    "transposed conv1d": between(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 3, 2, 5),
    "transposed conv2d": between(lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, groups=2), 3, 2, 5, 4),
    "attention": (lambda: redrawn(Attention()), draw(2, 3, 8), ["input", "before.weight"]),
    "encoder layer": (
        lambda: redrawn(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)),
        draw(2, 3, 8),
        ["input", "linear1.weight"],
    ),
    "residual network": (lambda: redrawn(Net()), draw(2, 2, 9, 9), ["input", "stem.weight"]),
    "activations in place": (lambda: redrawn(InPlaceNet()), draw(2, 2, 9, 9), ["input", "stem.0.weight"]),
    "embedding": (lambda: redrawn(Embedded()), torch.tensor([[1, 2, 6], [0, 2, 3]]), ["embedding.weight"]),
}


def test_every_built_in_rule_is_among_them():
    assert RULES.keys() == {name for name, cls in _RULES.items() if cls.__module__ == "feedbackhook.rules"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", RULES)
def test_every_rule_sends_errors_through_the_v_that_it_shows(mode, network):
    build, x, unlike = NETWORKS[network]
    options = {"input_requires_grad": x.is_floating_point()}
    plain = build()
    model, patch = moved(plain, mode, **RULES[mode])
    got, feedback = gradients(model, x.to(DEVICE), **options), feedback_of(patch)
    assert all(v.isfinite().all() for v in feedback.values())
    if mode == "symmetric":
        exact = by_backprop(plain, x, **options)
        assert_same_gradients(home(got), exact, bounds.HALF_OF_FLOAT64)
    else:
        assert_follows(got, plain, feedback, x, unlike=unlike, **options)


@pytest.mark.parametrize("kind", PROBLEMS)
@given(data=st.data())
def test_every_kind_of_layer_follows_both_oracles_until_removed(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    model, patch = moved(plain, feedback=random_feedback(plain))
    with patch:
        got, feedback = gradients(model, x.to(DEVICE)), feedback_of(patch)
    assert_follows(got, plain, feedback, x, unlike=["input", "layer.weight"], oracles=ORACLES)
    after = gradients(model, x.to(DEVICE))
    assert_same_gradients(home(after), by_backprop(plain, x), bounds.HALF_OF_FLOAT64)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    plain = prepared(timm.create_model(name, pretrained=False, num_classes=10))
    x = draw(2, 3, *[160 if "vit" in name else 64] * 2)
    model, patch = moved(plain, "brSF", concordance=0.7)
    assert_follows(gradients(model, x.to(DEVICE)), plain, feedback_of(patch), x, unlike=["input"])


@pytest.mark.parametrize("mode", ["tensor", "brSF"])
def test_training_follows_the_oracle_step_by_step(mode):
    """Ten steps beside a plain model on the CPU, into which the oracle's gradients are written."""
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    model, patch = moved(plain, mode)
    nets = (model, plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in nets]
    for _ in range(10):
        want = by_saved_tensors(plain, feedback_of(patch), x)
        for name, parameter in plain.named_parameters():
            parameter.grad = want.parameters[name]
        assert_same_gradients(home(gradients(model, x.to(DEVICE))), want, bounds.HALF_OF_FLOAT64)
        for optimizer in optimizers:
            optimizer.step()


# --- V on both devices -----------------------------------------------------------------------------------


LAYER = LayerInfo("block.fc", "Linear", (700, 1000), 1000)
SIZES = [0, 1, 257, 4099, (1 << 18) + 1, 700_001]


@pytest.mark.parametrize("count", [0, 5, 2**32 - 1, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["by tensor operations", "fused"])
def test_uniform_draws_are_those_of_the_cpu_in_every_bit(count, fused):
    for n in SIZES:
        on_cpu = CounterRNG(3, LAYER, count).uniform(torch.empty(n), "sign")
        here = count.to(DEVICE) if isinstance(count, Tensor) and not fused else count
        rng = CounterRNG(3, LAYER, here, fused=fused)
        assert torch.equal(rng.uniform(torch.empty(n, device=DEVICE), "sign").cpu(), on_cpu), n


def test_normal_draws_are_those_of_the_cpu_but_for_the_inverse_error_functions_rounding():
    """Both devices' functions are float32's, so it is erf of their draws that agrees, to float32's rounding:
    a few units of the last place, of the function, of the root of 2 and of what is between."""
    wanted = 2 * CounterRNG(3, LAYER).uniform(torch.empty(LAYER.shape)).double() - 1
    for device in ("cpu", DEVICE):
        draws = CounterRNG(3, LAYER).normal(torch.empty(LAYER.shape, device=device))
        assert draws.isfinite().all()
        reached = torch.special.erf(draws.cpu().double() / math.sqrt(2))
        assert (reached - wanted).abs().max() <= 8 * bounds.ROUNDING["float32"], device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", BY_HASH_ALONE)
@pytest.mark.parametrize("moving", ["patched there", "moved when patched"])
def test_v_is_that_of_the_cpu_in_every_bit(mode, dtype, moving):
    plain = redrawn(Net()).to(dtype)
    on_cpu = feedbackhook.patch(copy.deepcopy(plain), mode, **RULES[mode], seed=5)
    model = copy.deepcopy(plain)
    if moving == "patched there":
        model.to(DEVICE)
    patch = feedbackhook.patch(model, mode, **RULES[mode], seed=5)
    model.to(DEVICE)
    for _ in range(2):
        for row in on_cpu.layers:
            v = patch.feedback(row.name)
            assert v.device.type == DEVICE
            assert v.dtype == dtype
            assert torch.equal(v.cpu(), on_cpu.feedback(row.name)), row.name
        patch.redraw()
        on_cpu.redraw()


@pytest.mark.parametrize("mode", ["sign", *NORMAL])
def test_v_with_a_sum_or_a_normal_draw_in_it_is_that_of_the_cpu_to_rounding(mode):
    """The norm of W is summed in an order of its own; the few draws far out differ most (see above)."""
    plain = redrawn(Net())
    _, patch = moved(plain, mode, **RULES[mode])
    on_cpu = feedbackhook.patch(plain, mode, **RULES[mode])
    tolerance = bounds.HALF_OF_FLOAT64 if mode == "sign" else bounds.HALF_OF_FLOAT32
    for name, v in feedback_of(patch).items():
        assert (v - on_cpu.feedback(name)).norm() <= tolerance * v.norm(), name


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"fused": True}, {"recompute": True, "fused": True}]
)
@pytest.mark.parametrize("mode", ["sign", "brSF", "RndF"])
def test_neither_recomputing_nor_fusing_changes_v(mode, options):
    seen = []
    for given_options in ({}, options):
        model, patch = moved(redrawn(Net()), mode, **given_options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(2):
            gradients(model, draw(2, 2, 9, 9, seed=step).to(DEVICE))
            seen.append(feedback_of(patch))
            optimizer.step()
    for kept, other in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(kept[name], other[name]) for name in kept)


def test_a_state_saved_on_one_device_is_that_of_the_other():
    model, patch = moved(mlp(), "brSF", seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients(model, draw(3, 4).to(DEVICE))
    optimizer.step()
    other = feedbackhook.patch(mlp(), "brSF", seed=4)
    other.load_state_dict(patch.state_dict())
    for name, v in feedback_of(patch).items():
        assert torch.equal(v, other.feedback(name))


@ON_GPU
@pytest.mark.parametrize(
    ("mode", "options", "copies"),
    [("uSF", {}, 0), ("brSF", {}, 0), ("frSF", {}, 1), ("RndF", {}, 1), ("frSF", {"recompute": True}, 0)],
)
def test_lasting_memory_in_copies_of_the_weights(mode, options, copies):
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Tanh(), nn.Linear(1024, 2048)).to(DEVICE)
    x = torch.randn(5, 2048, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> int:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    step()  # with what the libraries keep for themselves
    before = step()
    patch = feedbackhook.patch(model, mode, **options)
    step()
    weights = sum(patch.weight(row.name).nbytes for row in patch.layers)
    assert (step() - before) / weights == pytest.approx(copies, abs=0.02)


# --- the backward's own thread ---------------------------------------------------------------------------


def test_exact_runs_backprop_and_then_feedback_on_one_graph():
    plain, x = redrawn(Net()), draw(2, 2, 9, 9)
    model, patch = moved(plain)
    leaf = x.to(DEVICE).requires_grad_()
    output = model(leaf)
    with patch.exact():
        probe(output).backward(retain_graph=True)
    exact = home(read_gradients(model, leaf, output))
    model.zero_grad()
    leaf.grad = None
    probe(output).backward()
    assert_same_gradients(exact, by_backprop(plain, x), bounds.HALF_OF_FLOAT64)
    assert_follows(read_gradients(model, leaf, output), plain, feedback_of(patch), x, unlike=["input"])


@pytest.mark.parametrize("warmed_up", [False, True], ids=["never called", "after a proper step"])
def test_the_guard_names_a_weight_that_was_used_outside_every_bracket(warmed_up):
    plain, x = mlp(), draw(3, 4)
    model, patch = moved(plain)
    if warmed_up:
        gradients(model, x.to(DEVICE))
    with pytest.raises(feedbackhook.ExactGradientError, match=r"'[02]'"):
        probe(outside_every_bracket(model, x.to(DEVICE))).backward()
    assert_follows(gradients(model, x.to(DEVICE)), plain, feedback_of(patch), x, unlike=MLP_UPSTREAM)


def test_the_audit_names_a_weight_in_another_function():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc1(x)) @ self.fc2.weight.T

    model, _ = moved(redrawn(Odd()), "sign")
    with pytest.raises(feedbackhook.ExactGradientError, match="'fc2'"):
        probe(model(draw(3, 4).to(DEVICE))).backward()


class Checkpointed(nn.Module):
    """A convolution and dropout in a checkpoint between two layers; `reentrant=None` is without one."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.reentrant, self.dropout = reentrant, dropout

    def part(self, h: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.b(h)), self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = self.part(h) if self.reentrant is None else checkpoint(self.part, h, use_reentrant=self.reentrant)
        return self.c(h.mean((-2, -1)))


REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@REENTRANT
@pytest.mark.parametrize("mode", ["tensor", "sign", "brSF"])
def test_what_a_checkpoint_recomputes_is_rerouted(mode, reentrant):
    """In every step, and not in the first alone, which is audited; redrawn ones too."""
    plain, x = redrawn(Checkpointed(None)), draw(2, 2, 7, 7)
    model, patch = moved(plain, mode)
    model.reentrant = reentrant
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        assert_follows(
            gradients(model, x.to(DEVICE)), plain, feedback, x, unlike=["input", "a.weight", "b.weight"]
        )
        optimizer.step()


@REENTRANT
def test_dropout_is_the_same_in_a_checkpoint_as_without(reentrant):
    plain, x = redrawn(Checkpointed(None, dropout=0.5)), draw(2, 2, 7, 7).to(DEVICE)
    got = {}
    for way in (None, reentrant):
        model, _ = moved(plain, "brSF")
        model.reentrant = way
        torch.manual_seed(0)
        got[way] = gradients(model, x)
    assert_same_gradients(got[reentrant], got[None], bounds.HALF_OF_FLOAT64)


# --- memory layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tensor", "sign", "frSF", "brSF", "random"])
def test_channels_last(mode):
    plain, x = redrawn(Net()), draw(2, 2, 9, 9)
    model, patch = moved(plain.to(memory_format=torch.channels_last), mode)
    batch = x.to(DEVICE, memory_format=torch.channels_last)
    for _ in range(2):
        got = gradients(model, batch)
        assert_follows(got, plain, feedback_of(patch), x, unlike=["input", "stem.weight"])
    laid_out = feedbackhook.patch(redrawn(Net()).to(DEVICE), mode, **_own_tensors(mode, patch))
    for name, v in feedback_of(patch).items():
        # the draws are by place in the matrix, not in memory
        tolerance = bounds.HALF_OF_FLOAT64 * v.norm()
        assert (feedback_of(laid_out)[name] - v).norm() <= tolerance, name


def _own_tensors(mode: str, patch: Patch) -> dict[str, dict[str, Tensor]]:
    return {"feedback": feedback_of(patch)} if mode == "tensor" else {}


# --- half precision --------------------------------------------------------------------------------------


HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def under_autocast(dtype: str) -> Step:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, getattr(torch, dtype)):
            return model(x).float()

    return step


def cnn() -> nn.Module:
    """Three layers, of which two are convolutions."""
    return redrawn(
        nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(200, 4)
        )
    )


HALF_NETWORKS = {
    "mlp": (mlp, draw(32, 4)),
    "cnn": (cnn, draw(8, 2, 9, 9)),
}


def assert_half_follows(got: Gradients, plain: nn.Module, feedback, x: Tensor, dtype: str) -> None:
    """The oracle's in float64 to the format's rounding, which is a small part of the way to backprop's."""
    exact, want = by_backprop(plain, x), by_saved_tensors(plain, feedback, x)
    bound = bounds.of_autocast(3, dtype)
    assert_same_gradients(home(got), want, bound, f"in {dtype}")
    upstream = ["input", *(name for name in want.parameters if not name.startswith(layer_names(plain)[-1]))]
    apart = distances(home(got), exact)
    assert all(apart[name] > 2 * bound for name in upstream), apart


@HALVES
@pytest.mark.parametrize("network", HALF_NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["uSF", "frSF", "brSF", "random"])
def test_autocast_follows_v(mode, layout, network, dtype):
    build, x = HALF_NETWORKS[network]
    if layout == torch.channels_last and x.dim() != 4:
        pytest.skip("has no channels")
    plain = build()
    model, patch = moved(plain.float().to(memory_format=layout), mode)
    plain.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        batch = x.float().to(DEVICE)
        if layout == torch.channels_last:
            batch = batch.to(memory_format=layout)
        got = gradients(model, batch, under_autocast(dtype))
        assert got.parameters["0.weight"].dtype == torch.float32
        assert_half_follows(got, plain, feedback, x, dtype)
        optimizer.step()


def loss_gradients(plain: nn.Module, x: Tensor, loss_of: Step, feedback: Mapping[str, Tensor]) -> Gradients:
    """The saved-tensor oracle's gradients of a loss; without feedback backprop's."""
    model = copy.deepcopy(plain)
    with swapped_saved_tensors(model, feedback):
        output = model(x.clone().requires_grad_())
        loss_of(output).backward()
    return read_gradients(model, output.detach(), output)


def draws_of(patch: Patch) -> set[int]:
    return {layer["draws"] for layer in patch.state_dict()["layers"].values()}


@HALVES
@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_training_in_half_precision_learns_and_follows_v(mode, dtype):
    """With a gradient scaler for float16, which leaves out the steps that overflow: V then stays too."""
    plain, x = mlp(), draw(32, 4)
    target = 2 + draw(32, 3, seed=1)
    model, patch = moved(plain.float(), mode)
    plain.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**30, enabled=dtype == "float16")
    losses, left_out = [], 0

    def loss_of(output: Tensor) -> Tensor:
        return F.mse_loss(output, target.to(output))

    for _ in range(60):
        plain.load_state_dict(model.state_dict())
        feedback, before = feedback_of(patch), draws_of(patch)
        optimizer.zero_grad()
        output = under_autocast(dtype)(model, x.float().to(DEVICE))
        loss = loss_of(output)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        got = home(read_gradients(model, output.detach(), output))
        finite = all(grad.isfinite().all() for grad in got.parameters.values())
        if finite:
            want, exact = (loss_gradients(plain, x, loss_of, v) for v in (feedback, {}))
            # The error signal at the output is a difference, whose rounding is that of the output.
            cancels = (want.output.norm() / (want.output - target).norm()).item()
            assert_same_gradients(got, want, (1 + cancels) * bounds.of_autocast(3, dtype))
            assert_unlike(got, exact, ["0.weight", "2.weight"])
            losses.append(loss.item())
        left_out += not finite
        scaler.step(optimizer)
        scaler.update()
        assert (draws_of(patch) != before) == (finite and mode == "brSF")
    assert losses[-1] < losses[0] / 2
    assert (left_out > 0) == (dtype == "float16")


# --- compiled --------------------------------------------------------------------------------------------


COMPILED = {
    "mlp": (mlp, draw(3, 4), MLP_UPSTREAM),
    "cnn": (cnn, draw(2, 2, 9, 9), ["input", "0.weight", "2.weight"]),
}
MODES_OF_COMPILING = pytest.mark.parametrize("how", ["default", "reduce-overhead"])


def compiled_step(model: nn.Module, how: str) -> Step:
    """`fullgraph=True`: falling back to eager code would be an error."""
    compiled = torch.compile(model, mode=how, fullgraph=True)

    def step(_: nn.Module, x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return step


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize(
    ("mode", "network"),
    [
        *((mode, "mlp") for mode in RULES if mode not in ("symmetric", "tensor")),
        ("sign", "cnn"),
        ("brSF", "cnn"),
    ],
)
def test_compiled_steps_follow_v(mode, network, how):
    """Steps enough for CUDA graphs to be warmed up, recorded and replayed; brSF redraws after each. An eager
    twin makes the V of the oracle, apart from the compiled code."""
    build, x, unlike = COMPILED[network]
    plain = build()
    (model, _), (twin, patch) = (moved(plain, mode, **RULES[mode]) for _ in range(2))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (model, twin)]
    step = compiled_step(model, how)
    # The compiler's inverse error function is another than the eager one, by float32's rounding.
    tolerance = bounds.HALF_OF_FLOAT32 if mode == "random" else bounds.HALF_OF_FLOAT64
    torch._dynamo.utils.counters.clear()
    for _ in range(6):
        plain.load_state_dict(model.state_dict())
        twin.load_state_dict(model.state_dict())
        got = gradients(model, x.to(DEVICE), step)
        assert_follows(got, plain, feedback_of(patch), x, tolerance, unlike=unlike)
        eager = gradients(twin, x.to(DEVICE))
        assert_same_gradients(home(got), home(eager), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@ON_GPU
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", ["uSF", "frSF", "brSF"])
def test_a_patch_keeps_no_graph_from_being_a_cuda_graph(mode):
    model, _ = moved(mlp(), mode)
    step = compiled_step(model, "reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        gradients(model, draw(3, 4).to(DEVICE), step)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize("mode", ["frSF", "brSF"])
def test_set_redraw_and_removal_reach_compiled_code(mode, how):
    plain, x = mlp(), draw(3, 4)
    (model, compiled_patch), (_, patch) = (moved(plain, mode) for _ in range(2))
    step = compiled_step(model, how)
    seen = []
    for concordance in (1.0, 0.75, 0.5):
        for one in (compiled_patch, patch):
            one.set(concordance=concordance)
        for _ in range(3):
            got = gradients(model, x.to(DEVICE), step)
            assert_follows(got, plain, feedback_of(patch), x, unlike=MLP_UPSTREAM)
            seen.append(got.parameters["0.weight"])
            for one in (compiled_patch, patch):
                one.redraw()
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    compiled_patch.remove()
    exact = home(gradients(model, x.to(DEVICE), step))
    assert_same_gradients(exact, by_backprop(plain, x), bounds.HALF_OF_FLOAT64)


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize("mode", ["frSF", "brSF"])
def test_compiled_under_autocast(mode, how):
    """As such machines are used: convolutions in channels_last and bfloat16, compiled."""
    plain, x = cnn(), draw(8, 2, 9, 9)
    model, patch = moved(plain.float().to(memory_format=torch.channels_last), mode)
    plain.double()
    step = compiled_step(model, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = x.float().to(DEVICE, memory_format=torch.channels_last)

    def mixed(_: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return step(model, batch).float()

    for _ in range(4):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        assert_half_follows(gradients(model, batch, mixed), plain, feedback, x, "bfloat16")
        optimizer.step()


# --- one process among (as it were) many ------------------------------------------------------------------


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A group of this process alone: NCCL's on a GPU, gloo's on a CPU."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patched before", "inner patched after", "outer patched after"])
@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_distributed_data_parallel(mode, order, tmp_path):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    inner = copy.deepcopy(plain).to(DEVICE)
    with process_group(tmp_path):
        if order == "patched before":
            patch = feedbackhook.patch(inner, mode)
        model = DistributedDataParallel(inner, device_ids=[0] if DEVICE == "cuda" else None)
        if order != "patched before":
            patch = feedbackhook.patch(model if order == "outer patched after" else inner, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            plain.load_state_dict(inner.state_dict())
            feedback = {name.removeprefix("module."): v for name, v in feedback_of(patch).items()}
            got = gradients(inner, x.to(DEVICE), lambda _, x: model(x))
            assert_follows(got, plain, feedback, x, unlike=["input", "stem.weight"])
            optimizer.step()


def test_fully_sharded_data_parallel(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    model, patch = moved(plain, "brSF")
    with process_group(tmp_path):
        mesh = init_device_mesh(DEVICE, (1,))
        fully_shard(model.blocks, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            whole = {name: tensor.full_tensor().cpu() for name, tensor in model.state_dict().items()}
            plain.load_state_dict(whole)
            feedback = feedback_of(patch)
            got = gradients(model, x.to(DEVICE))
            full = {name: grad.full_tensor() for name, grad in got.parameters.items()}
            got = Gradients(got.output, got.input, full)
            assert_follows(got, plain, feedback, x, unlike=["input", "stem.weight"])
            optimizer.step()


# --- measuring -------------------------------------------------------------------------------------------


def is_close(metric: str, value: float):
    if "angle" in metric:
        return pytest.approx(value, abs=bounds.ANGLE, nan_ok=True)
    return pytest.approx(value, rel=bounds.HALF_OF_FLOAT64, nan_ok=True)


@pytest.mark.parametrize("mode", ["symmetric", "tensor", "sign", "brSF"])
def test_what_is_measured_is_what_the_cpu_measures(mode):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    found = {}
    for device in ("cpu", DEVICE):
        options = {"feedback": random_feedback(plain)} if mode == "tensor" else {}
        model = copy.deepcopy(plain).to(device)
        patch = feedbackhook.patch(model, mode, **options)
        loss = probe(model(x.to(device).requires_grad_()))
        found[device] = feedbackhook.measure(patch, loss, per_sample=True)
        loss.backward()
        got = home(read_gradients(model, x, loss.reshape(1)))
        want = (
            by_backprop(plain, x) if mode == "symmetric" else by_saved_tensors(plain, feedback_of(patch), x)
        )
        for name, grad in want.parameters.items():  # measuring leaves graph and gradients as they were
            assert (got.parameters[name] - grad).norm() <= bounds.HALF_OF_FLOAT64 * grad.norm()
    assert len(found["cpu"]) == len(found[DEVICE]) > 0
    for ours, theirs in zip(found[DEVICE], found["cpu"], strict=True):
        assert ours[:3] == theirs[:3]
        assert ours.value == is_close(ours.metric, theirs.value), ours


@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_what_is_watched_is_what_the_cpu_watches(mode, tmp_path):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    tables, weights = [], []
    for name, device in (("cpu", "cpu"), ("device", DEVICE), ("unwatched", DEVICE)):
        model = copy.deepcopy(plain).to(device)
        patch = feedbackhook.patch(model, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        with Recorder(tmp_path / name) as recorder:
            if name != "unwatched":
                patch.watch(2, recorder, per_sample=True)
            for _ in range(5):
                optimizer.zero_grad()
                probe(model(x.to(device))).backward()
                optimizer.step()
        weights.append({key: value.cpu() for key, value in model.state_dict().items()})
        if name != "unwatched":
            keys = ["step", "layer", "depth", "metric"]
            tables.append(read(tmp_path / name).set_index(keys)["value"].sort_index())
    on_cpu, on_device = tables
    assert len(on_cpu) > 0
    assert on_device.index.equals(on_cpu.index)
    for key, ours, theirs in zip(on_cpu.index, on_device, on_cpu, strict=True):
        assert ours == is_close(key[-1], theirs), key
    for watched, unwatched in zip(weights[1].values(), weights[2].values(), strict=True):
        assert (watched - unwatched).norm() <= bounds.HALF_OF_FLOAT64 * unwatched.norm()


def test_error_signals_are_shown_as_they_arrive():
    model, patch = moved(mlp())
    seen = []
    patch.on_error_signal("2", lambda *signals: seen.append(signals))
    gradients(model, draw(3, 4).to(DEVICE))
    ((error_in, error_out),) = seen
    want = error_out @ patch.feedback("2")
    assert (error_in - want).norm() <= bounds.HALF_OF_FLOAT64 * want.norm()


# --- the training command --------------------------------------------------------------------------------


def test_training_runs_on_the_device_and_goes_on_after_an_interruption(tmp_path):
    """The README promises the same bits on a CPU alone; on a GPU kernels may add in another order each time,
    so that a resumed run is the same to half of float32's digits, and its errors to one image."""
    from feedbackhook.experiments.train import Progress, train

    from feedbackhook.experiments.config import (
        DataConfig,
        FeedbackConfig,
        ModelConfig,
        OptimizerConfig,
        ProtocolConfig,
        RecordConfig,
        RunConfig,
    )

    def config(name: str) -> RunConfig:
        return RunConfig(
            data=DataConfig("digits", train_images=200, test_images=100),
            model=ModelConfig("liao2016/mnist"),
            feedback=FeedbackConfig("brSF", {"concordance": 0.8}),
            optimizer=OptimizerConfig("sgd", lr=1e-3),
            protocol=ProtocolConfig(epochs=3, batch_size=50, threads=1, device=DEVICE),
            record=RecordConfig(every=2, figures=False),
            output=str(tmp_path / name),
        )

    def stop(now: Progress) -> None:
        if now.epoch == 1 and now.batch == 2:
            raise KeyboardInterrupt

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        result = train(config("whole"))
        assert (result.status, result.epoch) == ("finished", 3)
        with pytest.raises(KeyboardInterrupt):
            train(config("resumed"), progress=stop)
        assert train(config("resumed"), resume=True).status == "finished"
    keys = ["step", "epoch", "layer", "depth", "metric"]
    whole, resumed = (
        read(tmp_path / name).set_index(keys)["value"].sort_index() for name in ("whole", "resumed")
    )
    assert resumed.index.equals(whole.index)
    if DEVICE == "cpu":
        assert resumed.equals(whole)
    # shown by pytest -rP
    print("bit-equal" if resumed.equals(whole) else f"largest difference: {(resumed - whole).abs().max()}")
    for key, ours, theirs in zip(whole.index, resumed, whole, strict=True):
        if key[-1].endswith("_error"):
            assert ours == pytest.approx(theirs, abs=0.011), key
        elif "angle" in key[-1]:
            assert ours == pytest.approx(theirs, abs=math.degrees(bounds.HALF_OF_FLOAT32), nan_ok=True), key
        else:
            assert ours == pytest.approx(theirs, rel=bounds.HALF_OF_FLOAT32, nan_ok=True), key
