"""Compiled models: the oracle's gradients, redraws and changed options included.

A test that compares compiled with eager passes when both are exact: these compare with the oracle.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.coverage.models import prepared
from support.oracle import (
    Gradients,
    assert_matches_oracle,
    assert_same_gradients,
    by_backprop,
    call,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    MLP_UPSTREAM,
    draw,
    layer_names,
    mlp,
    outside_every_forward,
    patched_copy,
    random_feedback,
    redrawn,
)
from support.rules import INEXACT, PATCH_ALL
from torch import Tensor, nn

import feedbackhook

timm = pytest.importorskip("timm")

BACKENDS = ["eager", "aot_eager", "inductor"]


def small_cnn() -> nn.Module:
    return redrawn(
        nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, padding="same"),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 2),
        )
    )


COMPILED = {
    "mlp": (mlp, (3, 4), ["0.weight", "2.bias"]),
    "cnn": (small_cnn, (2, 2, 5, 5), ["0.weight", "2.weight"]),
}
COMPILED_ON_EVERY_BACKEND = [
    pytest.param(
        *COMPILED[name],
        backend,
        id=f"{name}-{backend}",
        marks=[pytest.mark.slow] if (name, backend) == ("cnn", "inductor") else [],
    )
    for name in COMPILED
    for backend in BACKENDS
    if (name, backend) != ("cnn", "eager")
]


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_step(model: nn.Module, backend: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """`fullgraph=True`: falling back to eager code would be an error."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return lambda _, x: compiled(x)


def assert_compiled_matches_oracle(
    got: Gradients, plain, feedback, x, unlike, tolerance=bounds.HALF_OF_FLOAT64
) -> None:
    """Inductor's forward agrees to rounding alone, so the output too is held to a tolerance here."""
    assert_matches_oracle(got, plain, feedback, x, unlike=unlike, tolerance=tolerance, bit_equal=False)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("build", "shape", "unlike", "backend"), COMPILED_ON_EVERY_BACKEND)
class TestCompiled:
    def test_compiled_after_patching(self, build, shape, unlike, backend):
        plain, x = build(), draw(*shape)
        model, feedback = patched_copy(plain)
        step = compiled_step(model, backend)
        assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike)

    def test_compiled_and_run_before_patching(self, build, shape, unlike, backend):
        """The code compiled before the patch knows nothing of it."""
        plain, x = build(), draw(*shape)
        model, feedback = copy.deepcopy(plain), random_feedback(plain)
        step = compiled_step(model, backend)
        assert_same_gradients(gradients(model, x, step), by_backprop(plain, x))
        feedbackhook.patch(model, "tensor", feedback=feedback)
        assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike)

    def test_removed_after_compiling(self, build, shape, unlike, backend):
        plain, x = build(), draw(*shape)
        model, feedback = patched_copy(plain)
        step = compiled_step(model, backend)
        assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike)
        feedbackhook.unpatch(model)
        assert_same_gradients(gradients(model, x, step), by_backprop(plain, x))


