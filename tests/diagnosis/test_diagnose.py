"""The check of trust: what it says of each layer, and that it leaves no trace."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.diagnosis import Busy, Stream, assert_same, batches, loss, net, trace
from support.paths import ROOT
from support.problems import draw
from torch import nn

import feedbackhook
from feedbackhook.diagnosis.checks import KINDS, verdict

LAYERS = ["0", "2", "4"]


def diagnosed(model, mode, given, of=loss, **options):
    with feedbackhook.patch(model, mode, **options) as patch:
        return feedbackhook.diagnose(patch, given, of)


def test_under_symmetric_feedback_every_credit_is_1_and_no_rule_fails():
    found = diagnosed(net(), "symmetric", batches(4, 64))
    for name in LAYERS:
        assert found.of(name, "credit").value == 1
        assert found.of(name, "angle").value == 0
        stability = found.of(name, "stability")
        exact = {row.layer: row.value for row in found.moments if row.metric == "check_exact_stability"}
        assert stability.value == exact[name]
    assert found.failed == []
    assert str(found).endswith("no check failed, over 4 batches.")


def test_one_batch_is_one_batch():
    assert str(diagnosed(net(), "symmetric", batches(1))).endswith(", over 1 batch.")


def test_the_page_has_every_check():
    page = (ROOT / "docs/guide/trust.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \| [^|]* \| [^|]* \|$", page, flags=re.MULTILINE)
    assert rows == ["check", *(kind.title for kind in KINDS.values())]


def test_floor_angle_and_credit_are_those_worked_out_by_hand():
    model, given = net(), batches(2)
    found = diagnosed(model, "random", given)
    with feedbackhook.patch(model, "random") as patch:
        v = {name: patch.feedback(name) for name in LAYERS}
    w = {name: model.get_submodule(name).weight.detach() for name in LAYERS}
    angles, ratios, unit = [], [], bounds.ROUNDING["float64"]
    for x, y in given:
        a = torch.tanh(model[0](x)).detach()
        z = model[2](a).detach()
        error = 2 * (model(x) - y).detach() / y.numel()
        arriving = {m: error @ m * (1 - torch.tanh(z) ** 2) for m in (v["4"], w["4"])}
        delivered, exact = (arriving[m].T @ a for m in (v["4"], w["4"]))
        cosine = (delivered * exact).sum() / delivered.norm() / exact.norm()
        angles.append(math.degrees(math.acos(cosine)))
        step = unit * z.norm() / a.norm()
        total = unit * arriving[w["4"]].norm() * a.norm()
        ratios.append(float(exact.norm() / max(step, total)))
    assert found.of("2", "angle").value == pytest.approx(sum(angles) / 2, abs=bounds.ANGLE)
    assert found.of("2", "floor").value == pytest.approx(min(ratios), rel=bounds.HALF_OF_FLOAT64)
    # the difference quotient's error is of the order of its step squared, eps^(2/3)
    assert found.of("2", "credit").value == pytest.approx(math.cos(math.radians(angles[0])), abs=1e-6)
    assert found.of("0", "growth").threshold == 1 / torch.finfo(torch.float64).eps


def test_a_planted_floor_is_named_and_its_angle_is_not_a_number():
    torch.manual_seed(0)
    given = [(x.float(), y.float()) for x, y in batches(3, 32)]
    well = diagnosed(Stream(1.0), "random", given)
    assert {well.of(name, "floor").verdict for name in ("stem", "block.1", "block.3", "head")} == {"resolved"}
    found = diagnosed(Stream(1e12), "random", given)
    for name in ("block.1", "block.3"):
        assert found.of(name, "floor").verdict == "at the floor"
        assert math.isnan(found.of(name, "angle").value)
        assert "number format holds" in found.of(name, "angle").note
        assert found.of(name, "angle").verdict == "undefined"
    assert found.of("head", "floor").verdict == "resolved"
    assert found.of(None, "growth").verdict == "explodes"
    assert "block.1, floor: at the floor" in str(found)


def test_a_weight_that_outgrows_its_gradient_is_at_the_floor():
    """The last normalization divides the gradient by 1e12, and no step of its length changes the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e12)
    found = diagnosed(model, "random", [(x.float(), y.float()) for x, y in batches(2)])
    assert found.of("0", "floor").verdict == "at the floor"
    assert math.isnan(found.of("0", "angle").value)


