"""`protocol.compile`: training steps run compiled code, and the run is otherwise what it would be.

Most tests compile by Dynamo and AOTAutograd alone, in about a second; one run is compiled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from support import bounds
from support.training import at, series
from torch import Tensor, nn

from feedbackhook import read
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.models.registry import NETWORKS, Network
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training import compiled
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.run import train
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.store.run_folder import RunResult


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2, self.fc3 = (
            nn.Linear(64, 24),
            nn.BatchNorm1d(24),
            nn.Linear(24, 24),
            nn.Linear(24, 10),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.fc1(x.flatten(1))))
        return self.fc3(self.dropout(self.middle(h)))

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.fc2(h))


class UsesAWeight(Small):
    """The weight of fc2 is used again outside fc2, in a function that cannot be rerouted."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("nf,of->no", super().middle(h), self.fc2.weight))


class Branches(Small):
    """What is computed depends on numbers, which no single graph can hold."""

    def middle(self, h: Tensor) -> Tensor:
        return self.fc2(h) if h.sum() > 1e6 else torch.tanh(self.fc2(h))


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Small, UsesAWeight, Branches):
        built = _builder(kind)
        monkeypatch.setitem(NETWORKS, kind.__name__, Network(kind.__name__, built, (1, 8, 8), True))


def _builder(kind: type[Small]) -> Callable[..., nn.Module]:
    return lambda classes, channels, **options: kind(**options)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without Inductor, whose C++ takes most of the time."""
    whole = compiled.compile_in_place

    def without_inductor(module: nn.Module, mode: str | None, **options: Any) -> None:
        whole(module, backend="aot_eager", **options)

    monkeypatch.setattr(compiled, "compile_in_place", without_inductor)
    monkeypatch.setattr(compiled, "_check_compiler", lambda device: None)


def made(folder: Path, name: str = "run", compile: Any = True, **protocol: Any) -> RunConfig:
    """Twelve steps, of which 0, 5 and 10 are recorded."""
    return RunConfig(
        data=DataConfig(train_images=240, test_images=100),
        model=ModelConfig("Small"),
        feedback=FeedbackConfig("brSF", {"concordance": 0.8}),
        optimizer=OptimizerConfig("sgd", lr=0.01),
        protocol=ProtocolConfig(
            **{"epochs": 2, "batch_size": 40, "threads": 1, "device": "cpu", "compile": compile, **protocol}
        ),
        record=RecordConfig(every=5, figures=False),
        output=str(folder / name),
    )


def values(result: RunResult) -> pandas.Series:
    table = read(result.folder).fillna({"layer": ""})
    return table.set_index(["step", "epoch", "layer", "depth", "metric"])["value"].sort_index()


def weights(result: RunResult) -> dict[str, Tensor]:
    return load_file(result.folder / "last.safetensors")


def assert_near(got: RunResult, want: RunResult, tolerance: float) -> None:
    """Tables and weights agree: relative, and absolute below 1."""
    mine, other = values(got), values(want)
    assert mine.index.equals(other.index)
    assert (mine.isna() == other.isna()).all()
    assert ((mine - other).abs() / other.abs().clip(lower=1)).max() <= tolerance
    assert weights(got).keys() == weights(want).keys()
    for name, weight in weights(want).items():
        torch.testing.assert_close(weights(got)[name], weight, rtol=tolerance, atol=tolerance)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects which code has run in each forward of training."""
    found: list[str] = []
    forward = DistributedContext.forward

    def noted(context: DistributedContext, x: Tensor) -> Tensor:
        output = forward(context, x)
        if output.requires_grad:
            nodes, names = [output.grad_fn], set()
            while nodes:
                node = nodes.pop()
                if node is not None:
                    names.add(node.name())
                    nodes += [before for before, _ in node.next_functions]
            found.append("compiled" if any("CompiledFunction" in name for name in names) else "eager")
        return output

    monkeypatch.setattr(DistributedContext, "forward", noted)
    return found


