"""Copies, pickles, moves and replaced parameters: each model is patched on its own, whatever became of it."""

import copy
import io
import pickle

import pytest
import torch
from support.oracle import (
    assert_bit_equal,
    assert_matches_oracle,
    by_backprop,
    gradients,
    probe,
    read_gradients,
)
from support.problems import (
    CNN_INPUT,
    CNN_UPSTREAM,
    Net,
    draw,
    mlp,
    patched_copy,
    random_feedback,
    redrawn,
)
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

import feedbackhook


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_an_average(model):
    return ModelEmaV2(model).module


def of_a_warming_average(model):
    return ModelEmaV3(model).module


COPIES = {
    function.__name__: function
    for function in (copy.deepcopy, through_pickle, through_torch_save, of_an_average, of_a_warming_average)
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_patched_on_its_own(duplicate):
    plain, model, x = mlp(), mlp(), draw(3, 4)
    feedback = random_feedback(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    twin = duplicate(model).train()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    assert_matches_oracle(gradients(twin, x), plain, feedback, x, unlike=["0.weight"])
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight"])
    own = feedbackhook.get_patch(twin)
    assert own is not patch
    assert [row.calls for row in own.layers] == [1, 1, 1]
    assert [row.calls for row in patch.layers] == [1, 1, 1]

    patch.remove()
    assert_matches_oracle(gradients(twin, x), plain, feedback, x, unlike=["0.weight"])
    own.remove()
    for unpatched in (model, twin):
        assert torch.equal(
            gradients(unpatched, x).parameters["0.weight"], by_backprop(plain, x).parameters["0.weight"]
        )
        assert not any(p._backward_hooks for p in unpatched.parameters())


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_a_copys_guard_watches_from_its_first_forward(duplicate):
    model = mlp()
    feedbackhook.patch(model)
    twin = duplicate(model)
    for parameter in twin.parameters():
        parameter.requires_grad_()
    twin(draw(3, 4))
    with pytest.raises(feedbackhook.ExactGradientError, match="the weight of '4'"):
        nn.functional.linear(draw(3, 5).requires_grad_(), twin[4].weight).sum().backward()


def test_a_copys_optimizer_redraws_the_copy_alone():
    model = mlp()
    patch = feedbackhook.patch(model, "brSF")
    twin = copy.deepcopy(model)
    own = feedbackhook.get_patch(twin)
    assert torch.equal(own.feedback("2"), patch.feedback("2"))
    before = patch.feedback("2")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    twin(draw(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(patch.feedback("2"), before)
    assert not torch.equal(own.feedback("2"), before)


def test_state_dict_keys_never_change():
    model = mlp()
    keys = list(model.state_dict())
    patch = feedbackhook.patch(model)
    model(draw(3, 4)).sum().backward()
    assert list(model.state_dict()) == keys
    mlp().load_state_dict(model.state_dict(), strict=True)
    patch.remove()
    assert list(model.state_dict()) == keys


def assigned(model):
    model.load_state_dict(mlp().state_dict(), assign=True)
    return model


def emptied(model):
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def replaced_parameter(model):
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    return model


@pytest.mark.parametrize("renew", [assigned, emptied, replaced_parameter])
def test_new_parameters_are_known_and_guarded(renew):
    plain, x = mlp(), draw(3, 4)
    feedback = random_feedback(plain)
    model = mlp()
    feedbackhook.patch(model, "tensor", feedback=feedback)
    gradients(model, x)
    renew(model)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight"])
    with pytest.raises(feedbackhook.ExactGradientError, match="the weight of '2'"):
        nn.functional.linear(draw(3, 6).requires_grad_(), model[2].weight).sum().backward()


def test_a_model_patched_on_the_meta_device_is_patched_when_it_gets_its_weights():
    plain, x = mlp(), draw(3, 4)
    with torch.device("meta"):
        model = mlp()
    patch = feedbackhook.patch(model, "frSF", concordance=0.7)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    with feedbackhook.patch(mlp(), "frSF", concordance=0.7) as at_once:
        assert torch.equal(at_once.feedback("2"), feedback["2"])
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight"])


@pytest.mark.parametrize("mode", ["frSF", "brSF", "random", "sign"])
def test_feedback_follows_the_model_to_another_dtype(mode):
    model, x = mlp().float(), draw(3, 4)
    patch = feedbackhook.patch(model, mode)
    gradients(model, x.float())
    model.double()
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    assert all(v.dtype == torch.float64 for v in feedback.values())
    plain = copy.deepcopy(model)
    feedbackhook.unpatch(plain)
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight"])


def test_data_parallel_is_refused():
    model = mlp()
    feedbackhook.patch(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"cannot run under nn\.DataParallel"):
        replica(draw(3, 4))
    assert torch._C._len_torch_function_stack() == 0


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
    with pytest.warns(UserWarning, match=r"copy of a part \('blocks'\) of a patched model"):
        assert_bit_equal(gradients(part, x), by_backprop(plain.blocks, x))
    assert not any(name.startswith("_feedbackhook") for module in part.modules() for name in vars(module))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in part.modules())
    got = gradients(part, x)
    assert_bit_equal(got, by_backprop(plain.blocks, x))
    own = {name[len("blocks.") :]: v for name, v in feedback.items() if name.startswith("blocks.")}
    feedbackhook.patch(part, "tensor", feedback=own)
    assert_matches_oracle(gradients(part, x), plain.blocks, own, x, unlike=["input", "0.conv1.weight"])
    assert_matches_oracle(gradients(model.blocks, x), plain.blocks, own, x)