def test_cancellation_is_at_the_floor_too():
    """Every input comes with targets whose errors cancel but for rounding."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    model = nn.Sequential(model)
    x = 1e6 + draw(8, 4).float()
    y = torch.full((16, 2), 1.0)
    y[8:] = -1
    found = diagnosed(model, "symmetric", [(torch.cat([x, x]), y * (1 + 2.0**-20))])
    floor = found.of("0", "floor")
    assert floor.verdict in ("at the floor", "undefined")
    assert math.isnan(found.of("0", "angle").value)


def test_a_rule_that_redraws_has_noise_of_its_draws():
    found = diagnosed(net(), "brSF", batches(3, 32), concordance=0.5)
    rows = {(row.layer, row.metric): row.value for row in found.moments}
    assert rows["0", "check_draw_noise"] > 0
    assert rows["4", "check_draw_noise"] == pytest.approx(0, abs=math.sqrt(bounds.ROUNDING["float64"]) * 8)
    fixed = diagnosed(net(), "frSF", batches(3, 32), concordance=0.5)
    assert all(math.isnan(row.value) for row in fixed.moments if row.metric == "check_draw_noise")


def test_opposed_feedback_goes_the_wrong_way():
    model = net()
    v = {"2": model[2].weight.detach(), "4": -model[4].weight.detach(), "0": model[0].weight.detach()}
    found = diagnosed(model, "tensor", batches(4, 64), feedback=v)
    assert found.of("2", "credit").value == pytest.approx(-1)
    assert found.of("2", "credit").verdict == "wrong way"
    assert found.of("2", "angle").verdict == "unrelated"
    assert found.of("2", "signal").verdict == "no signal"
    assert found.of("4", "credit").verdict == "credited"
    assert {check.layer for check in found.failed} == {"0", "2"}


def test_one_batch_leaves_what_needs_two_undefined():
    found = diagnosed(net(), "random", batches(1))
    for kind in ("stability", "signal"):
        assert found.of("2", kind).verdict == "undefined"
        assert found.of("2", kind).note == "needs two batches"


def test_frozen_layers_and_sites_keep_their_rows():
    model = net()
    model[2].requires_grad_(False)
    found = diagnosed(model, "random", batches(2))
    assert found.of("2", "floor").note == "its weight is frozen"
    assert found.of("2", "floor").verdict == "undefined"
    at_site = diagnosed(net(), "DFA", batches(2), sites=["2"])
    assert at_site.of("2", "floor").value == math.inf  # nothing is known of a site's activations
    assert not math.isnan(at_site.of("2", "angle").value)


def test_targets_reach_direct_rules():
    given = [(x, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])) for x, _ in batches(2)]
    found = diagnosed(net(), "DRTP", given, F.cross_entropy)
    assert not math.isnan(found.of("2", "angle").value)


def failing(calls):
    count = 0

    def of(output, target):
        nonlocal count
        count += 1
        if count > calls:
            raise ArithmeticError("out of loss")
        return loss(output, target)

    return of


@pytest.mark.parametrize("calls", [0, 1, 5, 8, None])
def test_model_and_patch_stay_as_they_were_also_after_errors(calls):
    model = Busy()
    x, y = draw(6, 5).float(), draw(6, 3, seed=1).float()
    with feedbackhook.patch(model, "brSF", concordance=0.7) as patch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model(x), y).backward()
        optimizer.step()
        seen = []
        patch.on_error_signal("head", lambda grad_input, grad_output: seen.append(1))
        before, state, shown = trace(model), patch.state_dict(), str(patch)
        v, feedback = patch.feedback("head"), [each.feedback for each in patch.state.patched]
        if calls is None:
            feedbackhook.diagnose(patch, [(x, y)] * 2, loss)
        else:
            with pytest.raises(ArithmeticError, match="out of loss"):
                feedbackhook.diagnose(patch, [(x, y)] * 2, failing(calls))
        assert_same(before, trace(model))
        assert patch.state_dict() == state
        assert str(patch) == shown
        assert torch.equal(patch.feedback("head"), v)
        assert [each.feedback for each in patch.state.patched] == feedback
        assert seen == []
        loss(model(x), y).backward()
        assert seen == [1]


def test_a_graph_built_before_is_still_good():
    model, (batch, *given) = net(), batches(3)
    with feedbackhook.patch(model, "random") as patch:
        value = loss(model(batch[0]), batch[1])
        want = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        feedbackhook.diagnose(patch, given, loss)
        got = torch.autograd.grad(value, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ValueError, "empty"),
        ({"batches": torch.ones(2, 3, 5)}, TypeError, "a pair"),
        ({"draws": 1}, ValueError, "at least 2"),
        ({"loss": lambda output, target: output}, ValueError, "one element"),
    ],
    ids=["no batch", "no pair", "one draw", "no scalar"],
)
def test_what_cannot_be_diagnosed_is_refused_by_name(arguments, error, message):
    with feedbackhook.patch(net(), "random") as patch, pytest.raises(error, match=message):
        feedbackhook.diagnose(patch, **{"batches": batches(2), "loss": loss, **arguments})


def test_a_disabled_patch_is_refused():
    with feedbackhook.patch(net(), "random") as patch:
        patch.enabled = False
        with pytest.raises(ValueError, match="disabled"):
            feedbackhook.diagnose(patch, batches(2), loss)


def test_every_check_has_a_threshold_with_a_source_and_two_words():
    for name, kind in KINDS.items():
        assert kind.source
        assert kind.threshold
        better, worse = (2.0, 0.5) if kind.above else (0.5, 2.0)
        assert verdict(name, better, 1.0) == kind.passes
        assert verdict(name, worse, 1.0) == kind.fails
        assert verdict(name, math.nan, 1.0) == verdict(name, 1.0, math.nan) == "undefined"


def test_rows_hold_value_and_threshold_of_every_check():
    found = diagnosed(net(), "random", batches(2))
    rows = {(row.layer, row.metric): row.value for row in found.rows()}
    for check in found.checks:
        assert rows[check.layer, f"check_{check.kind}"] == pytest.approx(check.value, nan_ok=True)
        assert rows[check.layer, f"check_{check.kind}_threshold"] == pytest.approx(
            check.threshold, nan_ok=True
        )
    with pytest.raises(KeyError, match="no check 'depth'"):
        found.of("2", "depth")
