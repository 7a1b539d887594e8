"""The recipes for other trainers: each trainer's weights after a few steps are those of a plain loop with the
same patch on the same batches, whose gradients are the oracle's and not backprop's.

Run by torchrun, the same file is a rank of the test of two processes.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bounds import HALF_OF_FLOAT32, HALF_OF_FLOAT64, HANG, ROUNDING
from oracle import FLOOR, TOLERANCE, UNLIKE, swapped_saved_tensors
from problems import draw, redrawn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import feedbackhook

RECIPES = Path(__file__).parents[1] / "recipes" / "retrofit" / "trainers"
EXTRA = "pip install 'feedbackhook[trainers]'"
SIGN: dict[str, Any] = {"mode": "sign", "concordance": 0.75}
BRSF: dict[str, Any] = {"mode": "brSF", "concordance": 0.75}
RULES = {"sign": SIGN, "brSF": BRSF}
Tensors = dict[str, Tensor]


def load(name: str) -> ModuleType:
    """A recipe as a module, with its folder on the path as when it is run."""
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where jsonargparse looks for the names in annotations
    spec.loader.exec_module(module)
    return module


# --- the plain loop, and the oracle behind it ------------------------------------------------------------


def weights_of(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradients_of(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: Tensors, b: Tensors) -> float:
    """The largest relative distance between tensors of one name."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    largest = max(x.double().norm().item() for x in b.values())
    differences = {
        name: (a[name].double() - b[name].double()).norm().item()
        / max(b[name].double().norm().item(), FLOOR * largest)
        for name in b
    }
    return max(differences.values())


