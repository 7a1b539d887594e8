"""`Patch.watch`: what it records is what `measure` gives, and training goes as it would without."""

import copy
import math
from pathlib import Path

import pytest
import torch
from support import bounds
from support.oracle import gradients, probe
from support.problems import draw, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook
from feedbackhook.store.recorder import Recorder, read

WATCHED = {
    "weight_angle",
    "error_angle",
    "sign_agreement",
    "norm_ratio",
    "weight_norm",
    "gradient_norm",
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    optimizer.zero_grad()
    for x in batches:
        probe(model(x)).backward()
    optimizer.step()


def recorded(folder: Path) -> dict[tuple[int, str | None, str], float]:
    table = read(folder).astype({"layer": object})
    layers = [None if layer != layer else layer for layer in table["layer"]]
    assert not table.duplicated(["step", "layer", "metric"]).any()
    return dict(zip(zip(table["step"], layers, table["metric"], strict=True), table["value"], strict=True))


def test_what_is_watched_is_what_measure_gives(tmp_path):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "brSF")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = {}
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(2, recorder)
        for number in range(5):
            if number % 2 == 0:
                for row in feedbackhook.measure(patch, probe(model(x))):
                    if row.metric != "gradient_angle":
                        want[number, row.layer, row.metric] = row.value
            step(model, optimizer, x)
    got = recorded(tmp_path / "run")
    assert {key[0] for key in got} == {0, 2, 4}
    assert {key[2] for key in got} == {*WATCHED, "learning_rate", "expected_weight_angle"}
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key
    depth = read(tmp_path / "run").dropna(subset=["layer"]).groupby("layer")["depth"].unique()
    assert {layer: list(places) for layer, places in depth.items()} == {"0": [0], "2": [1], "4": [2]}


def test_norms_and_the_learning_rate(tmp_path):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    grads = gradients(model, x).parameters
    weight = model[2].weight.detach().norm().item()
    everything = torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item()
    whole = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(1, recorder)
        step(model, optimizer, x)
    got = recorded(tmp_path / "run")
    assert got[0, "2", "weight_norm"] == pytest.approx(weight)
    assert got[0, None, "weight_norm"] == pytest.approx(everything)
    assert got[0, "2", "gradient_norm"] == pytest.approx(grads["2.weight"].norm().item())
    assert got[0, None, "gradient_norm"] == pytest.approx(whole)
    assert got[0, None, "learning_rate"] == 0.25


@torch.no_grad()
def write(weight: Tensor, way: str) -> None:
    """Change a weight in a way that tensors' version counters see, or do not."""
    new = torch.randn_like(weight)
    if way == "in place":
        weight.copy_(new)
    elif way == "through data":
        weight.data.copy_(new)
    elif way == "new data":
        weight.data = new
    else:
        weight.set_(new)


@pytest.mark.parametrize("way", ["in place", "through data", "new data", "set_"])
def test_what_is_recorded_is_of_the_weights_as_they_are_at_the_step(tmp_path, way):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "RndF")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(1, recorder)
        step(model, optimizer, x)
        probe(model(x)).backward()
        write(model[2].weight, way)
        optimizer.step()
    got, w, v = recorded(tmp_path / "run"), model[2].weight.detach(), patch.feedback("2")
    angle = math.degrees(math.acos(float((v * w).sum() / v.norm() / w.norm())))
    assert got[1, "2", "weight_angle"] == pytest.approx(angle, abs=bounds.ANGLE)
    assert got[1, "2", "weight_norm"] == pytest.approx(float(w.norm()), rel=bounds.HALF_OF_FLOAT64)
    assert got[0, "2", "weight_angle"] != pytest.approx(angle, abs=1)


def test_learning_rates_by_layer_where_groups_have_their_own(tmp_path):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(1, recorder)
        step(model, torch.optim.SGD(groups, lr=0.25), x)
    rates = {key[1]: value for key, value in recorded(tmp_path / "run").items() if key[2] == "learning_rate"}
    assert rates == {"0": 0.25, "2": 0.5}


