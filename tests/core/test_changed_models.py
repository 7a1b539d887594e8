"""A model that changes after patching is followed, told of, or refused by name; a part is copied alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import peft
import pytest
import torch
from support.oracle import (
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
)
from support.problems import draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook

RULES = ("random", "sign", "brSF")
WARM = pytest.mark.parametrize("warm", [False, True], ids=["before the first forward", "after two"])


def said_by_two_steps(model: nn.Module, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            gradients(model, x)
    return [str(warning.message) for warning in said]


def without_patch(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    feedbackhook.unpatch(plain)
    return plain


# --- tied and untied -------------------------------------------------------------------------------------


def three_layers(tied: bool) -> nn.Sequential:
    model = redrawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    if tied:
        model[2].weight = model[0].weight
    return model


def untied_by_load(model: nn.Sequential) -> None:
    state = {name: p * (2 if name == "2.weight" else 1) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def second_untied(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(-model[2].weight.detach())


def first_untied(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(-model[0].weight.detach())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("untie", [untied_by_load, second_untied, first_untied])
def test_a_tied_weight_that_came_apart_is_two_layers(untie, rule):
    model, x = three_layers(tied=True), draw(3, 4)
    patch = feedbackhook.patch(model, rule)
    gradients(model, x)
    untie(model)
    gradients(model, x)
    assert [row.name for row in patch.layers] == ["0", "2", "4"]
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    plain = without_patch(model)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "0.weight"])

    again = copy.deepcopy(plain)
    restored = feedbackhook.patch(again, rule)
    restored.load_state_dict(patch.state_dict())
    assert all(torch.equal(restored.feedback(name), v) for name, v in feedback.items())
    patch.remove()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_tied_weight_that_came_apart_keeps_its_random_parts():
    model = three_layers(tied=True)
    patch = feedbackhook.patch(model, "random")
    before = patch.feedback("2")
    second_untied(model)
    gradients(model, draw(3, 4))
    assert torch.equal(patch.feedback("0"), before)
    assert torch.equal(patch.feedback("2"), before)


def test_weights_that_come_apart_on_their_way_from_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        model[2].weight = model[0].weight
    patch = feedbackhook.patch(model, "frSF")
    redrawn(model.to_empty(device="cpu"))
    feedback = {name: patch.feedback(name) for name in ("0", "4")}
    gradients(model, draw(3, 4))
    feedback["2"] = patch.feedback("2")
    x = draw(3, 4)
    assert_matches_oracle(gradients(model, x), without_patch(model), feedback, x, unlike=["input"])


@pytest.mark.parametrize("warm", [False, True], ids=["before the first forward", "after one"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_that_are_tied_after_patching_share_one_v(rule, warm):
    model, x = three_layers(tied=False), draw(3, 4)
    patch = feedbackhook.patch(model, rule)
    if warm:
        gradients(model, x)
    model[2].weight = model[0].weight
    gradients(model, x)
    assert [row.name for row in patch.layers] == ["0", "4"]
    feedback = {name: patch.feedback(name) for name in ("0", "4")}
    assert torch.equal(patch.feedback("2"), feedback["0"])
    assert_matches_oracle(gradients(model, x), without_patch(model), feedback, x, unlike=["input"])
    patch.remove()
    assert not any(p._backward_hooks for p in model.parameters())


def test_weights_of_different_rules_cannot_be_tied_after_patching():
    model = three_layers(tied=False)
    feedbackhook.patch(model, {"0": "uSF", "2": "frSF", "4": "uSF"})
    model[2].weight = model[0].weight
    with pytest.raises(RuntimeError, match=r"'0' and '2' were tied after patching.*different rules"):
        model(draw(3, 4))


# --- resized ---------------------------------------------------------------------------------------------


def resized_by_new_parameters(model: nn.Sequential) -> None:
    model[0].weight, model[0].bias = (
        nn.Parameter(p.detach()[:2].clone()) for p in (model[0].weight, model[0].bias)
    )
    model[2].weight = nn.Parameter(model[2].weight.detach()[:, :2].clone())


def resized_by_data(model: nn.Sequential) -> None:
    model.zero_grad()
    model[0].weight.data, model[0].bias.data = (
        model[0].weight.data[:2].clone(),
        model[0].bias.data[:2].clone(),
    )
    model[2].weight.data = model[2].weight.data[:, :2].clone()


RESIZED = {"new parameters": resized_by_new_parameters, "data": resized_by_data}


@pytest.mark.parametrize("looked", [False, True], ids=["after a forward", "before one"])
@pytest.mark.parametrize("mode", ["random", "FA", "NuSF", "brSF"])
@pytest.mark.parametrize("resize", RESIZED.values(), ids=RESIZED)
def test_v_follows_a_weight_of_another_shape(resize, mode, looked):
    """As in structured pruning: V is that of a model that is patched in this shape."""
    model, x = (
        redrawn(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))),
        draw(3, 4),
    )
    patch = feedbackhook.patch(model, mode)
    gradients(model, x)
    resize(model)
    if looked:
        assert patch.feedback("2").shape == (4, 2)
    got = gradients(model, x)
    assert [row.shape for row in patch.layers] == [(2, 4), (4, 2), (3, 4)]
    assert [row.info.fan_in for row in patch.layers] == [4, 2, 4]
    plain = without_patch(model)
    anew = feedbackhook.patch(copy.deepcopy(plain), mode)
    feedback = {name: anew.feedback(name) for name in ("0", "2", "4")}
    assert torch.equal(patch.feedback("2"), feedback["2"])
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight", "2.weight"])


@pytest.mark.parametrize("resize", RESIZED.values(), ids=RESIZED)
def test_b_follows_a_weight_of_another_shape(resize):
    model, x = (
        redrawn(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))),
        draw(3, 4),
    )
    patch = feedbackhook.patch(model, "DFA")
    gradients(model, x)
    resize(model)
    got = gradients(model, x)
    plain = without_patch(model)
    anew = copy.deepcopy(plain)
    other = feedbackhook.patch(anew, "DFA")
    assert_same_gradients(got, gradients(anew, x))
    assert patch.projection("2").shape == (2, 3)
    assert torch.equal(patch.projection("2"), other.projection("2"))


def test_learned_feedback_of_another_shape_is_an_error():
    """What it has learned cannot be taken along."""
    model, x = redrawn(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))), draw(3, 4)
    feedbackhook.patch(model, "KP")
    gradients(model, x)
    resized_by_new_parameters(model)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) for '2', whose weight has shape \(4, 2\)"):
        gradients(model, x)


# --- layers that come later ------------------------------------------------------------------------------


class Grows(nn.Module):
    """A network to which layers are added while it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.more, self.c = nn.Linear(4, 4), nn.ModuleList(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        for layer in self.more:
            h = torch.tanh(layer(h))
        return self.c(h)


@WARM
def test_a_layer_that_was_added_is_told_of_once_and_exact(warm):
    model, x = redrawn(Grows()), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    feedback = {name: patch.feedback(name) for name in "ac"}
    assert not warm or said_by_two_steps(model, x) == []
    model.more.append(redrawn(nn.Linear(4, 4), seed=1))
    (said,) = said_by_two_steps(model, x)
    assert "added after patching" in said
    assert "'more.0'" in said
    assert str(patch).splitlines()[-1] == "exact: more.0"
    plain = without_patch(model)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["input", "more.0.weight"])

    patch.remove()
    feedbackhook.patch(model, "sign")
    assert said_by_two_steps(model, x) == []
    assert [row.name for row in feedbackhook.get_patch(model).layers] == ["a", "more.0", "c"]


