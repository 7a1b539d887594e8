"""Every way into a patched model gives the oracle's gradients or an error that names a layer, never silence.

The oracle always runs the plain model in the plainest way (`model(x)`); what is compared with it runs the
patched model through the entry point in question. `assert_matches_oracle` also asserts that the gradients are
not backprop's, since two exact runs would agree as well.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bounds
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    Gradients,
    assert_bit_equal,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    call,
    gradients,
    probe,
    read_gradients,
)
from problems import (
    MLP_UPSTREAM,
    FunctionalNet,
    InPlaceNet,
    LightningLike,
    Net,
    draw,
    mlp,
    outside_every_bracket,
    patched_copy,
    random_feedback,
    redrawn,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook

timm = pytest.importorskip("timm")

CNN_INPUT = (2, 2, 9, 9)
CNN_UPSTREAM = ["input", "stem.weight", "blocks.0.conv1.weight", "blocks.1.conv2.weight"]


def assert_matches_oracle_or_names_a_layer(
    run: Callable[[], Gradients], plain, feedback, x, **options
) -> None:
    """`run()` gives the oracle's gradients or raises a RuntimeError with the name of a patched layer."""
    try:
        got = run()
    except RuntimeError as error:
        if not any(repr(name) in str(error) for name in feedback):
            raise
        return
    assert_matches_oracle(got, plain, feedback, x)


# --- one network, many ways in ---------------------------------------------------------------------------


def piece_by_piece(model: Net, x: Tensor) -> Tensor:
    x = torch.tanh(model.stem(x))
    for block in model.blocks:
        x = block(x)
    return model.classifier(torch.tanh(x).mean((-2, -1)))


def layer_by_layer(model: Net, x: Tensor) -> Tensor:
    x = torch.tanh(model.stem(x))
    for block in model.blocks:
        x = x + block.conv2(torch.tanh(block.conv1(x)))
    return model.classifier(torch.tanh(x).mean((-2, -1)))


