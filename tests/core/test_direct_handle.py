"""The handle of a patch with direct rules: options, states, copies, tables and measures."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.direct import by_hooks, matrices_of
from support.oracle import TOLERANCE, assert_same_gradients, by_backprop, gradients, probe
from support.problems import CNN_INPUT, Net, draw, mlp, redrawn
from torch import Tensor

import feedbackhook
from feedbackhook.core.signals import walk

WHERE = {"layers": {}, "blocks": {"sites": "blocks[.].*"}, "shared": {"shared": True}}
everywhere = pytest.mark.parametrize("options", WHERE.values(), ids=WHERE)


def trained_once(**options) -> tuple[Net, feedbackhook.Patch, Tensor]:
    model, x = redrawn(Net()), draw(*CNN_INPUT)
    patch = feedbackhook.patch(model, "DFA", **options)
    gradients(model, x)
    return model, patch, x


def pickled(model: Net) -> Net:
    return pickle.loads(pickle.dumps(model))


@everywhere
def test_options_change_during_training(options):
    model, patch, x = trained_once(**options)
    before = matrices_of(patch)
    patch.set(scale=None)
    got = gradients(model, x)
    after = matrices_of(patch)
    for name, b in before.items():
        ratio = after[name] / b
        assert (ratio - ratio.mean()).abs().max() < TOLERANCE * ratio.mean()  # the same draw, scaled
        assert after[name].abs().max() > 3 * b.abs().max() or b.shape[0] < 9
    assert_same_gradients(got, by_hooks(redrawn(Net()), after, x))
    for fixed in ({"shared": False}, {"sites": None}, {"output": "classifier"}):
        with pytest.raises(ValueError, match="cannot change while the model is patched"):
            patch.set(**fixed)


@everywhere
def test_a_redraw_changes_every_b_and_not_a_graph_that_exists(options):
    model, patch, x = trained_once(**options)
    before = matrices_of(patch)
    leaf = x.clone().requires_grad_()
    loss = probe(model(leaf))
    patch.redraw()
    loss.backward()
    want = by_hooks(redrawn(Net()), before, x).input
    assert (leaf.grad - want).norm() <= TOLERANCE * want.norm()
    got = gradients(model, x)
    after = matrices_of(patch)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert_same_gradients(got, by_hooks(redrawn(Net()), after, x))


@everywhere
def test_a_state_restores_b(options, tmp_path):
    model, patch, x = trained_once(**options, seed=5)
    patch.redraw()
    want = gradients(model, x)
    torch.save(patch.state_dict(), tmp_path / "patch.pt")
    state = torch.load(tmp_path / "patch.pt", weights_only=True)
    other = redrawn(Net())
    restored = feedbackhook.patch(other, "DFA", **options)
    gradients(other, x)
    restored.load_state_dict(state)
    assert_same_gradients(gradients(other, x), want, tolerance=0)
    wrong = copy.deepcopy(state)
    for row in wrong["layers"].values():
        row["options"]["output"] = "classifier"
    with pytest.raises(ValueError, match="patch with the state's rule"):
        restored.load_state_dict(wrong)
    assert_same_gradients(gradients(other, x), want, tolerance=0)


@everywhere
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_patch_with_the_same_b(copied, options):
    model, patch, x = trained_once(**options)
    want = gradients(model, x)
    other = copied(model)
    assert_same_gradients(gradients(other, x), want, tolerance=0)
    own = feedbackhook.get_patch(other)
    assert own is not patch
    own.redraw()
    assert_same_gradients(gradients(model, x), want, tolerance=0)
    patch.remove()
    assert_same_gradients(gradients(model, x), by_backprop(redrawn(Net()), x))
    got = gradients(other, x)
    assert_same_gradients(got, by_hooks(redrawn(Net()), matrices_of(own), x))
    own.remove()
    assert_same_gradients(gradients(other, x), by_backprop(redrawn(Net()), x))


@everywhere
def test_recompute_keeps_no_matrix_and_changes_nothing(options):
    model, patch, x = trained_once(**options)
    other = redrawn(Net())
    saving = feedbackhook.patch(other, "DFA", **options, recompute=True)
    assert_same_gradients(gradients(other, x), gradients(model, x), tolerance=0)
    assert "none kept" in str(saving)
    assert "none kept" not in str(patch)
    for name, b in matrices_of(patch).items():
        assert torch.equal(saving.projection(name), b)


def test_the_table_tells_sizes_memory_and_what_gets_past():
    model, x = redrawn(Net()), draw(*CNN_INPUT)
    patch = feedbackhook.patch(model, "DFA")
    assert "memory of all B: not known before the first forward" in str(patch)
    model(x)
    lines = str(patch).splitlines()
    assert lines[0].split()[-5:] == ["rerouted", "B", "error", "from", "above"]
    assert "input needs no grad" in lines[1]
    assert lines[2].split()[-3:] == ["48x4", "gets", "past"]
    assert lines[6].split()[-2:] == ["3x4", "stops"]
    numbers = (48 + 96 + 48 + 96 + 3) * 4
    assert lines[7] == f"error from the model's output; memory of all B: {numbers * 8 / 2**20:.3g} MiB"
    assert lines[8].startswith("the error from above gets past 4 of 6")
    patch.remove()
    patch = feedbackhook.patch(model, "DFA", sites="blocks[.].*", output="classifier")
    model(x)
    lines = str(patch).splitlines()
    assert [line.split()[0] for line in lines] == ["site", "blocks.0", "blocks.1", "error"]
    assert all("stops" in line for line in lines[1:3])
    assert lines[3].startswith("error from the output of 'classifier'")
    assert lines[1].split()[3] == "DFA"  # its sites are the rows
    assert repr(patch) == "<feedbackhook.Patch of Net, 2 sites>"
    patch.remove()
    patch = feedbackhook.patch(model, "DFA", shared=True)
    model(x)
    assert f"memory of all B: {96 * 4 * 8 / 2**20:.3g} MiB" in str(patch)


def test_a_plain_chain_stops_the_error_from_above():
    model = mlp()
    patch = feedbackhook.patch(model, "DFA")
    model(draw(3, 4).requires_grad_())
    assert "gets past" not in str(patch)


def test_v_and_b_are_asked_for_by_their_names():
    model, patch, _ = trained_once()
    with pytest.raises(ValueError, match=r"'stem' follows DFA, which has no V; patch.projection\('stem'\)"):
        patch.feedback("stem")
    with pytest.raises(KeyError, match="no patched layer is named 'stern'"):
        patch.projection("stern")
    patch.remove()
    patch = feedbackhook.patch(model, {"stem": "DFA", "classifier": "sign"})
    with pytest.raises(ValueError, match="'stem' has no B before its first forward"):
        patch.projection("stem")
    with pytest.raises(ValueError, match="'classifier' follows sign, which has no B"):
        patch.projection("classifier")


def measured(patch: feedbackhook.Patch, loss: Tensor) -> dict[tuple[str | None, str], float]:
    return {(row.layer, row.metric): row.value for row in feedbackhook.measure(patch, loss)}


def angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(min(1.0, (a * b).sum() / (a.norm() * b.norm()))))


@everywhere
def test_measures_have_a_meaning_or_are_nan(options):
    model, patch, x = trained_once(**options)
    plain = redrawn(Net())
    matrices = matrices_of(patch)
    delivered, exact = by_hooks(plain, matrices, x), by_backprop(plain, x)
    seen = {}
    for name in matrices:
        patch.on_error_signal(name, lambda to, _, name=name: seen.setdefault(name, to.clone()))
    rows = measured(patch, probe(model(x.requires_grad_())))
    assert not seen  # measuring calls no probe
    for (layer, metric), value in rows.items():
        if metric in ("weight_angle", "sign_agreement", "norm_ratio"):
            assert math.isnan(value), (layer, metric)
    for name in matrices:
        own = [
            n
            for n in delivered.parameters
            if n.startswith(f"{name}.") and (options.get("sites") or "weight" in n)
        ]
        a, b = (torch.cat([g.parameters[n].flatten() for n in own]) for g in (delivered, exact))
        assert rows[name, "gradient_angle"] == pytest.approx(angle(a, b), abs=bounds.ANGLE)
        assert 30 < rows[name, "error_angle"] < 150
    assert 0 < rows[None, "gradient_angle"] < 180


def test_the_error_angle_is_between_what_b_and_what_the_chain_sends():
    model, x = mlp(), draw(3, 4).requires_grad_()
    patch = feedbackhook.patch(model, "DFA")
    seen = {}
    patch.on_error_signal("2", lambda to, arriving: seen.update(to=to, chain=arriving @ model[2].weight))
    loss = probe(model(x))
    rows = measured(patch, loss)
    loss.backward()
    assert rows["2", "error_angle"] == pytest.approx(angle(seen["to"], seen["chain"]), abs=bounds.ANGLE)


@everywhere
def test_watch_records_without_disturbing(options, tmp_path):
    losses = []
    for watched in (False, True):
        model, x = redrawn(Net()), draw(*CNN_INPUT)
        patch = feedbackhook.patch(model, "DFA", **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        recorder = feedbackhook.Recorder(tmp_path / "run")
        if watched:
            patch.watch(1, recorder)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.tensor([0, 3]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        recorder.close()
    assert losses[:3] == losses[3:]
    table = feedbackhook.read(tmp_path / "run")
    values = table[table.metric == "error_angle"].dropna(subset="value")
    assert set(values.layer) == set(matrices_of(patch))
    assert table[table.metric == "weight_angle"].value.isna().all()


def test_a_removed_patch_leaves_no_reference_to_the_model():
    import gc
    import weakref

    model, patch, _ = trained_once(sites="blocks[.].*")
    patch.remove()
    seen = weakref.ref(model)
    del model, patch
    gc.collect()
    assert seen() is None


@everywhere
def test_the_error_at_the_output_is_freed_after_the_backward(options):
    """Also if the graph stays, as the error of a language model is large."""
    model, patch, x = trained_once(**options)
    output = model(x)
    nodes = walk([node for node, _ in output.grad_fn.next_functions])
    (forward,) = {node.delivery.forward for node in nodes if hasattr(node, "delivery")}
    counts = []
    patch.on_error_signal(patch.layers[-1].name, lambda *_: counts.append(len(forward.errors)))
    for _ in range(2):
        probe(output).backward(retain_graph=True)
    assert counts == [1, 1]
    assert forward.errors == {}