ADAPTERS = {
    "LoRA": ({}, ["2.lora_A.default", "2.lora_B.default"]),
    "DoRA": ({"use_dora": True}, ["2.lora_A.default", "2.lora_B.default"]),
    "modules_to_save": (
        {"modules_to_save": ["4"]},
        ["2.lora_A.default", "2.lora_B.default", "4.modules_to_save.default"],
    ),
}


@WARM
@pytest.mark.parametrize(("options", "added"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_came_after_the_patch_are_told_of(options, added, warm):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    assert not warm or said_by_two_steps(model, x) == []
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["2"], r=2, **options)).double()
    said = said_by_two_steps(tuned, x)
    of_added = [message for message in said if "added after patching" in message]
    assert len(of_added) == 1
    assert [f"{name!r}" in of_added[0] for name in added] == [True] * len(added)
    copied = [message for message in said if "copy of a part ('4') of a patched model" in message]
    assert len(copied) == len(said) - 1 == ("modules_to_save" in options)
    assert str(patch).splitlines()[-1] == f"exact: {', '.join(added)}"

    patch.remove()
    for module in tuned.modules():
        assert not [name for name in vars(module) if "feedbackhook" in name or "scriptable" in name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._backward_hooks for p in tuned.parameters())


def test_the_copied_head_of_modules_to_save_is_exact_while_the_rest_is_rerouted():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "random")
    feedback = {name: patch.feedback(name) for name in ("0", "2")}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0"], r=2, modules_to_save=["4"])
    ).double()
    said_by_two_steps(tuned, x)  # which also takes the marks off the copied head
    got, plain = gradients(tuned, x), without_patch(tuned)
    own = {"base_model.model.0.base_layer": feedback["0"], "base_model.model.2": feedback["2"]}
    assert_same_gradients(got, by_saved_tensors(plain, own, x))
    assert_unlike(got, by_backprop(plain, x), ["input"])


# --- copies of parts -------------------------------------------------------------------------------------


def parameters_alive() -> list[nn.Parameter]:
    """All of them, kept alive: what other tests have left may be collected at any moment."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is nn.Parameter]


@pytest.mark.parametrize("rule", RULES)
def test_a_copy_of_a_part_takes_the_part_alone(rule):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
    bare = len(pickle.dumps(model[3]))
    feedbackhook.patch(model, rule)
    before = {id(parameter): parameter for parameter in parameters_alive()}
    part = copy.deepcopy(model[3])
    added = [parameter for parameter in parameters_alive() if id(parameter) not in before]
    assert sum(p.numel() for p in added) == sum(p.numel() for p in part.parameters())
    dumped = pickle.dumps(model[3])
    assert len(dumped) < bare + 32 * 32 * 4, "as long as with one more weight"
    restored = pickle.loads(dumped)
    assert torch.equal(restored.weight, model[3].weight)
    assert feedbackhook.get_patch(restored) is None
    assert feedbackhook.get_patch(part) is None
    file = io.BytesIO()
    torch.save(model[3], file)
    assert len(file.getvalue()) < bare + 32 * 32 * 4
