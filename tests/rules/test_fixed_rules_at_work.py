"""The fixed rules on networks: error signals, exact angles, redraws, formats, and what `exclude` leaves."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from support.bounds import HALF_OF_FLOAT64
from support.oracle import (
    ORACLES,
    assert_matches_oracle,
    assert_same_gradients,
    by_backprop,
    by_saved_tensors,
    gradients,
)
from support.problems import MLP_UPSTREAM, Net, draw, layer_names, mlp, redrawn
from support.rules import EVERY_RULE, INEXACT, PATCH_ALL
from torch import nn

import feedbackhook
from feedbackhook.rules import make_rule, rule_values

NEW = [mode for mode in INEXACT if mode not in ("sign", "random", "uSF", "NuSF", "brSF", "frSF", "RndF")]
NETWORKS = {
    "linear layers": (mlp, (3, 4), MLP_UPSTREAM),
    "residual convolutions, some grouped": (
        lambda: redrawn(Net()),
        (2, 2, 9, 9),
        ["input", "stem.weight", "blocks.0.conv1.weight"],
    ),
    "attention": (
        lambda: redrawn(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)),
        (2, 3, 8),
        ["input", "self_attn.in_proj_weight", "linear1.weight"],
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", INEXACT)
def test_error_signals_are_the_oracles(mode, network):
    build, shape, unlike = NETWORKS[network]
    plain, model, x = build(), build(), draw(*shape)
    patch = feedbackhook.patch(model, mode, **INEXACT[mode], **PATCH_ALL)
    feedback = {row.name: patch.feedback(row.name) for row in patch.layers}
    # the oracle of backward hooks knows modules alone, and no projections of attention
    oracles = {"saved tensors": by_saved_tensors} if network == "attention" else ORACLES
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=unlike, oracles=oracles)


# --- exact angles ----------------------------------------------------------------------------------------

WIDE = {
    "linear": lambda: nn.Linear(100, 100),
    "tall": lambda: nn.Linear(4, 5000),
    "convolution": lambda: nn.Conv2d(32, 40, 3),
    "grouped": lambda: nn.Conv2d(64, 64, 5, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(32, 40, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("degrees", [0, 1, 22.5, 45, 90, 150, 179, 180])
@pytest.mark.parametrize("kind", WIDE)
def test_the_measured_weight_angle_is_the_option(kind, degrees, dtype):
    layer = WIDE[kind]().to(dtype)
    assert layer.weight.numel() >= 10_000
    patch = feedbackhook.patch(layer, "angle", degrees=degrees)
    for _ in range(2):
        rows = {row.metric: row.value for row in feedbackhook.measure(patch)}
        assert rows["weight_angle"] == pytest.approx(degrees, abs=0.1 if dtype.itemsize == 2 else 1e-3)
        assert rows["norm_ratio"] == pytest.approx(1, abs=2e-3 if dtype.itemsize == 2 else 1e-6)
        layer.weight.data.mul_(1.5).add_(0.01)  # training moves W, and V follows


def test_the_angle_follows_a_schedule_while_the_direction_stays():
    layer = redrawn(nn.Linear(40, 30))
    patch = feedbackhook.patch(layer, "angle", degrees=90)
    w, orthogonal = layer.weight.detach(), patch.feedback("")
    for degrees in (60, 30, 0):
        patch.set(degrees=degrees)
        a = math.radians(degrees)
        torch.testing.assert_close(patch.feedback(""), math.cos(a) * w + math.sin(a) * orthogonal)


def test_a_weight_with_a_single_entry_has_no_such_angle_and_is_refused():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"no V is at 45 degrees to the weight of '1', .* exclude=\['1'\]"):
        feedbackhook.patch(model, "angle")
    assert feedbackhook.get_patch(model) is None
    with feedbackhook.patch(model, "angle", degrees=180) as patch:
        assert torch.equal(patch.feedback("1"), -model[1].weight.detach())
        with pytest.raises(ValueError, match=r"no V is at 90 degrees"):
            patch.set(degrees=90)
        assert patch.layers[1].rule == "angle(degrees=180)"


# --- draws -----------------------------------------------------------------------------------------------

REDRAWN = [mode for mode in NEW if "redraw" in rule_values(make_rule(mode, EVERY_RULE[mode]))]


def test_which_rules_can_be_redrawn():
    assert set(REDRAWN) >= {"angle", "noise", "sparse", "low_rank", "toeplitz"}


@pytest.mark.parametrize("redraw", ["never", "update"])
@pytest.mark.parametrize("mode", REDRAWN)
def test_random_parts_are_redrawn_after_updates_if_at_all(mode, redraw):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, mode, redraw=redraw)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = patch.feedback("2")
    gradients(model, x)
    assert torch.equal(patch.feedback("2"), before)
    optimizer.step()
    assert torch.equal(patch.feedback("2"), before) == (redraw == "never")


@pytest.mark.parametrize("mode", NEW)
def test_v_depends_on_seed_and_layer_alone(mode):
    """Not on the memory format, on other layers, or on how the global generators stand."""
    model = redrawn(Net())
    plain = feedbackhook.patch(copy.deepcopy(model), mode, **PATCH_ALL)
    torch.manual_seed(17)
    alone = copy.deepcopy(model).to(memory_format=torch.channels_last)
    alone = feedbackhook.patch(alone, mode, include=["blocks.0.conv2"])
    v, other = plain.feedback("blocks.0.conv2"), alone.feedback("blocks.0.conv2")
    assert (other - v).norm() <= HALF_OF_FLOAT64 * v.norm()


@pytest.mark.parametrize("mode", NEW)
def test_a_saved_state_restores_v(mode):
    model = redrawn(Net())
    patch = feedbackhook.patch(copy.deepcopy(model), mode, seed=3, **EVERY_RULE[mode], **PATCH_ALL)
    patch.redraw()
    file = io.BytesIO()
    torch.save(patch.state_dict(), file)
    file.seek(0)
    other = feedbackhook.patch(copy.deepcopy(model), "symmetric")
    other.load_state_dict(torch.load(file, weights_only=True))
    for row in patch.layers:
        assert torch.equal(other.feedback(row.name), patch.feedback(row.name)), row.name


@pytest.mark.parametrize("mode", EVERY_RULE)
def test_autocast_does_not_touch_v(mode):
    model = redrawn(Net()).float()
    patch = feedbackhook.patch(model, mode, **EVERY_RULE[mode], **PATCH_ALL)
    for row in patch.layers:
        v = patch.feedback(row.name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(patch.feedback(row.name), v), row.name
        assert v.dtype == torch.float32


@pytest.mark.parametrize("mode", EVERY_RULE)
def test_tied_weights_share_one_v(mode):
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    redrawn(model)
    plain, x = copy.deepcopy(model), draw(3, 5)
    patch = feedbackhook.patch(model, mode, **EVERY_RULE[mode], **PATCH_ALL)
    assert len(patch.layers) == 1
    assert torch.equal(patch.feedback("0"), patch.feedback("2"))
    feedback = {name: patch.feedback(name) for name in ("0", "2")}
    assert_same_gradients(gradients(model, x), ORACLES["backward hooks"](plain, feedback, x))


def test_a_weight_that_is_not_finite_gives_feedback_that_is_not_a_number():
    """Training that has diverged must show in the loss, not as an error of the decomposition."""
    layer = nn.Linear(4, 3)
    layer.weight.data[0, 0] = math.inf
    assert feedbackhook.patch(layer, "svd").feedback("").isnan().all()


# --- layers that a rule leaves exact ---------------------------------------------------------------------


def rules_of(model: nn.Module, mode, **options) -> dict[str, str]:
    with feedbackhook.patch(model, mode, **options) as patch:
        return {row.name: row.rule for row in patch.layers}


def test_sign_symmetry_leaves_the_classifier_exact_and_shows_it():
    plain, model, x = redrawn(Net()), redrawn(Net()), draw(2, 2, 9, 9)
    patch = feedbackhook.patch(model, "sign-symmetry")
    names = [name for name in layer_names(model) if name != "classifier"]
    assert [row.name for row in patch.layers] == names
    assert str(patch).splitlines()[-1] == "exact: classifier"
    feedback = {name: patch.feedback(name) for name in names}
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["stem.weight"], oracles=ORACLES)


def test_exclude_overrides_what_a_rule_leaves_exact():
    every = layer_names(Net())
    assert list(rules_of(Net(), "sign-symmetry", exclude=[])) == every
    assert list(rules_of(Net(), "sign-symmetry", exclude=["stem"])) == every[1:]
    assert list(rules_of(Net(), "uSF", exclude=[])) == every  # for rules without such layers it is nothing
    assert list(rules_of(Net(), "sign-symmetry", include=["stem"])) == ["stem"]


def test_a_mapping_leaves_the_classifier_exact_only_where_its_rule_does():
    assert "classifier" not in rules_of(Net(), {".*": "sign-symmetry"})
    assert rules_of(Net(), {"classifier": "uSF", ".*": "sign-symmetry"})["classifier"] == "uSF"
    assert rules_of(Net(), {".*": "sign-symmetry"}, exclude=[])["classifier"] == "sign-symmetry"


def test_only_the_classifier_itself_stays_exact():
    """In `exclude`, the name "fc" would also stand for "block.fc"."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(3, 3)}), "fc": nn.Linear(3, 2)})
    assert list(rules_of(model, "sign-symmetry")) == ["block.fc"]