def checkpointed_blocks(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def step(model: Net, x: Tensor) -> Tensor:
        x = torch.tanh(model.stem(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(x)

    return step


def checkpointed_sequence(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def step(model: Net, x: Tensor) -> Tensor:
        x = torch.tanh(model.stem(x))
        x = torch.utils.checkpoint.checkpoint_sequential(model.blocks, 2, x, use_reentrant=reentrant)
        return model.forward_head(x)

    return step


def half_under_autograd_off(model: Net, x: Tensor) -> Tensor:
    """A forward without gradients in between, as for a moving target or an evaluation."""
    with torch.no_grad():
        model(x)
    output = model(x)
    with torch.inference_mode():
        model(x)
    return output


def forward_in_a_thread(model: Net, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(model, x).result()


WAYS_IN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "root called": call,
    "root's forward called as a method": lambda model, x: model.forward(x),
    "features, then head": lambda model, x: model.forward_head(model.forward_features(x)),
    "part by part": piece_by_piece,
    "layer by layer": layer_by_layer,
    "inside another module": lambda model, x: nn.Sequential(nn.Identity(), model)(x),
    "shared by two modules": lambda model, x: nn.ModuleList([nn.Sequential(model), model])[0](x),
    "blocks checkpointed, non-reentrant": checkpointed_blocks(reentrant=False),
    "blocks checkpointed, reentrant": checkpointed_blocks(reentrant=True),
    "checkpointed sequence, non-reentrant": checkpointed_sequence(reentrant=False),
    "checkpointed sequence, reentrant": checkpointed_sequence(reentrant=True),
    "whole checkpointed, non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "whole checkpointed, reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "checkpoint in a checkpoint": lambda model, x: checkpoint(
        checkpointed_blocks(reentrant=False), model, x, use_reentrant=False
    ),
    "a forward without grad before and after": half_under_autograd_off,
    "forward in another thread": forward_in_a_thread,
}


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
    """Neither the root nor the layer is called: only what lies between them can open the bracket."""

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


# --- copies ----------------------------------------------------------------------------------------------


def test_a_deep_copy_is_patched_on_its_own():
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    duplicate = copy.deepcopy(model)
    assert_matches_oracle(gradients(duplicate, x), plain, feedback, x, unlike=CNN_UPSTREAM)
    assert all(parameter.grad is None for parameter in model.parameters())
    own = feedbackhook.get_patch(duplicate)
    assert own is not None
    assert own is not feedbackhook.get_patch(model)
    assert list(duplicate.state_dict()) == list(plain.state_dict())


def test_a_deep_copy_after_training_has_begun_and_both_are_used():
    plain, x, y = redrawn(Net()), draw(*CNN_INPUT), draw(*CNN_INPUT, seed=1)
    model, feedback = patched_copy(plain)
    gradients(model, x)
    duplicate = copy.deepcopy(model)
    leaf_x, leaf_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    model.zero_grad()
    duplicate.zero_grad()
    of_model, of_duplicate = model(leaf_x), duplicate(leaf_y)
    probe(of_model).backward()
    probe(of_duplicate).backward()
    assert_matches_oracle(read_gradients(model, leaf_x, of_model), plain, feedback, x, unlike=CNN_UPSTREAM)
    assert_matches_oracle(
        read_gradients(duplicate, leaf_y, of_duplicate), plain, feedback, y, unlike=CNN_UPSTREAM
    )


@pytest.mark.parametrize("removed", ["original", "copy"])
def test_removal_of_one_does_not_disturb_the_other(removed):
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    duplicate = copy.deepcopy(model)
    gone, kept = (model, duplicate) if removed == "original" else (duplicate, model)
    feedbackhook.unpatch(gone)
    assert_matches_oracle(gradients(kept, x), plain, feedback, x, unlike=CNN_UPSTREAM)
    assert_bit_equal(gradients(gone, x), by_backprop(plain, x))


def test_disabling_the_copy_leaves_the_original_enabled():
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    duplicate = copy.deepcopy(model)
    feedbackhook.get_patch(duplicate).enabled = False
    assert_bit_equal(gradients(duplicate, x), by_backprop(plain, x))
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=CNN_UPSTREAM)


def test_the_original_may_be_gone_when_its_copy_is_used():
    plain, x = redrawn(Net()), draw(*CNN_INPUT)
    model, feedback = patched_copy(plain)
    duplicate = copy.deepcopy(model)
    del model
    assert_matches_oracle(gradients(duplicate, x), plain, feedback, x, unlike=CNN_UPSTREAM)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_of_a_part_is_not_patched_and_says_so(duplicate):
    plain, x = redrawn(Net()), draw(2, 3, 5, 5)
    model, feedback = patched_copy(plain)
    part = duplicate(model.blocks)
    with pytest.warns(UserWarning, match=r"copies a part \('blocks'\) of a patched model"):
        assert_bit_equal(gradients(part, x), by_backprop(plain.blocks, x))
    assert not any(name.startswith("_feedbackhook") for module in part.modules() for name in vars(module))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in part.modules())
    got = gradients(part, x)
    assert_bit_equal(got, by_backprop(plain.blocks, x))
    own = {name[len("blocks.") :]: v for name, v in feedback.items() if name.startswith("blocks.")}
    feedbackhook.patch(part, "tensor", feedback=own)
    assert_matches_oracle(gradients(part, x), plain.blocks, own, x, unlike=["input", "0.conv1.weight"])
    assert_matches_oracle(gradients(model.blocks, x), plain.blocks, own, x)


# --- backwards -------------------------------------------------------------------------------------------


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
    """Such a forward opens no bracket, so the guard must speak."""
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
        error_in, error_out = seen[layer]
        torch.testing.assert_close(error_in, error_out @ feedback[name], rtol=1e-12, atol=1e-12)


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


# --- the guard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmed_up", [False, True], ids=["never called", "after a proper step"])
def test_a_weight_used_outside_every_bracket_raises_by_name(warmed_up):
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "sign")
    if warmed_up:
        gradients(model, x)
    loss = probe(outside_every_bracket(model, x))
    with pytest.raises(RuntimeError, match=r"'[02]'"):
        loss.backward()


def test_the_guards_error_is_one_of_ours_and_the_next_step_is_right():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    with pytest.raises(RuntimeError) as caught:
        probe(outside_every_bracket(model, x)).backward()
    assert type(caught.value).__module__.startswith("feedbackhook")
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=MLP_UPSTREAM)