@pytest.mark.slow
def test_a_compiled_run_is_an_eager_run_up_to_rounding(tmp_path: Path, kinds: list[str]) -> None:
    """Compiled whole. The recorded steps are eager, so error angles are those of the network as it is."""
    torch._dynamo.utils.counters.clear()
    got = train(made(tmp_path))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # and that of the compiler's check
    recorded = ["eager" if step % 5 == 0 else "compiled" for step in range(12)]
    assert kinds == recorded
    want = train(made(tmp_path, "eager", compile=False))
    assert kinds == [*recorded, *["eager"] * 12]
    assert_near(got, want, bounds.HALF_OF_FLOAT32)
    angles = values(got).xs("error_angle", level="metric")
    assert set(angles.index.get_level_values("step")) == {0, 5, 10}
    assert angles.xs("fc2", level="layer").gt(10).all()
    assert not any("_orig_mod" in name for name in weights(got))

    exact = made(tmp_path, "backprop", compile=False)
    exact.feedback = FeedbackConfig("symmetric")
    away = weights(train(exact))["fc1.weight"] - weights(want)["fc1.weight"]
    assert away.abs().max() > 10 * bounds.HALF_OF_FLOAT32, "the two would agree whatever was compiled"


CHANGES: dict[str, Callable[[RunConfig], Any]] = {}


def case(change: Callable[[RunConfig], Any]) -> Callable[[RunConfig], Any]:
    CHANGES[change.__name__] = change
    return change


@case
def learned(config: RunConfig) -> None:
    config.feedback = FeedbackConfig("KP")


@case
def mirrored(config: RunConfig) -> None:
    config.feedback = FeedbackConfig("WM", {"every": 3}, mirror=5)


@case
def manhattan(config: RunConfig) -> None:
    config.optimizer = OptimizerConfig("batch_manhattan", lr=1e-4)
    config.protocol.reduction = "sum"


@case
def accumulated_in_half_precision(config: RunConfig) -> None:
    config.protocol.gradient_accumulation_steps, config.protocol.precision = 2, "bf16"


@case
def scheduled(config: RunConfig) -> None:
    config.feedback.schedule, config.protocol.batch_sizes = {1: {"concordance": 0.5}}, {1: 60}


@case
def everything_recorded(config: RunConfig) -> None:
    config.record = RecordConfig(7, 3, 4, per_sample=True, figures=False)


@case
def backprop(config: RunConfig) -> None:
    config.feedback = FeedbackConfig(None)


@case
def the_papers(config: RunConfig) -> None:
    config.model, config.condition = ModelConfig("liao2016/mnist"), "frSF+BN+BM"
    config.feedback, config.optimizer = FeedbackConfig(), OptimizerConfig(lr=1e-4)


@case
def of_timm(config: RunConfig) -> None:
    config.model, config.data.size = ModelConfig("timm/test_resnet"), 16