def test_a_classifier_that_shares_its_weight_with_a_patched_layer_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '2' share a weight; patch both or exclude both"):
        feedbackhook.patch(model, "sign-symmetry")
    assert feedbackhook.get_patch(model) is None


class Headless(nn.Sequential):
    def get_classifier(self) -> nn.Module:
        return nn.Identity()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(3, 2),
            r"no layer is left to patch: mode 'sign-symmetry' leaves the classifier exact \(",
        ),
        (Headless(nn.Linear(3, 2)), r"leaves the classifier exact, but Headless has no classifier"),
    ],
    ids=["a single layer", "no classifier"],
)
def test_a_model_without_classifier_or_other_layers_is_refused(model, message):
    with pytest.raises(ValueError, match=rf"{message}.*; pass exclude=\[\] to patch every layer"):
        feedbackhook.patch(model, "sign-symmetry")
    assert feedbackhook.get_patch(model) is None
    assert len(rules_of(model, "sign-symmetry", exclude=[])) == 1


def test_symmetric_feedback_from_other_rules():
    """Each knob turned all the way is backprop."""
    x = draw(2, 2, 9, 9)
    for mode, options in (
        ("angle", {"degrees": 0}),
        ("noise", {"level": 0}),
        ("sparse", {"share": 1}),
        ("svd", {"power": 1}),
    ):
        plain, model = redrawn(Net()), redrawn(Net())
        feedbackhook.patch(model, mode, **options)
        assert_same_gradients(gradients(model, x), by_backprop(plain, x), what=f"under {mode}")