@pytest.mark.parametrize("ending", ["removed", "disabled", "exact"])
def test_the_guard_rests_when_the_patch_does(ending):
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    patch = feedbackhook.get_patch(model)
    if ending == "exact":
        with patch.exact():
            got = gradients(model, x, outside_every_bracket)
    else:
        patch.remove() if ending == "removed" else setattr(patch, "enabled", False)
        got = gradients(model, x, outside_every_bracket)
    assert_bit_equal(got, by_backprop(plain, x, outside_every_bracket))


USES_THAT_NO_BRACKET_UNDERSTANDS = {
    "matrix product": lambda x, fc: x @ fc.weight.T,
    "einsum": lambda x, fc: torch.einsum("ni,oi->no", x, fc.weight),
    "product from the left": lambda x, fc: (fc.weight @ x.T).T,
    "addmm from the left": lambda x, fc: torch.addmm(fc.bias, fc.weight, x.T[:4, :1].expand(4, 4)),
    "elementwise product": lambda x, fc: (x.unsqueeze(1) * fc.weight).sum(-1),
    "bilinear form": lambda x, fc: F.bilinear(x, x, fc.weight.unsqueeze(0).expand(3, -1, -1)[:, :, :4]),
}


@pytest.mark.parametrize(
    "use", USES_THAT_NO_BRACKET_UNDERSTANDS.values(), ids=USES_THAT_NO_BRACKET_UNDERSTANDS
)
def test_a_weight_in_another_function_raises_by_name(use):
    """Inside the forward too: the call cannot be rerouted, so its error signal would be exact."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return use(torch.tanh(self.fc1(x)), self.fc2)

    model = redrawn(Odd())
    feedbackhook.patch(model, "sign")
    with pytest.raises(feedbackhook.ExactGradientError, match="'fc2'"):
        probe(model(draw(3, 4))).backward()


def test_fused_attention_is_the_oracle_or_raises_by_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = torch.tanh(self.fc(x))
            return self.attention(x, x, x, need_weights=False)[0]

    plain, x = redrawn(Attention()), draw(2, 3, 4)
    model = redrawn(Attention())
    feedback = random_feedback(plain, ["fc", "attention.out_proj"])
    feedbackhook.patch(model, "tensor", include=list(feedback), feedback=feedback)
    assert_matches_oracle_or_names_a_layer(lambda: gradients(model, x), plain, feedback, x)


def test_parameters_replaced_after_patching():
    """`load_state_dict(assign=True)` and plain assignment bring new parameters: they are looked up again."""
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    gradients(model, x)
    others = redrawn(copy.deepcopy(plain), seed=3)
    model.load_state_dict(copy.deepcopy(others.state_dict()), assign=True)
    assert_matches_oracle(gradients(model, x), others, feedback, x, unlike=MLP_UPSTREAM)
    model[2].weight = nn.Parameter(plain[2].weight.detach().clone())
    others[2].weight = plain[2].weight
    assert_matches_oracle(gradients(model, x), others, feedback, x, unlike=MLP_UPSTREAM)


def test_a_penalty_on_the_weights_adds_its_own_gradient():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (probe(output) + sum(p.square().sum() for p in model.parameters())).backward()
    for parameter in model.parameters():
        parameter.grad -= 2 * parameter.detach()
    assert_matches_oracle(read_gradients(model, leaf, output), plain, feedback, x, unlike=MLP_UPSTREAM)


def bracketed_and_not(model: nn.Sequential, x: Tensor) -> Tensor:
    return model(x)[:, :3] + outside_every_bracket(model, x)[:, :3]


@pytest.mark.parametrize("step", [bracketed_and_not], ids=lambda step: step.__name__)
def test_a_use_outside_beside_one_that_was_seen(step):
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "sign")
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"'[02]'"):
            gradients(model, x, step)


def into_a_frozen_weight(model: nn.Sequential, x: Tensor) -> Tensor:
    model[2].weight.requires_grad_(False)
    return F.linear(torch.tanh(model[0](x)), model[2].weight)


def test_a_frozen_weight_outside_every_module_is_found_on_request_alone():
    """No hook of ours runs before its product does; the README says so, and what to do."""
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    output = into_a_frozen_weight(model, x)
    (finding,) = patch.audit(output)
    assert (finding.name, finding.patched) == ("2", True)
    probe(output).backward()


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
