"""Every way into a patched model gives the oracle's gradients or an error that names a layer, never silence.

The oracle always runs the plain model in the plainest way (`model(x)`); what is compared with it runs the
patched model through the entry point in question. `assert_matches_oracle` also asserts that the gradients are
not backprop's, since two exact runs would agree as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import bounds
from support.oracle import (
    assert_bit_equal,
    assert_matches_oracle,
    assert_matches_oracle_or_names_a_layer,
    by_backprop,
    by_saved_tensors,
    call,
    gradients,
    probe,
)
from support.problems import (
    CNN_INPUT,
    CNN_UPSTREAM,
    FunctionalNet,
    InPlaceNet,
    LightningLike,
    Net,
    draw,
    mlp,
    patched_copy,
    random_feedback,
    redrawn,
)
from support.ways_in import WAYS_IN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook

timm = pytest.importorskip("timm")


# --- one network, many ways in ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", WAYS_IN.values(), ids=WAYS_IN)
def test_every_way_in_is_the_oracle(step):
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    assert_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike=CNN_UPSTREAM)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("step", WAYS_IN.values(), ids=WAYS_IN)
def test_every_way_in_after_removal_is_backprop(step):
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, _ = patched_copy(plain)
    gradients(model, x, step)
    feedbackhook.unpatch(model)
    assert_bit_equal(gradients(model, x, step), by_backprop(plain, x, step))


def test_the_forward_of_a_single_layer_called_as_a_method():
    """No hook sees `layer.forward(x)`: outside every other forward the guard must."""

    def forwards(model: nn.Sequential, x: Tensor) -> Tensor:
        for layer in model:
            x = layer.forward(x)
        return x

    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    assert_matches_oracle_or_names_a_layer(lambda: gradients(model, x, forwards), plain, feedback, x)


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("stem", (2, 2, 5, 5)),
        ("blocks", (2, 3, 5, 5)),
        ("blocks.1", (2, 3, 5, 5)),
        ("blocks.0.conv2", (2, 6, 5, 5)),
        ("classifier", (4, 3)),
    ],
)
def test_a_patched_part_called_alone(part, shape):
    plain = redrawn(Net())
    model, feedback = patched_copy(plain)
    alone, patched_alone = plain.get_submodule(part), model.get_submodule(part)
    own = {
        name[len(part) :].lstrip("."): v for name, v in feedback.items() if f"{name}.".startswith(f"{part}.")
    }
    x = {"stem": draw(2, 2, 5, 5), "classifier": draw(4, 3), "blocks.0.conv2": draw(2, 6, 5, 5)}.get(
        part, draw(2, 3, 5, 5)
    )
    assert_matches_oracle(gradients(patched_alone, x), alone, own, x, unlike=["input"])


def test_a_method_that_calls_the_parts_of_a_module_never_called():
    plain, x = redrawn(LightningLike()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)

    def training_step(module: LightningLike, batch: Tensor) -> Tensor:
        return module.training_step(batch)

    got = gradients(model, x, training_step)
    unlike = ["net.stem.weight", "net.classifier.weight"]
    assert_matches_oracle(got, plain, feedback, x, training_step, unlike=unlike)


def test_a_weight_used_without_its_module_inside_the_forward():
    plain, x = redrawn(FunctionalNet()), draw(3, 4)
    model, feedback = patched_copy(plain)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "fc1.weight"])


PARTS_CALLED_BY_THEMSELVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "called": lambda model, x: model.part(x),
    "checkpointed, non-reentrant": lambda model, x: checkpoint(model.part, x, use_reentrant=False),
    "checkpointed, reentrant": lambda model, x: checkpoint(model.part, x, use_reentrant=True),
}


@pytest.mark.parametrize("step", PARTS_CALLED_BY_THEMSELVES.values(), ids=PARTS_CALLED_BY_THEMSELVES)
def test_a_part_that_uses_a_weight_without_its_module_and_is_called_by_itself(step):
    """Neither the root nor the layer is called: only what lies between them can open the mode."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = FunctionalNet()

    plain, model, x = redrawn(Root()), redrawn(Root()), draw(3, 4)
    feedback = random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    got = gradients(model, x, step)
    unlike = ["input", "part.fc1.weight"]
    assert_matches_oracle(got, plain, feedback, x, lambda root, x: root.part(x), unlike=unlike)


def test_activations_in_place():
    plain, x = redrawn(InPlaceNet()), draw(3, 2, 6, 6)
    model, feedback = patched_copy(plain)
    unlike = ["input", "stem.0.weight", "conv.weight", "fc.weight"]
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=unlike)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ELU, nn.SiLU, nn.Hardtanh], ids=lambda act: act.__name__)
@pytest.mark.parametrize("first", [False, True], ids=["hidden layer", "layer without upstream"])
def test_in_place_activation_right_behind_a_layer(act, first):
    plain = redrawn(nn.Sequential(nn.Linear(4, 6), act(inplace=True), nn.Linear(6, 6), act(inplace=True)))
    x, options = draw(3, 4), {"input_requires_grad": not first}
    model, feedback = patched_copy(plain)
    got = gradients(model, x, **options)
    assert_matches_oracle(got, plain, feedback, x, unlike=["0.weight"], **options)


# --- timm ------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    """BN in train mode: its statistics belong to the batch, so two runs are comparable."""
    model = timm.create_model("resnet10t", pretrained=False, num_classes=5, zero_init_last=False)
    return redrawn(model).train()


def vit() -> nn.Module:
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2, num_classes=5
    )
    return redrawn(model).train()


TIMM = {
    "resnet10t": (resnet, (2, 3, 32, 32), ["input", "conv1.0.weight", "layer4.0.conv1.weight"]),
    "vit": (
        vit,
        (2, 3, 16, 16),
        ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias"],
    ),
}
TIMM_WAYS_IN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "root called": call,
    "forward_features, forward_head": lambda model, x: model.forward_head(model.forward_features(x)),
}


def with_grad_checkpointing(model: nn.Module, x: Tensor) -> Tensor:
    model.set_grad_checkpointing(True)
    try:
        return model(x)
    finally:
        model.set_grad_checkpointing(False)


TIMM_WAYS_IN["set_grad_checkpointing"] = with_grad_checkpointing


@pytest.mark.parametrize("step", TIMM_WAYS_IN.values(), ids=TIMM_WAYS_IN)
@pytest.mark.parametrize(("build", "shape", "unlike"), TIMM.values(), ids=TIMM)
def test_timm(build, shape, unlike, step):
    plain, x = build(), draw(*shape)
    model, feedback = patched_copy(plain)
    assert_matches_oracle(gradients(model, x, step), plain, feedback, x, unlike=unlike)


class Gate(nn.Module):
    """Lets a forward wait in the middle for another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.open = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.open.wait(bounds.HANG)
        return x


def test_forwards_in_two_threads_at_once():
    plain, model, gate = mlp(), mlp(), Gate()
    model.insert(1, gate)
    feedback = random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=dict(zip(("0", "3", "5"), feedback.values(), strict=True)))
    leaves = [draw(3, 4, seed=seed).requires_grad_() for seed in (0, 1)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(model, leaves[0])
        assert gate.reached.wait(bounds.HANG)
        try:
            second = model(leaves[1])
        finally:
            gate.open.set()
        first = waiting.result()
    for leaf, output in zip(leaves, (first, second), strict=True):
        (got,) = torch.autograd.grad(probe(output), leaf)
        want = by_saved_tensors(plain, feedback, leaf.detach()).input
        assert (got - want).norm() <= 1e-9 * want.norm()