def test_accumulated_backwards_are_one_step_over_all_of_them(tmp_path):
    model, x = mlp(), draw(6, 4)
    patch = feedbackhook.patch(model, "frSF")
    twin = copy.deepcopy(model)
    for net, batches, name in ((model, [x], "whole"), (twin, x.split(2), "parts")):
        with Recorder(tmp_path / name) as recorder:
            feedbackhook.get_patch(net).watch(1, recorder)
            optimizer = torch.optim.SGD(net.parameters(), lr=0)
            optimizer.zero_grad()
            for batch in batches:
                net(batch).sum().backward()
            optimizer.step()
    whole, parts = recorded(tmp_path / "whole"), recorded(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, abs=1e-5, nan_ok=True), key
    assert patch.layers[1].calls == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_watched_as_any_other(tmp_path, reentrant):
    x = draw(3, 4).requires_grad_()
    for name in ("plain", "checkpointed"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(tmp_path / name) as recorder:
            feedbackhook.patch(model, "frSF").watch(1, recorder)
            output = model(x) if name == "plain" else checkpoint(model, x, use_reentrant=reentrant)
            probe(output).backward()
            optimizer.step()
    plain, checkpointed = recorded(tmp_path / "plain"), recorded(tmp_path / "checkpointed")
    assert math.isfinite(plain[0, "0", "error_angle"])
    assert checkpointed == pytest.approx(plain)


def test_the_epoch_is_the_recorders_and_the_step_goes_on(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        watch = feedbackhook.patch(model, "sign").watch(3, recorder, step=7)
        for epoch in (4, 5):
            recorder.epoch = epoch
            for _ in range(2):
                step(model, optimizer, x)
        assert watch.step == 11
    table = read(tmp_path / "run")
    assert set(zip(table["step"], table["epoch"], strict=True)) == {(9, 5)}


def test_two_optimizers_are_one_step_and_each_has_its_rate(tmp_path):
    model, x = mlp(), draw(3, 4)
    rates = {0.1: model[:2], 0.2: model[2:]}
    optimizers = [torch.optim.SGD(part.parameters(), lr=rate) for rate, part in rates.items()]
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        for _ in range(3):
            probe(model(x)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    got = recorded(tmp_path / "run")
    assert {key[0] for key in got} == {0, 1, 2}
    assert all(math.isfinite(got[step, "4", "error_angle"]) for step in range(3))
    assert {(key[1], value) for key, value in got.items() if key[2] == "learning_rate"} == {
        ("0", 0.1),
        ("2", 0.2),
        ("4", 0.2),
    }


def test_an_optimizer_that_takes_the_place_of_another_goes_on(tmp_path):
    model, x = mlp(), draw(3, 4)
    with Recorder(tmp_path / "run") as recorder:
        watch = feedbackhook.patch(model, "sign").watch(1, recorder)
        old = torch.optim.SGD(model.parameters(), lr=0.1)
        new = torch.optim.Adam(model.parameters(), lr=0.01)
        for optimizer in (old, old, new, new):
            step(model, optimizer, x)
        assert watch.step == 4
    assert {key[0] for key in recorded(tmp_path / "run")} == {0, 1, 2, 3}


def test_two_optimizers_with_a_backward_each_are_refused(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:2], model[2:])]
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        for optimizer in optimizers:
            step(model, optimizer, x)
        with pytest.raises(RuntimeError, match="a backward each"):
            step(model, optimizers[0], x)


def test_a_step_with_its_backward_inside_is_refused(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = probe(model(x))
        loss.backward()
        return loss

    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        with pytest.raises(RuntimeError, match="closure"):
            optimizer.step(closure)
        optimizer.step(closure)  # the watch has ended


def test_a_step_inside_the_backward_is_refused(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD([model[4].weight], lr=0.1)
    model[4].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        with pytest.raises(RuntimeError, match="inside the backward"):
            probe(model(x)).backward()


def test_a_backward_that_was_given_up_is_not_counted(tmp_path):
    """As where a GradScaler finds an infinite gradient and skips the step."""
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    want = {
        row.layer: row.value
        for row in feedbackhook.measure(patch, probe(model(x)))
        if row.metric == "error_angle"
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(1, recorder)
        for factor in (math.inf, 100.0):
            (probe(model(x.flip(0))) * factor).backward()
            optimizer.zero_grad()
        step(model, optimizer, x)
    got = recorded(tmp_path / "run")
    for layer, value in want.items():
        assert got[0, layer, "error_angle"] == pytest.approx(value, nan_ok=True)


def test_norms_of_half_precision_do_not_overflow(tmp_path):
    model, x = mlp().half(), draw(3, 4).half()
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        model(x).sum().backward()
        for parameter in model.parameters():
            parameter.grad.fill_(30000)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert recorded(tmp_path / "run")[0, "4", "gradient_norm"] == pytest.approx(30000 * 15**0.5, rel=1e-3)


def test_gradients_that_the_optimizer_unscales_are_unscaled(tmp_path):
    """As GradScaler leaves it to a fused optimizer."""
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        probe(model(x)).backward()
        want = model[4].weight.grad.norm().item()
        for parameter in model.parameters():
            parameter.grad *= 512
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(0.0)
        optimizer.step()
    assert recorded(tmp_path / "run")[0, "4", "gradient_norm"] == pytest.approx(want)


def test_an_optimizer_without_a_rate_has_none(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        watch = feedbackhook.patch(model, "sign").watch(1, recorder)
        probe(model(x)).backward()
        optimizer.param_groups[0]["lr"] = None  # as Adafactor's is, which finds its own
        watch.before_step(optimizer)
    assert math.isnan(recorded(tmp_path / "run")[0, None, "learning_rate"])


def test_rows_reach_the_disk_when_the_interval_is_over_though_no_step_is_watched(tmp_path, monkeypatch):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    now = 0.0
    monkeypatch.setattr("feedbackhook.store.recorder.time.monotonic", lambda: now)
    with Recorder(tmp_path / "run", interval=10) as recorder:
        feedbackhook.patch(model, "sign").watch(1000, recorder)
        step(model, optimizer, x)
        now = 11.0
        step(model, optimizer, x)
        assert recorded(tmp_path / "run").keys() >= {(0, "4", "error_angle"), (0, None, "learning_rate")}


def test_a_removed_patch_cannot_be_watched(tmp_path):
    patch = feedbackhook.patch(mlp(), "sign")
    patch.remove()
    with Recorder(tmp_path / "run") as recorder, pytest.raises(RuntimeError, match="removed"):
        patch.watch(1, recorder)


def test_an_optimizer_that_holds_no_patched_weight_is_no_step(tmp_path):
    model, other, x = mlp(), nn.Linear(4, 3).double(), draw(3, 4)
    with Recorder(tmp_path / "run") as recorder:
        watch = feedbackhook.patch(model, "sign").watch(1, recorder)
        step(other, torch.optim.SGD(other.parameters(), lr=0.1), x)
        assert watch.step == 0


@pytest.mark.parametrize("ending", ["watch.remove", "patch.remove"])
def test_a_removed_watch_records_nothing_and_costs_nothing(tmp_path, ending):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        watch = patch.watch(1, recorder)
        step(model, optimizer, x)
        (watch if ending == "watch.remove" else patch).remove()
        watch.remove()
        step(model, optimizer, x)
        assert not patch.state.error_listeners
        assert watch not in patch.state.step_listeners.values()
    assert {key[0] for key in recorded(tmp_path / "run")} == {0}


@pytest.mark.parametrize("copied", [False, True], ids=["the model", "a copy that has run no forward"])
def test_a_step_redraws_before_the_watch_is_told(tmp_path, copied):
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "brSF")
    model = copy.deepcopy(model) if copied else model
    patch, told = feedbackhook.get_patch(model), []
    with Recorder(tmp_path / "run") as recorder:
        watch = patch.watch(1, recorder)
        after_step, before = watch.after_step, patch.feedback("2")
        watch.after_step = lambda optimizer: (told.append(patch.feedback("2")), after_step(optimizer))
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert not torch.equal(told[0].abs(), before.abs())


def test_a_copy_of_a_watched_model_is_not_watched(tmp_path):
    model, x = mlp(), draw(3, 4)
    with Recorder(tmp_path / "run") as recorder:
        watch = feedbackhook.patch(model, "sign").watch(1, recorder)
        twin = copy.deepcopy(model)
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x)
        assert watch.step == 0
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "run")


def losses(folder: Path, watched: bool, mode: str) -> list[float]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(6, 3)
    )
    patch = feedbackhook.patch(model, mode)
    optimizer = feedbackhook.BatchManhattan(model.parameters(), lr=0.01)
    values = []
    with Recorder(folder) as recorder:
        if watched:
            patch.watch(2, recorder, per_sample=True)
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = probe(model(torch.randn(5, 4)).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    return values


@pytest.mark.parametrize("mode", ["brSF", "RndF"])
def test_watching_changes_nothing(tmp_path, mode):
    assert losses(tmp_path / "a", True, mode) == losses(tmp_path / "b", False, mode)
    assert {"error_angle_per_sample", "error_angle_samples"} < {key[2] for key in recorded(tmp_path / "a")}


def test_measuring_inside_a_watched_step_disturbs_neither(tmp_path):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path / "run") as recorder:
        patch.watch(1, recorder)
        for measured in (False, True):
            optimizer.zero_grad()
            loss = probe(model(x))
            if measured:
                feedbackhook.measure(patch, loss)
            loss.backward()
            optimizer.step()
    got = recorded(tmp_path / "run")
    for (_, layer, metric), value in got.items():
        assert got[0, layer, metric] == pytest.approx(value, nan_ok=True)


def test_a_step_without_finite_gradients_is_recorded_as_not_a_number(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        (probe(model(x)) * math.nan).backward()
        optimizer.step()
    got = recorded(tmp_path / "run")
    assert math.isnan(got[0, "4", "error_angle"])
    assert math.isnan(got[0, None, "gradient_norm"])


def test_compiled_code_shows_nothing_and_that_is_an_error(tmp_path):
    model, x = mlp(), draw(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run") as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        compiled = torch.compile(model, backend="aot_eager")
        with pytest.raises(RuntimeError, match="compiled code shows none"):
            step(compiled, optimizer, x)
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"every": 2, "step": -1}], ids=str)
def test_options_out_of_range(tmp_path, options):
    patch = feedbackhook.patch(mlp(), "sign")
    with Recorder(tmp_path / "run") as recorder, pytest.raises(ValueError, match="must be an integer"):
        patch.watch(recorder=recorder, **options)


def test_a_watched_model_can_be_garbage(tmp_path):
    import gc
    import weakref

    with Recorder(tmp_path / "run") as recorder:
        model = mlp()
        feedbackhook.patch(model, "sign").watch(1, recorder)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
