"""The handle: the clock of redraws, options in training, state, and patches in the wrong place."""

import copy
import io
import itertools
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

import feedbackhook


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def step(model, optimizer, x=None):
    x = torch.randn(5, 6) if x is None else x
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


OPTIMIZERS = {
    f"{name} {form}": (optimizer, {form: True})
    for name, optimizer in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW))
    for form in ("foreach", "fused")
} | {
    "SGD for-loop": (torch.optim.SGD, {"foreach": False}),
    "AdamW for-loop": (torch.optim.AdamW, {"foreach": False}),
    "BatchManhattan": (feedbackhook.BatchManhattan, {}),
}


@pytest.mark.parametrize(("optimizer", "form"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_brsf_draws_anew_after_an_optimizer_step_and_only_then(optimizer, form):
    model = network()
    optimizer = optimizer(model.parameters(), lr=1e-4, **form)
    with feedbackhook.patch(model, "brSF", concordance=0.7) as patch:
        magnitudes = [patch.feedback("2").abs()]
        for _ in range(3):
            for _ in range(2):
                model(torch.randn(5, 6)).square().sum().backward()
                assert torch.equal(patch.feedback("2").abs(), magnitudes[-1])
            optimizer.step()
            magnitudes.append(patch.feedback("2").abs())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(magnitudes))


def test_frsf_keeps_its_draws_while_the_weight_moves():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with feedbackhook.patch(model, "frSF", concordance=0.7) as patch:
        signed = patch.feedback("2") * torch.sign(model[2].weight)
        before = model[2].weight.detach().clone()
        for _ in range(20):
            step(model, optimizer)
        assert (torch.sign(before) != torch.sign(model[2].weight)).any()
        assert torch.equal(patch.feedback("2") * torch.sign(model[2].weight), signed)


def test_only_the_layers_that_the_optimizer_holds_redraw():
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with feedbackhook.patch(model, "brSF") as patch:
        before = {name: patch.feedback(name).abs() for name in ("0", "2", "4")}
        step(model, optimizer)
        same = {name: torch.equal(patch.feedback(name).abs(), v) for name, v in before.items()}
    assert same == {"0": True, "2": False, "4": True}


def test_an_optimizer_of_another_model_redraws_nothing():
    model, other = network(), network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with feedbackhook.patch(model, "brSF") as patch:
        before = patch.feedback("2")
        step(other, optimizer)
        assert torch.equal(patch.feedback("2"), before)


def test_redraw_by_hand():
    with feedbackhook.patch(network(), "frSF") as patch:
        before = patch.feedback("2")
        patch.redraw()
        assert not torch.equal(patch.feedback("2"), before)


def test_the_backward_uses_the_feedback_that_the_handle_shows():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with feedbackhook.patch(model, "brSF", concordance=0.5) as patch:
        patch.on_error_signal("2", lambda grad_input, grad_output: seen.append((grad_input, grad_output)))
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 6)).square().sum()
            expected = patch.feedback("2")
            loss.backward()
            grad_input, grad_output = seen[-1]
            torch.testing.assert_close(grad_input, grad_output @ expected)
            optimizer.step()
    assert len(seen) == 3


def test_probes_see_the_first_layer_without_a_signal_upstream_and_end_when_removed():
    model = network()
    with feedbackhook.patch(model) as patch:
        seen = []
        handle = patch.on_error_signal(
            "0", lambda grad_input, grad_output: seen.append((grad_input, grad_output.shape))
        )
        model(torch.randn(5, 6)).sum().backward()
        handle.remove()
        model(torch.randn(5, 6)).sum().backward()
    assert seen == [(None, (5, 8))]


def test_seeds_and_names_decide_the_feedback():
    def feedback(seed):
        with feedbackhook.patch(network(), "frSF", seed=seed) as patch:
            return patch.feedback("2")

    assert torch.equal(feedback(0), feedback(0))
    assert not torch.equal(feedback(0), feedback(1))


def test_patching_leaves_the_global_generators_alone():
    model = network()
    before = torch.get_rng_state()
    with feedbackhook.patch(model, "brSF", concordance=0.5) as patch:
        patch.redraw()
        patch.feedback("2")
    assert torch.equal(before, torch.get_rng_state())


def test_options_change_in_training():
    model = network()
    with feedbackhook.patch(model, "sign", concordance=1.0) as patch:
        patch.set(concordance=0.0)
        v, w = patch.feedback("2"), model[2].weight
        assert torch.equal(torch.sign(v), -torch.sign(w))
        with pytest.raises(ValueError, match="concordance must be from 0 to 1, not 2"):
            patch.set(concordance=2)
        with pytest.raises(TypeError, match="mode 'sign' has no option 'std'"):
            patch.set(std=1)
        assert torch.equal(patch.feedback("2"), v)