QUICK = ("learned", "accumulated_in_half_precision", "everything_recorded")


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHANGES]
)
def test_whatever_is_set_the_run_is_the_eager_one(name: str, tmp_path: Path, kinds: list[str]) -> None:
    """Without Inductor, compiled code computes what the network does, to the last bit."""
    config, eager = made(tmp_path), made(tmp_path, "eager", compile=False)
    for each in (config, eager):
        CHANGES[name](each)
    got = train(config)
    assert kinds.count("compiled") > len(kinds) / 3
    assert_near(got, train(eager), 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_quickly")
def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    resumes(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_compiled_whole_resumes_bit_equal(tmp_path: Path) -> None:
    resumes(tmp_path, batch_sizes={1: 60})


def resumes(folder: Path, **protocol: Any) -> None:
    """With dropout, whose masks the compiler draws."""

    def config(name: str, compile: bool = True) -> RunConfig:
        config = made(folder, name, compile=compile, **protocol)
        config.model.options = {"dropout": 0.3}
        return config

    whole = train(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config("stopped"), progress=at(2, 2, KeyboardInterrupt))
    with pytest.raises(ConfigError, match=r"`protocol.compile` was True in this run and is False now"):
        train(config("stopped", compile=False), resume=True)
    assert_near(train(config("stopped"), resume=True), whole, 0.0)


def state_of(config: RunConfig) -> TrainingState:
    config = resolve(config)
    return TrainingState(config, load(config.data), DistributedContext(config.protocol))


@pytest.mark.usefixtures("_quickly")
def test_compiling_leaves_everything_as_it_was(tmp_path: Path) -> None:
    config = made(tmp_path)
    config.model.options = {"dropout": 0.3}
    state = state_of(config)
    assert state.patch is not None
    patch = state.patch
    state.model.eval()

    def tensors() -> list[Tensor]:
        drawn = [patch.feedback(row.name) for row in patch.layers]
        model = [value.clone() for value in state.model.state_dict().values()]
        return [torch.get_rng_state(), state.order.get_state(), *drawn, *model]

    def plain() -> list[Any]:
        counts = [(row.calls, row.rerouted) for row in patch.layers]
        return [counts, patch.state_dict(), [module.training for module in state.model.modules()]]

    before = tensors(), plain()
    compiled.compile_network(state)
    torch.testing.assert_close(tensors(), before[0], rtol=0, atol=0)
    assert plain() == before[1]
    assert [row.depth for row in patch.layers] == [0, 1, 2]  # known from the audited forward
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.model._compiled_call_impl is not None
    state.close()


@pytest.mark.usefixtures("_quickly")
def test_a_weight_that_would_keep_exact_backprop_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(tmp_path)
    config.model.name = "UsesAWeight"
    with pytest.raises(ConfigError, match=r"weight of 'fc2' is used in einsum.*exclude=\['fc2'\]"):
        train(config)
    assert not Path(str(config.output)).exists()
    config.feedback.exclude = ["fc2"]
    assert train(config).status == "finished"
    monkeypatch.setattr(compiled, "_audit", lambda state: None)
    blind = made(tmp_path, "blind")
    blind.model.name = "UsesAWeight"
    state = state_of(blind)
    compiled.compile_network(state)  # without the audit no one would know
    state.close()


@pytest.mark.usefixtures("_quickly")
def test_a_network_that_is_no_single_graph_is_refused(tmp_path: Path) -> None:
    config = made(tmp_path)
    config.model.name = "Branches"
    message = r"cannot compile Branches as one graph: Data-dependent branching \(File .*Set it to false"
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(str(config.output)).exists()
    config.protocol.compile = False
    assert train(config).status == "finished"


def test_a_missing_compiler_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(ConfigError, match=r"does not work on this machine: .*C\+\+ compiler.*to false"),
    ):
        train(made(tmp_path))
    assert not (tmp_path / "run").exists()


def refused(change: Callable[[RunConfig], Any], tmp_path: Path, message: str) -> None:
    config = made(tmp_path)
    change(config)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_what_cannot_be_compiled_is_refused_by_name(tmp_path: Path) -> None:
    def direct(config: RunConfig) -> None:
        config.feedback = FeedbackConfig({"fc1": "frSF", "fc2": {"mode": "DFA"}})

    def sharded(config: RunConfig) -> None:
        config.protocol.strategy = "fsdp2"

    def always(config: RunConfig) -> None:
        config.record.every = 1

    def sizes(config: RunConfig) -> None:
        config.protocol.batch_sizes = {epoch: 20 * epoch for epoch in range(1, 12)}

    def unknown(config: RunConfig) -> None:
        config.protocol.compile = "fast"  # type: ignore[assignment]

    refused(direct, tmp_path, "compile cannot be used with DFA: .* Set it to false")
    refused(sharded, tmp_path, "fsdp2 breaks .* or use ddp")
    refused(always, tmp_path, "no effect with record.every 1")
    refused(sizes, tmp_path, "at most 8, and there are 11")
    refused(unknown, tmp_path, "must be false, true, reduce-overhead or max-autotune, not 'fast'")
    config = made(tmp_path)
    config.feedback, config.record.every = FeedbackConfig(None), 1  # backprop records no error signals
    assert resolve(config).protocol.compile is True


@pytest.mark.usefixtures("_quickly")
def test_the_setting_is_stored_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    config = made(tmp_path, compile="reduce-overhead", epochs=1)
    result = train(config, tell=told.append)
    assert told[0].endswith("brSF concordance=0.8; cpu (1 thread), compiled")
    assert "compile: reduce-overhead" in (result.folder / "config.yaml").read_text()
    assert len(series(read(result.folder), "train_loss")) == 1