def unpatched(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    if feedbackhook.get_patch(twin) is not None:
        feedbackhook.unpatch(twin)
    return twin


Loss = Callable[[nn.Module, Any], Tensor]


def oracle_gradients(model: nn.Module, patch: feedbackhook.Patch, loss_of: Loss, batch: Any) -> Tensors:
    """Those of the saved-tensor swap, on a copy without a patch, with today's V of each layer that has an
    upstream; every one of these is found."""
    twin = unpatched(model)
    feedback = {row.name: patch.feedback(row.name) for row in patch.layers if row.upstream}
    assert feedback, "no layer has an upstream"
    twin.zero_grad()
    with swapped_saved_tensors(twin, feedback) as swaps:
        loss_of(twin, batch).backward()
    assert set(swaps) == set(feedback), f"never saved: {sorted(set(feedback) - set(swaps))}"
    return gradients_of(twin)


def backprop_gradients(model: nn.Module, loss_of: Loss, batch: Any) -> Tensors:
    twin = unpatched(model)
    twin.zero_grad()
    loss_of(twin, batch).backward()
    return gradients_of(twin)


def plain_loop(
    model: nn.Module,
    feedback: dict[str, Any] | None,
    batches: Iterable[Any],
    loss_of: Loss,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    tolerance: float | None = TOLERANCE,
) -> Tensors:
    """The weights after a step on each batch, in a loop of our own; without `feedback` by plain backprop.

    Every gradient is the oracle's to within `tolerance` and not backprop's; None leaves that out, for a model
    that is tested so elsewhere.
    """
    patch = None if feedback is None else feedbackhook.patch(model, **feedback)
    stepper = optimizer([p for p in model.parameters() if p.requires_grad])
    for batch in batches:
        stepper.zero_grad()
        loss_of(model, batch).backward()
        if patch is not None and tolerance is not None:
            got = gradients_of(model)
            assert distance(got, oracle_gradients(model, patch, loss_of, batch)) <= tolerance
            assert distance(got, backprop_gradients(model, loss_of, batch)) > UNLIKE
        stepper.step()
    return weights_of(model)


def sgd(parameters: list[nn.Parameter], lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def images(count: int, seed: int = 0) -> TensorDataset:
    """Noise of the digits' shape, in float64, and labels."""
    return TensorDataset(draw(count, 1, 8, 8, seed=seed), torch.arange(count) % 10)


def cross_entropy(model: nn.Module, batch: Iterable[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


# --- options ---------------------------------------------------------------------------------------------

NEEDS = {
    "lightning_trainer": ["lightning"],
    "hf_trainer": ["transformers", "accelerate"],
    "lora": ["peft"],
    "distributed": [],
    "timm_script": [],
}


def skip_without(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package}: {EXTRA}")


def options(main: Callable[..., None], file: Path, *given: str) -> dict[str, Any]:
    """What `main` would be called with."""

    @functools.wraps(main)
    def spy(**arguments: Any) -> dict[str, Any]:
        return arguments

    files = [str(file)]
    found = jsonargparse.auto_cli(spy, args=list(given), as_positional=False, default_config_files=files)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", NEEDS)
def test_the_yaml_beside_a_recipe_has_its_settings_and_options_override_them(name):
    skip_without(name)
    recipe, file = load(name), RECIPES / f"{name}.yaml"
    more = ["--script", "train.py"] if name == "timm_script" else []
    assert options(recipe.main, file, *more)["feedback"] == SIGN
    other = options(recipe.main, file, *more, "--feedback.mode", "brSF", "--smoke", "true")
    assert other["feedback"] == BRSF
    assert other["smoke"] is True


@pytest.mark.parametrize(("name", "package"), [(name, each[0]) for name, each in NEEDS.items() if each])
def test_a_missing_package_is_named_with_the_way_out(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*\.\[trainers\]"):
        load(name)


# --- Lightning -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    skip_without("lightning_trainer")
    return load("lightning_trainer")


def fit(lightning: ModuleType, model: Any, data: TensorDataset, epochs: int = 1, **options: Any) -> Any:
    """Lightning's Trainer in float64, on batches of 8 in their order."""
    trainer = lightning.L.Trainer(
        max_epochs=epochs,
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=8), **options)
    assert trainer.global_step == epochs * len(data) // 8
    return trainer


@pytest.mark.parametrize("rule", RULES)
def test_lightning_trains_as_a_plain_loop_does(lightning, rule):
    model = lightning.Classifier(RULES[rule], lr=0.1)
    start = copy.deepcopy(unpatched(model)).double()
    fit(lightning, model, images(24))
    batches = list(DataLoader(images(24), batch_size=8))
    got = weights_of(model)
    patched = copy.deepcopy(start)
    loop = functools.partial(plain_loop, batches=batches, optimizer=sgd)
    want = loop(patched, RULES[rule], loss_of=lambda m, batch: cross_entropy(m.net, batch))
    exact = loop(copy.deepcopy(start), None, loss_of=lambda m, batch: cross_entropy(m.net, batch))
    assert distance(got, want) <= TOLERANCE
    assert distance(got, exact) > UNLIKE
    assert [row.rerouted for row in model.patch.layers] == [0, 3, 3, 3]
    assert {row["draws"] for row in model.patch.state_dict()["layers"].values()} == {3 * (rule == "brSF")}


def test_lightning_goes_on_from_a_checkpoint_with_the_same_v(lightning, tmp_path):
    start = lightning.Classifier(BRSF, lr=0.1).double()  # Lightning loads before it converts
    whole, first, second, forgetful = (copy.deepcopy(start) for _ in range(4))
    two = images(16)  # batches
    fit(lightning, whole, two, epochs=2)
    fit(lightning, first, two).save_checkpoint(tmp_path / "last.ckpt")
    fit(lightning, second, two, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert distance(weights_of(second), weights_of(whole)) <= TOLERANCE
    assert second.patch.state_dict() == whole.patch.state_dict()
    assert whole.patch.state_dict()["layers"]["net.2"]["draws"] == 4

    forgetful.on_load_checkpoint = lambda checkpoint: None  # without the hook V is another
    fit(lightning, forgetful, two, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert distance(weights_of(forgetful), weights_of(whole)) > UNLIKE

    again = lightning.Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.patch.state_dict() == first.patch.state_dict()


def test_lightnings_configure_model_holds_the_line_as_well(lightning):
    class Late(lightning.L.LightningModule):
        configured = 0

        def configure_model(self):
            self.configured += 1
            if feedbackhook.get_patch(self) is None:
                self.net = copy.deepcopy(net)
                self.patch = feedbackhook.patch(self, **SIGN)

        def training_step(self, batch, index):
            loss = cross_entropy(self.net, batch)
            self.rows = feedbackhook.measure(self.patch, loss)
            return loss

        def test_step(self, batch, index):
            cross_entropy(self.net, batch)

        def configure_optimizers(self):
            return sgd(list(self.parameters()))

    net = unpatched(lightning.Classifier().net).double()
    model, wanted = Late(), Late()
    trainer = fit(lightning, model, images(16))
    trainer.test(model, DataLoader(images(16), batch_size=8), verbose=False)
    assert model.configured > 1
    wanted.net = copy.deepcopy(net)
    want = plain_loop(
        wanted,
        SIGN,
        DataLoader(images(16), batch_size=8),
        lambda m, batch: cross_entropy(m.net, batch),
        sgd,
        tolerance=None,
    )
    assert distance(weights_of(model), want) <= TOLERANCE
    angles = [row.value for row in model.rows if row.metric == "gradient_angle" and row.layer == "net.2"]
    assert 1 < angles[0] < 179


def test_watching_lightnings_closure_is_an_error_that_names_the_way_out(lightning, tmp_path):
    model = lightning.Classifier(SIGN)
    with feedbackhook.Recorder(tmp_path) as recorder:
        model.patch.watch(1, recorder)
        with pytest.raises(RuntimeError, match=r"measure\(patch, loss\)"):
            fit(lightning, model, images(8))


def test_the_lightning_recipe_runs(lightning, tmp_path, capsys):
    lightning.main(SIGN, output=tmp_path, smoke=True)
    out = capsys.readouterr().out
    assert_told(out, ["net.0", "net.2", "net.5", "net.7"], rerouted=5)
    lightning.main(SIGN, output=tmp_path, epochs=2, resume=tmp_path / "last.ckpt", smoke=False)
    assert_told(capsys.readouterr().out, ["net.7"], rerouted=29)


def assert_told(out: str, layers: Iterable[str], rerouted: int) -> None:
    """The layers, how often they were called and rerouted, their angle, and the loss are told."""
    rows = {line.split()[0]: line.split()[2:] for line in out.splitlines() if len(line.split()) > 4}
    for name in layers:
        calls, *through, angle = rows[name]
        assert calls == str(rerouted)
        assert through in ([calls], ["no", "upstream"])
        assert 1 < float(angle) < 120
    assert "training loss: " in out


# --- Hugging Face ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    skip_without("hf_trainer")
    return load("hf_trainer")


HF_OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", HF_OPTIONS)
def test_the_trainer_of_transformers_trains_as_a_plain_loop_does(hf, case, tmp_path):
    steps, size = 2, 4
    given = HF_OPTIONS[case]
    accumulated = given.get("gradient_accumulation_steps", 1)
    seen: list[dict[str, Tensor]] = []

    def collate(items):
        seen.append({key: torch.stack([item[key] for item in items]) for key in items[0]})
        return seen[-1]

    def mean(outputs, labels, num_items_in_batch=None):  # over all batches of a step
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / (size * accumulated)

    start = hf.tiny_bert()
    if case != "bf16":  # autocast leaves float64 as it is
        start.double()
    model = copy.deepcopy(start)
    patch = feedbackhook.patch(model, **BRSF)
    hf.Trainer(
        model=model,
        args=hf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=size,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **given,
        ),
        train_dataset=hf.digits()[: size * steps * accumulated],
        data_collator=collate,
        compute_loss_func=mean,
    ).train()

    def loss_of(m, batches, bf16=case == "bf16"):
        cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with cast:
            words = torch.cat([batch["input_ids"] for batch in batches])
            return F.cross_entropy(m(input_ids=words).logits, torch.cat([b["labels"] for b in batches]))

    batches = [seen[i : i + accumulated] for i in range(0, steps * accumulated, accumulated)]
    assert len({batch["input_ids"].sum().item() for batch in seen}) == steps * accumulated
    loop = functools.partial(plain_loop, batches=batches, loss_of=loss_of)
    checked = TOLERANCE if case == "as it is" else None  # the oracle does not see bfloat16's copies of W
    plain_sgd = functools.partial(sgd, momentum=0.0)
    want = loop(copy.deepcopy(start), BRSF, optimizer=plain_sgd, tolerance=checked)
    exact = loop(copy.deepcopy(start), None, optimizer=plain_sgd)
    close = TOLERANCE
    if case == "bf16":  # both round to bfloat16 alike and sum in float32; without autocast it would show
        close = HALF_OF_FLOAT32
        uncast = functools.partial(loss_of, bf16=False)
        other = loop(copy.deepcopy(start), BRSF, loss_of=uncast, optimizer=plain_sgd)
        assert distance(moved(model, start), moved(other, start)) > close
    assert distance(moved(model, start), moved(want, start)) <= close
    assert distance(moved(model, start), moved(exact, start)) > 0.1
    assert all(row.rerouted == steps * accumulated for row in patch.layers)


def moved(end: nn.Module | Tensors, start: nn.Module) -> Tensors:
    """How far each weight has come."""
    ends = weights_of(end) if isinstance(end, nn.Module) else end
    return {name: ends[name] - p.detach() for name, p in start.named_parameters()}


def test_the_recipe_for_transformers_runs_and_goes_on_with_the_same_v(hf, tmp_path, capsys):
    hf.main(BRSF, output=tmp_path / "a", smoke=True)
    out = capsys.readouterr().out
    assert_told(out, ["bert.encoder.layer.0.attention.self.query", "classifier"], rerouted=3)
    first = tmp_path / "a" / "checkpoint-2"
    state = torch.load(first / "feedback.pt", weights_only=True)
    assert {row["draws"] for row in state["layers"].values()} == {2}

    def end(output, resume):
        hf.main(BRSF, output=output, resume=resume, smoke=True)
        return hf.BertForSequenceClassification.from_pretrained(output / "checkpoint-3")

    whole = hf.BertForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-3")
    start = hf.BertForSequenceClassification.from_pretrained(first)
    again = end(tmp_path / "b", first)
    assert_told(capsys.readouterr().out, ["classifier"], rerouted=1)
    assert distance(moved(again, start), moved(whole, start)) <= HALF_OF_FLOAT32
    for row in state["layers"].values():  # with another V it would not be the same
        row["draws"] = 0
    torch.save(state, first / "feedback.pt")
    assert distance(moved(end(tmp_path / "c", first), start), moved(whole, start)) > 0.01


# --- low-rank adapters -----------------------------------------------------------------------------------


PARTS = ("base_layer", "lora_A.default", "lora_B.default")


@pytest.fixture(scope="module")
def lora() -> ModuleType:
    skip_without("lora")
    return load("lora")


def test_adapters_learn_as_the_oracle_says(lora):
    start = redrawn(lora.adapted(lora.tiny_vit(), rank=2))
    data, lr = images(12), 1e-2
    model = copy.deepcopy(start)
    patch = feedbackhook.patch(model, **SIGN)
    torch.manual_seed(1)
    lora.train(model, *data.tensors, epochs=1, batch_size=6, lr=lr)
    torch.manual_seed(1)
    batches = list(DataLoader(data, batch_size=6, shuffle=True))
    loop = functools.partial(plain_loop, batches=batches, loss_of=cross_entropy)
    adamw = functools.partial(torch.optim.AdamW, lr=lr)
    want, exact = (loop(copy.deepcopy(start), rule, optimizer=adamw) for rule in (SIGN, None))
    assert distance(moved(model, start), moved(want, start)) <= TOLERANCE
    assert distance(moved(model, start), moved(exact, start)) > 0.1
    still = {name for name, way in moved(model, start).items() if not way.any()}
    assert {name for name in still if "lora_" in name} == set()
    assert all("lora_" in name for name in set(moved(model, start)) - still)
    rerouted = {row.name: row.rerouted for row in patch.layers}
    for part in PARTS:
        assert rerouted[f"base_model.model.blocks.1.mlp.fc1.{part}"] == 2


def adapted_linear(lora: ModuleType) -> tuple[nn.Module, nn.Linear, Tensor, Tensor, float]:
    """An adapted model of one layer, its base layer, A and B, and s."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), config).double()
    layer = model.base_model.model[0]
    return model, layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight, 6 / 2


def test_what_v_is_for_a_layer_and_its_adapter(lora):
    model, base, _, b, s = adapted_linear(lora)
    with torch.no_grad():
        b.copy_(draw(5, 2))
    patch = feedbackhook.patch(model, **SIGN)
    x, delta = draw(3, 4, seed=1).requires_grad_(), draw(3, 5, seed=2)
    model(x).backward(delta)
    of_base, of_a, of_b = (patch.feedback(f"base_model.model.0.{part}") for part in PARTS)
    # Sums of two, four and five products: fewer than 16 roundings, of numbers that may cancel.
    size = delta.abs() @ (of_base.abs() + s * of_b.abs() @ of_a.abs())
    apart = (x.grad - delta @ (of_base + s * of_b @ of_a)).abs()
    assert (apart <= 2 * 16 * ROUNDING["float64"] * size).all()
    assert (x.grad - delta @ base.weight).norm() > 0.1


@pytest.mark.parametrize(("rule", "learns"), [(SIGN, False), ({"mode": "RndF"}, True)], ids=["sign", "RndF"])
def test_while_b_is_zero_a_learns_only_where_v_does_not_follow_its_signs(lora, rule, learns):
    model, _, a, b, _ = adapted_linear(lora)
    assert not b.any()
    feedbackhook.patch(model, **rule)
    model(draw(3, 4)).backward(draw(3, 5, seed=2))
    assert a.grad.any() == learns
    assert b.grad.any()


def test_patching_before_the_adapters_leaves_them_exact(lora):
    torch.manual_seed(3)
    plain = redrawn(lora.tiny_vit())
    gradients = {}
    for order in ("before", "after, without the adapters", "after"):
        model = copy.deepcopy(plain)
        if order == "before":
            feedbackhook.patch(model, "uSF")
        model = lora.adapted(model, rank=2).double()
        with torch.no_grad():
            for number, (name, value) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    value.copy_(draw(*value.shape, seed=number))
        if order == "after":
            feedbackhook.patch(model, "uSF")
        elif order != "before":
            feedbackhook.patch(model, "uSF", exclude=r".*lora_.*")
        cross_entropy(model, images(4)[:]).backward()
        gradients[order] = gradients_of(model)
    assert distance(gradients["before"], gradients["after, without the adapters"]) <= TOLERANCE
    assert distance(gradients["before"], gradients["after"]) > UNLIKE


def test_the_recipe_for_adapters_runs(lora, capsys):
    lora.main(SIGN, smoke=True)
    out = capsys.readouterr().out
    assert_told(out, [f"base_model.model.blocks.1.attn.qkv.{part}" for part in PARTS], rerouted=4)
    assert "base, by backprop: 2." in out


# --- several processes -----------------------------------------------------------------------------------

WORLD = 2
STRATEGIES = ("ddp", "fsdp2")


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_train_as_a_plain_loop_does():
    out = torchrun(__file__)
    passed = [line for line in out.splitlines() if line.startswith("passed ")]
    assert passed == [f"passed {strategy} {rule}" for strategy in STRATEGIES for rule in RULES]
    told = out.split("the recipe itself:")
    assert len(told) == 1 + len(STRATEGIES)
    for table in told[1:]:
        assert_told(table, ["conv1", "conv2", "hidden", "last"], rerouted=4)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_runs_the_recipe(strategy):
    done = torchrun(RECIPES / "distributed.py", "--strategy", strategy, "--smoke", "true")
    assert_told(done, ["conv1", "conv2", "hidden", "last"], rerouted=4)


def torchrun(*command: Path | str) -> str:
    """What two processes of the script print."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *map(str, command)], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_torchrun_the_recipe_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        load("distributed").main(smoke=True)


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_rank() -> None:
    """What each process of the two-process test does."""
    torch.set_num_threads(1)
    recipe = load("distributed")
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    data = images(48)
    loaders = [
        DataLoader(data, batch_size=8, sampler=DistributedSampler(data, WORLD, rank, drop_last=True))
        for rank in range(WORLD)
    ]
    halves = zip(*loaders, strict=True)
    whole = [[torch.cat(parts) for parts in zip(*of_ranks, strict=True)] for of_ranks in halves]
    assert len(whole) == 3
    for strategy in STRATEGIES:
        for name, rule in RULES.items():
            start = redrawn(recipe.CNN())
            model = copy.deepcopy(start)
            patch = feedbackhook.patch(model, **rule)
            cpu = torch.device("cpu")
            losses = recipe.train(recipe.wrapped(model, strategy, cpu), data, 1, 8, 0.1, cpu)
            got = {key: gathered(value) for key, value in weights_of(model).items()}
            want = plain_loop(copy.deepcopy(start), rule, whole, cross_entropy, sgd)
            exact = plain_loop(copy.deepcopy(start), None, whole, cross_entropy, sgd)
            assert distance(moved(got, start), moved(want, start)) <= TOLERANCE
            assert distance(moved(got, start), moved(exact, start)) > 0.1
            assert abs(losses[0] - cross_entropy(start, whole[0]).item()) < TOLERANCE
            assert [row.rerouted for row in patch.layers] == [0, 3, 3, 3]
            if dist.get_rank() == 0:
                print(f"passed {strategy} {name}", flush=True)
    # One group is enough: that of another begun at once may meet what the first has left in torchrun's store.
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    for strategy in STRATEGIES:
        if dist.get_rank() == 0:
            print("the recipe itself:", flush=True)
        recipe.main(strategy, SIGN, smoke=True)


# --- timm's training script ------------------------------------------------------------------------------


@pytest.fixture
def timm_script() -> ModuleType:
    return load("timm_script")


STAND_IN = """
import argparse
import os
from contextlib import nullcontext

import torch
from timm.models import create_model
from timm.task import ClassificationTask
from timm.utils import update_summary

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--out", "--output", "--experiment", "--torchcompile"):
    parser.add_argument(name)
for name in ("--amp", "--grad-checkpointing", "--model-ema"):
    parser.add_argument(name, action="store_true")
args, _ = parser.parse_known_args()

torch.manual_seed(0)
model = create_model("test_vit", img_size=32, depth=2, num_classes=10)
if args.grad_checkpointing:
    model.set_grad_checkpointing(enable=True)
if not args.amp:
    model.double()
start = {name: value.clone() for name, value in model.state_dict().items()}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
teacher = create_model("test_vit", img_size=32, depth=2, num_classes=10)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
if args.model_ema:
    task.setup_ema(decay=0.5)
if args.torchcompile:
    task.compile(backend=args.torchcompile)

batches, losses = [], []
for _ in range(2):
    x = torch.randn(4, 3, 32, 32, dtype=torch.float32 if args.amp else torch.float64)
    y = torch.randint(10, (4,))
    batches.append((x, y))
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
        loss = task(x, y)["loss"]
    loss.backward()
    optimizer.step()
    task.update_ema()
    losses.append(loss.item())

if args.out:
    out = {"start": start, "batches": batches, "end": model.state_dict()}
    torch.save({**out, "gradients": {name: p.grad for name, p in model.named_parameters()}}, args.out)
if args.output:
    os.makedirs(f"{args.output}/{args.experiment}", exist_ok=True)
    for epoch, loss in enumerate(losses):
        file = f"{args.output}/{args.experiment}/summary.csv"
        update_summary(epoch, {"loss": loss}, {}, filename=file, write_header=epoch == 0)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A script that does what timm's does around a model, for two steps."""
    pytest.importorskip("timm.task", reason="this version of timm has no timm.task")
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    return file


SCRIPT_OPTIONS = {
    "as it is": [],
    "amp": ["--amp"],
    "checkpointing and ema": ["--grad-checkpointing", "--model-ema"],
}
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [*SCRIPT_OPTIONS, COMPILED])
def test_a_script_that_calls_create_model_trains_as_a_plain_loop_does(timm_script, stand_in, case, tmp_path):
    import timm

    arguments = SCRIPT_OPTIONS.get(case, ["--torchcompile", "aot_eager"])
    argv, path = list(sys.argv), list(sys.path)
    makers = timm.create_model, timm.models.create_model
    patch = timm_script.run(stand_in, [*arguments, "--out", str(tmp_path / "out.pt")], SIGN)
    assert (timm.create_model, timm.models.create_model) == makers
    assert (sys.argv, sys.path) == (argv, path)
    out = torch.load(tmp_path / "out.pt", weights_only=True)

    start = timm.create_model("test_vit", img_size=32, depth=2, num_classes=10)
    if case != "amp":
        start.double()
    start.load_state_dict(out["start"])

    def loss_of(m, batch):
        with torch.autocast("cpu", torch.bfloat16) if case == "amp" else nullcontext():
            return cross_entropy(m, batch)

    loop = functools.partial(plain_loop, batches=out["batches"], loss_of=loss_of, optimizer=sgd)
    model = copy.deepcopy(start)
    want = loop(model, SIGN, tolerance=TOLERANCE if case == "as it is" else None)
    exact = loop(copy.deepcopy(start), None)
    # Under amp sums are in float32. Compiled code adds in an order of its own.
    close = {"amp": HALF_OF_FLOAT32, "compiled": HALF_OF_FLOAT64}.get(case, TOLERANCE)
    assert distance(moved(out["end"], start), moved(want, start)) <= close
    assert distance(out["gradients"], gradients_of(model)) <= close
    assert distance(moved(out["end"], start), moved(exact, start)) > 0.1
    counted = {row.rerouted for row in patch.layers if row.name != "patch_embed.proj"}
    assert counted == ({0} if case == "compiled" else {2})


def test_the_recipe_runs_a_script_on_the_digits(timm_script, stand_in, tmp_path, capsys):
    timm_script.main(stand_in, feedback=SIGN, output=tmp_path / "run", smoke=True)
    assert_told(capsys.readouterr().out, ["blocks.0.attn.qkv", "head"], rerouted=2)
    for split, count in {"train": 80, "validation": 20}.items():
        assert len(list((tmp_path / "run" / "digits" / split).glob("*/*.png"))) == count
    timm_script.main(stand_in, feedback=SIGN, output=tmp_path / "run")  # its rows are below the first run's
    assert "training loss: 2." in capsys.readouterr().out


@pytest.mark.slow
def test_of_compiled_code_the_recipe_says_that_it_counts_nothing(timm_script, stand_in, tmp_path, capsys):
    timm_script.main(stand_in, ["--torchcompile", "aot_eager"], SIGN, output=tmp_path / "run")
    assert "no call was counted" in capsys.readouterr().out


def test_options_of_the_script_stand_behind_two_dashes(timm_script, monkeypatch):
    called = []

    @functools.wraps(timm_script.main)
    def spy(**arguments: Any) -> None:
        called.append(arguments)

    monkeypatch.setattr(timm_script, "main", spy)
    passed = ["data", "--model", "x", "--scale", "0.1", "1"]
    timm_script.cli(["--script", "a.py", "--feedback.mode", "brSF", "--", *passed])
    timm_script.cli(["--script", "a.py"])
    assert called[0]["arguments"] == passed
    assert called[0]["feedback"] == BRSF
    assert called[1]["arguments"] is None


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "there is no file"),
        ("", [], r"made no model by timm\.create_model"),
        ("", ["--torchscript"], "cannot be patched"),
    ],
    ids=["no script", "no model", "torchscript"],
)
def test_what_the_recipe_cannot_run_is_said(timm_script, tmp_path, text, arguments, message):
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    with pytest.raises(SystemExit, match=message):
        timm_script.run(script, arguments, SIGN)


def test_a_script_that_fails_leaves_create_model_as_it_was(timm_script, tmp_path):
    import timm

    before, script = timm.models.create_model, tmp_path / "script.py"
    script.write_text("raise KeyError('its own')")
    with pytest.raises(KeyError, match="its own"):
        timm_script.run(script, [], SIGN)
    assert timm.models.create_model is timm.create_model is before


TIMM_TRAIN = os.environ.get("FEEDBACKHOOK_TIMM_TRAIN")
REAL_OPTIONS = {
    "as it is": [],
    "amp": ["--amp", "--amp-dtype", "bfloat16"],
    "checkpointing and ema": ["--grad-checkpointing", "--model-ema"],
    "accumulation": ["--grad-accum-steps", "2"],
    "channels last": ["--channels-last"],
    "compiled": ["--torchcompile", "aot_eager"],
}


@pytest.mark.skipif(TIMM_TRAIN is None, reason="FEEDBACKHOOK_TIMM_TRAIN is not the path of timm's train.py")
@pytest.mark.parametrize("model_name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("case", REAL_OPTIONS)
def test_timms_own_script_trains_as_a_plain_loop_does(timm_script, case, model_name, tmp_path, monkeypatch):
    import timm
    from timm.data.loader import PrefetchLoader

    given, make = REAL_OPTIONS[case], timm.create_model
    if not torch.cuda.is_available():  # scripts of 2023 call it in their validation on CPUs, too
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    starts, seen, pull = [], {}, PrefetchLoader.__iter__

    def create_model(*args, **kwargs):
        model = make(*args, **kwargs)
        starts.append(copy.deepcopy(model))
        return model

    def batches_of(loader):
        for batch in pull(loader):
            seen.setdefault(id(loader), []).append([part.clone() for part in batch])
            yield batch

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(timm.models, "create_model", create_model)
    monkeypatch.setattr(PrefetchLoader, "__iter__", batches_of)
    plain = {"model": model_name, "opt": "momentum", "lr": 0.1, "weight-decay": 0, "smoothing": 0}
    arguments = [f"--{name}={value}" for name, value in plain.items()]
    output = tmp_path / "run"
    timm_script.main(Path(str(TIMM_TRAIN)), [*arguments, "--no-aug", *given], SIGN, output=output, smoke=True)
    (start,) = starts
    batches = next(iter(seen.values()))  # the first loader is that of the training set
    assert len(batches) == 5
    accumulated = 2 if case == "accumulation" else 1
    if case == "channels last":
        start.to(memory_format=torch.channels_last)
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    if case == "checkpointing and ema":
        start.set_grad_checkpointing(True)

    def loss_of(m, group):
        with torch.autocast("cpu", torch.bfloat16) if case == "amp" else nullcontext():
            return sum(cross_entropy(m, batch) for batch in group) / len(group)

    groups = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    loop = functools.partial(plain_loop, loss_of=loss_of, optimizer=sgd, tolerance=None)
    start.train()
    want, exact = (loop(copy.deepcopy(start), rule, groups) for rule in (SIGN, None))
    saved = torch.load(output / "last.pth.tar", weights_only=False)["state_dict"]
    saved = {name.removeprefix("_orig_mod."): value for name, value in saved.items()}
    got, want, exact = (moved(end, start) for end in (saved, want, exact))
    assert distance(got, want) <= HALF_OF_FLOAT32
    assert distance(got, exact) > 0.1
    if case == "as it is":  # and the plain loop is the oracle's
        double = [[(x.double(), y) for x, y in groups[0]]]
        plain_loop(copy.deepcopy(start).double(), SIGN, double, loss_of, sgd)


if __name__ == "__main__":
    one_rank()
    # Gloo's threads may still hold a collective's tensors while the interpreter is torn down, and then the
    # process aborts at times, with plain torch.distributed too (pytorch/pytorch#179291). Nothing is left.
    sys.stdout.flush()
    os._exit(0)