@pytest.mark.parametrize("mode", ["frSF", "brSF", "random", "tensor"])
def test_state_goes_through_a_file_and_restores_the_feedback_elsewhere(mode):
    model = network()
    options = (
        {"feedback": {n: torch.randn_like(model[int(n)].weight) for n in "024"}} if mode == "tensor" else {}
    )
    patch = feedbackhook.patch(model, mode, seed=7, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save({"patch": patch.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other = network()
    restored = feedbackhook.patch(other, "symmetric")
    other.load_state_dict(saved["model"])
    restored.load_state_dict(saved["patch"])
    assert torch.equal(restored.feedback("2"), patch.feedback("2"))
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    optimizer.zero_grad()
    x = torch.randn(5, 6)
    (model(x).square().sum() + other(x).square().sum()).backward()
    optimizer.step()
    assert torch.equal(restored.feedback("2"), patch.feedback("2"))


def test_state_of_other_layers_is_refused():
    patch = feedbackhook.patch(network(), exclude=["4"])
    other = feedbackhook.patch(network(), exclude=["0"])
    with pytest.raises(
        ValueError, match=r"the state lacks the layers \['0'\] and has the unknown layers \['4'\]"
    ):
        patch.load_state_dict(other.state_dict())


def test_what_is_no_state_of_a_patch_is_refused_as_such():
    model = network()
    patch = feedbackhook.patch(model, "frSF")
    checkpoint = {"model": model.state_dict(), "patch": patch.state_dict()}
    for state, keys in (
        (checkpoint, "the keys 'model', 'patch'"),
        (model.state_dict(), "the keys '0.weight', '0.bias', '2.weight', ..."),
        ({}, "no keys"),
    ):
        message = f"this is no state of a patch: it has {keys}; pass what Patch.state_dict returned"
        with pytest.raises(ValueError, match=re.escape(message)):
            patch.load_state_dict(state)


def test_a_state_brings_its_rules():
    patch = feedbackhook.patch(network(), "uSF")
    patch.load_state_dict(feedbackhook.patch(network(), "frSF", concordance=0.75).state_dict())
    assert {row.rule for row in patch.layers} == {"frSF(concordance=0.75)"}


@pytest.mark.parametrize("stream", [None, feedbackhook.rng.STREAM + 1], ids=["earlier", "later"])
def test_state_of_another_stream_of_random_numbers_is_refused(stream):
    """Its seed would give another V."""
    patch = feedbackhook.patch(network(), "frSF")
    state = {**patch.state_dict(), "enabled": False, "stream": stream}
    if stream is None:
        del state["stream"]
    message = rf"this state of a patch is of stream {stream or 1} .*load it with the version that saved it"
    with pytest.raises(ValueError, match=message):
        patch.load_state_dict(state)
    assert patch.enabled
    content = {**patch.state.__getstate__(), "stream": stream or 1}
    with pytest.raises(ValueError, match=message):  # a pickled model's
        object.__new__(type(patch.state)).__setstate__(content)


def test_tied_weights_share_one_feedback():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    model["decoder"].weight = model["encoder"].weight
    with feedbackhook.patch(model) as patch:
        assert [row.name for row in patch.layers] == ["encoder"]
        assert torch.equal(patch.feedback("encoder"), patch.feedback("decoder"))
        x = torch.randn(3, 4, requires_grad=True)
        model["decoder"](model["encoder"](x)).sum().backward()
        v = patch.feedback("encoder")
        torch.testing.assert_close(x.grad, torch.ones(3, 4) @ v @ v)
        assert patch.layers[0].rerouted == 2


def test_a_layer_that_has_moved_since_it_was_patched_is_not_called_exact():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    patch = feedbackhook.patch(model, "sign", exclude=["2"])
    model[1] = nn.Sequential(OrderedDict(inner=model[1]))
    model(torch.randn(2, 3)).sum().backward()
    assert [row.rerouted for row in patch.layers] == [0, 1]
    assert str(patch).splitlines()[-1] == "exact: 2"


def test_the_table_tells_what_was_rerouted():
    model = network()
    with feedbackhook.patch(model, "sign", concordance=0.8) as patch:
        for _ in range(2):
            model(torch.randn(5, 6)).sum().backward()
        assert [(row.calls, row.rerouted, row.input_requires_grad) for row in patch.layers] == [
            (2, 0, False),
            (2, 2, True),
            (2, 2, True),
        ]
        assert str(patch).splitlines() == [
            "layer  kind    weight  rule                   calls  rerouted",
            "0      Linear  8x6     sign(concordance=0.8)  2      input needs no grad",
            "2      Linear  7x8     sign(concordance=0.8)  2      2",
            "4      Linear  3x7     sign(concordance=0.8)  2      2",
        ]


def test_the_patch_is_found_from_the_whole_and_from_a_part():
    model = network()
    assert feedbackhook.get_patch(model) is None
    patch = feedbackhook.patch(model)
    assert feedbackhook.get_patch(model) is patch
    assert feedbackhook.get_patch(model[2]) is patch
    assert feedbackhook.get_patch(nn.Sequential(model)) is patch
    feedbackhook.unpatch(model)
    assert feedbackhook.get_patch(model) is None
    with pytest.raises(ValueError, match="this Sequential is not patched"):
        feedbackhook.unpatch(model)


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (lambda model: model, r"cannot patch this Sequential: it is patched already.*get_patch.*unpatch"),
        (
            lambda model: model[2],
            r"cannot patch this Linear: it, '2' of a Sequential, is patched already.*get_patch.*unpatch",
        ),
        (nn.Sequential, r"cannot patch this Sequential: its part '0' is patched already.*get_patch.*unpatch"),
    ],
    ids=["the same", "a part", "the whole"],
)
def test_patching_twice_is_refused(again, message):
    model = network()
    patch = feedbackhook.patch(model)
    with pytest.raises(ValueError, match=message):
        feedbackhook.patch(again(model))
    assert feedbackhook.get_patch(model) is patch
    patch.remove()
    patch.remove()
    feedbackhook.patch(model).remove()


def test_two_patches_on_parts_are_told_apart():
    model = network()
    first, second = feedbackhook.patch(model[0]), feedbackhook.patch(model[2])
    with pytest.raises(ValueError, match="parts of this Sequential have 2 different patches"):
        feedbackhook.get_patch(model)
    feedbackhook.unpatch(model)
    assert feedbackhook.get_patch(model) is None
    assert first is not second


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, not int"),
        ({"seed": "a"}, TypeError, "seed must be an int, not 'a'"),
        ({"mode": "sgn"}, ValueError, "unknown mode 'sgn'; known: symmetric, sign"),
        ({"concordance": 1.3}, ValueError, "concordance must be from 0 to 1, not 1.3"),
        (
            {"std": 1},
            TypeError,
            "mode 'sign' has no option 'std'; it has concordance, magnitude, redraw, scale",
        ),
        ({"mode": "tensor", "feedback": {}}, ValueError, "feedback has no tensor for: 0, 2, 4"),
        (
            {"mode": "tensor", "include": ["0"], "feedback": {"0": torch.ones(6, 8)}},
            ValueError,
            r"feedback\['0'\] has shape \(6, 8\), but the weight has shape \(8, 6\)",
        ),
        (
            {"mode": "tensor", "include": ["0"], "feedback": {"0": torch.ones(8, 6), "1": torch.ones(1)}},
            ValueError,
            "feedback names layers that are not patched: 1",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(arguments, error, message):
    model = network()
    with pytest.raises(error, match=message):
        feedbackhook.patch(**{"model": model, **arguments})
    assert feedbackhook.get_patch(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_unknown_layer_is_a_key_error_that_names_the_known():
    with feedbackhook.patch(network()) as patch:
        for ask in (patch.feedback, patch.weight, lambda name: patch.on_error_signal(name, print)):
            with pytest.raises(KeyError, match=r"no patched layer is named 'fc'; patched: '0', '2', '4'"):
                ask("fc")


def test_a_copy_has_a_handle_of_its_own():
    model = network()
    patch = feedbackhook.patch(model, "brSF")
    twin = copy.deepcopy(model)
    own = feedbackhook.get_patch(twin)
    assert own is not patch
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert not torch.equal(own.feedback("2").abs(), patch.feedback("2").abs())
    patch.remove()
    assert feedbackhook.get_patch(twin) is own
    assert own.layers[1].rerouted == 1


def test_changed_options_are_checked_against_the_layers():
    model = network()
    given = {name: torch.randn_like(model[int(name)].weight) for name in "024"}
    with feedbackhook.patch(model, "tensor", feedback=given) as patch:
        with pytest.raises(ValueError, match="feedback has no tensor for: 2, 4"):
            patch.set(feedback={"0": given["0"]})
        assert torch.equal(patch.feedback("2"), given["2"])


def test_what_is_left_exact_is_named():
    with feedbackhook.patch(network(), exclude=["4"]) as patch:
        assert str(patch).splitlines()[-1] == "exact: 4"