def compiled_in_place(model: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    model.compile(backend="aot_eager")
    return call


def compiled_part_in_place(model: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    model[2].compile(backend="aot_eager")
    return call


def compiled_function(model: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return model(x) * 1.0

    return lambda _, x: run(x)


def compiled_forward(model: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    run = torch.compile(model.forward, backend="aot_eager")
    return lambda _, x: run(x)


FORMS_OF_COMPILING = {
    form.__name__: form
    for form in (compiled_in_place, compiled_part_in_place, compiled_function, compiled_forward)
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("form", FORMS_OF_COMPILING.values(), ids=FORMS_OF_COMPILING)
@pytest.mark.parametrize("when", ["compiled, then patched", "patched, then compiled"])
def test_forms_of_compiling(form, when):
    plain, x = mlp(), draw(3, 4)
    model, feedback = copy.deepcopy(plain), random_feedback(plain)
    if when == "compiled, then patched":
        step = form(model)
        gradients(model, x, step)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    if when == "patched, then compiled":
        step = form(model)
    for _ in range(2):
        assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, MLP_UPSTREAM)
    feedbackhook.unpatch(model)
    assert_same_gradients(gradients(model, x, step), by_backprop(plain, x))


class Broken(nn.Module):
    """Its forward leaves the compiler inside a part, and before a weight is used without its module."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            torch._dynamo.graph_break()
            return torch.tanh(x)

    def __init__(self) -> None:
        super().__init__()
        self.part, self.fc1, self.fc2 = Broken.Part(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(self.part(x), self.fc1.weight))
        torch._dynamo.graph_break()
        return F.linear(torch.tanh(x), self.fc2.weight)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("when", ["compiled, then patched", "patched, then compiled"])
def test_compiled_with_graph_breaks(when):
    plain, x = redrawn(Broken()), draw(3, 4)
    model, feedback = copy.deepcopy(plain), random_feedback(plain)
    compiled = torch.compile(model, backend="aot_eager")
    if when == "compiled, then patched":
        compiled(x)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    for _ in range(2):
        got = gradients(model, x, lambda _, x: compiled(x))
        assert torch._C._len_torch_function_stack() == 0
        assert_compiled_matches_oracle(got, plain, feedback, x, ["input", "part.fc.weight", "fc1.weight"])


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("when", ["compiled, then patched", "patched, then compiled"])
def test_a_compiled_function_that_calls_no_module_raises_by_name(when):
    model, x = mlp(), draw(3, 4)
    run = torch.compile(outside_every_forward, backend="aot_eager", fullgraph=True)
    if when == "compiled, then patched":
        gradients(model, x, run)
    feedbackhook.patch(model, "sign")
    with pytest.raises(RuntimeError, match=r"'[02]'"):
        gradients(model, x, run)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_can_be_disabled_and_enabled():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    patch, step = feedbackhook.get_patch(model), compiled_step(model, "aot_eager")
    for enabled in (True, False, True):
        patch.enabled = enabled
        if enabled:
            assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, MLP_UPSTREAM)
        else:
            assert_same_gradients(gradients(model, x, step), by_backprop(plain, x))


@pytest.mark.usefixtures("_fresh_compiler")
def test_exact_of_a_compiled_model_is_exact_or_raises():
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    output = torch.compile(model, backend="aot_eager")(leaf)
    try:
        with feedbackhook.get_patch(model).exact():
            probe(output).backward()
    except RuntimeError:
        return
    assert_same_gradients(read_gradients(model, leaf, output), by_backprop(plain, x))


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_guard_still_watches_after_a_compiled_step():
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "sign")
    gradients(model, x, compiled_step(model, "aot_eager"))
    loss = probe(outside_every_forward(model, x))
    with pytest.raises(RuntimeError, match=r"'[02]'"):
        loss.backward()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_rule_follows_todays_weights():
    """V is part of the graph, not a constant of it: after the weights have moved, V has moved too."""
    plain, x = mlp(), draw(3, 4)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "sign")
    step = compiled_step(model, "aot_eager")
    for seed in (0, 5):
        for net in (plain, model):
            redrawn(net, seed)
        feedback = {name: patch.feedback(name) for name in layer_names(plain)}
        assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, MLP_UPSTREAM)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("order", ["plain first", "patched first"])
def test_code_of_a_plain_model_is_not_used_for_a_patched_one_of_the_same_classes(order):
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    steps = {net: compiled_step(net, "aot_eager") for net in (plain, model)}
    for net in (plain, model) if order == "plain first" else (model, plain):
        got = gradients(net, x, steps[net])
        if net is plain:
            assert_same_gradients(got, by_backprop(plain, x))
        else:
            assert_compiled_matches_oracle(got, plain, feedback, x, MLP_UPSTREAM)


PATCHED_BEFORE_THE_COMPILER_IS_LOADED = """
import copy, sys, torch, feedbackhook
plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
model = copy.deepcopy(plain)
feedbackhook.patch(model, "sign")
eager = copy.deepcopy(model)
assert "torch._dynamo" not in sys.modules
x = torch.randn(3, 4)
compiled = [torch.compile(net, backend="aot_eager") for net in (plain, model)]
compiled[0](x).sum().backward()
try:
    compiled[1](x).sum().backward()
except feedbackhook.ExactGradientError as error:
    assert "run the step again" in str(error)
    model.zero_grad()
    compiled[1](x).sum().backward()
eager(x).sum().backward()
assert torch.allclose(model[0].weight.grad, eager[0].weight.grad, rtol=2**-12, atol=2**-12)
assert not torch.allclose(model[0].weight.grad, plain[0].weight.grad, atol=1e-3)
"""


def test_the_same_where_the_patch_came_before_the_compiler():
    """Nothing of ours runs in between, so the guard speaks once, and the step after it is right."""
    subprocess.run([sys.executable, "-c", PATCHED_BEFORE_THE_COMPILER_IS_LOADED], check=True)


def test_patching_does_not_load_the_compiler():
    """Resetting compile caches needs torch._dynamo, whose import takes seconds: only where it is in use."""
    code = "import sys, torch, feedbackhook; m = torch.nn.Linear(2, 2); feedbackhook.patch(m).remove(); "
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def eager_twin(model: nn.Module, mode: str, **options) -> nn.Module:
    """A copy under the same rule and seed, run eagerly: its V is made apart from the compiled code."""
    twin = copy.deepcopy(model)
    feedbackhook.patch(twin, mode, **options)
    return twin


def assert_step_matches_oracle(
    step,
    model: nn.Module,
    twin: nn.Module,
    plain: nn.Module,
    x: Tensor,
    tolerance: float = bounds.HALF_OF_FLOAT64,
) -> None:
    """One compiled step gives the oracle's gradients under the twin's V."""
    plain.load_state_dict(model.state_dict())
    twin.load_state_dict(model.state_dict())
    handle = feedbackhook.get_patch(twin)
    feedback = {name: handle.feedback(name) for name in layer_names(plain)}
    assert_compiled_matches_oracle(gradients(model, x, step), plain, feedback, x, MLP_UPSTREAM, tolerance)


RULES = {
    **INEXACT,
    "frSF": {"concordance": 0.5},
    "brSF": {"concordance": 0.5},
    "sign": {"concordance": 0.7},
    "random": {"redraw": "update"},
}


def everything_that_learns(model):
    return [*model.parameters(), *feedbackhook.get_patch(model).parameters()]


PAPER_RULES = ("sign", "uSF", "frSF", "brSF", "random", "RndF")
OTHER_KINDS = ("FA", "angle", "low_rank", "KP", "information")
"""A rule of each other kind: drawn like the layer, mixed, a product, learned in two ways."""
QUICK = {"aot_eager": (*PAPER_RULES, *OTHER_KINDS), "inductor": ("sign", "brSF", "random")}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("mode", "backend", "recompute"),
    [
        pytest.param(mode, backend, False, marks=() if mode in QUICK[backend] else pytest.mark.slow)
        for backend in QUICK
        for mode in RULES
    ]
    + [
        ("frSF", "inductor", True),
        pytest.param("RndF", "inductor", True, marks=pytest.mark.slow),
        pytest.param("low_rank", "inductor", True, marks=pytest.mark.slow),
    ],
)
def test_every_rule_over_optimizer_steps(mode, backend, recompute):
    """brSF redraws after each step, and the compiled code is made once for all of them."""
    plain, x = mlp(), draw(3, 4)
    model, twin = copy.deepcopy(plain), eager_twin(plain, mode, **RULES[mode], **PATCH_ALL)
    feedbackhook.patch(model, mode, recompute=recompute, **RULES[mode], **PATCH_ALL)
    optimizers = [torch.optim.SGD(everything_that_learns(net), lr=0.01) for net in (model, twin)]
    step = compiled_step(model, backend)
    # Inductor's inverse error function differs from the eager one by float32's rounding.
    drawn_twice = mode == "random" or (mode in ("RndF", "low_rank") and recompute)
    tolerance = bounds.HALF_OF_FLOAT32 if drawn_twice else bounds.HALF_OF_FLOAT64
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        assert_step_matches_oracle(step, model, twin, plain, x, tolerance)
        gradients(twin, x)
        for optimizer in optimizers:
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("mode", "option", "unit"),
    [
        *((mode, "concordance", 1.0) for mode in ("frSF", "brSF", "sign")),
        *(("angle", "degrees", 90.0), ("sparse", "share", 0.7), ("svd", "power", -1.0)),
    ],
)
def test_set_and_redraw_reach_compiled_code(mode, option, unit):
    """A schedule of more values than dynamo's limit on recompilation, which would raise."""
    plain, x = mlp(), draw(3, 4)
    model, twin = copy.deepcopy(plain), eager_twin(plain, mode)
    feedbackhook.patch(model, mode)
    step = compiled_step(model, "aot_eager")
    seen = []
    for i in range(13):
        for net in (model, twin):
            feedbackhook.get_patch(net).set(**{option: unit * (1 - 0.05 * i)})
        assert_step_matches_oracle(step, model, twin, plain, x)
        for net in (model, twin):
            feedbackhook.get_patch(net).redraw()
        assert_step_matches_oracle(step, model, twin, plain, x)
        seen.append(model[2].weight.grad.clone())
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_restored_state_reaches_compiled_code():
    plain, x = mlp(), draw(3, 4)
    model, twin = copy.deepcopy(plain), eager_twin(plain, "brSF", seed=3)
    feedbackhook.patch(model, "brSF")
    step = compiled_step(model, "aot_eager")
    gradients(model, x, step)
    feedbackhook.get_patch(model).load_state_dict(feedbackhook.get_patch(twin).state_dict())
    assert_step_matches_oracle(step, model, twin, plain, x)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_optimizer_redraws():
    model, x = mlp(), draw(3, 4)
    handle = feedbackhook.patch(model, "brSF")
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01))
    update = torch.compile(optimizer.step, backend="aot_eager")
    step = compiled_step(model, "aot_eager")
    before = handle.feedback("2")
    gradients(model, x, step)
    update()
    assert not torch.equal(handle.feedback("2").abs(), before.abs())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", ["frSF", "brSF"])
def test_under_autocast(mode):
    """Autocast in half precision agrees with the eager twin's to that precision, and is not backprop's."""
    plain, x = mlp().float(), draw(3, 4).float()
    model, twin = copy.deepcopy(plain), eager_twin(plain, mode, concordance=0.5)
    feedbackhook.patch(model, mode, concordance=0.5)
    step = compiled_step(model, "aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want, exact = gradients(model, x, step), gradients(twin, x), by_backprop(plain, x)
    assert (got.input - want.input).norm() <= 0.03 * want.input.norm()
    assert (got.input - exact.input).norm() >= 0.3 * exact.input.norm()


ARCHITECTURES = {
    "resnet": ("test_resnet", 64),
    "vit": ("test_vit", 160),
    "convnext": ("test_convnext", 64),
    "efficientnet": ("test_efficientnet", 64),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_timm_architectures(name, size, backend):
    plain = prepared(timm.create_model(name, pretrained=False, num_classes=10))
    model, x = copy.deepcopy(plain), draw(2, 3, size, size)
    handle = feedbackhook.patch(model, "brSF", concordance=0.7)
    feedback = {layer.name: handle.feedback(layer.name) for layer in handle.layers}
    got = gradients(model, x, compiled_step(model, backend))
    assert_compiled_matches_oracle(got, plain, feedback, x, ["input"])
