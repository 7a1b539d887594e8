"""One comparison of a whole model under a patch with what it must give, and the table of all of them.

Two oracles say what it must give. The saved-tensor oracle of `oracle.py` is blind where a weight is derived
from parameters, so there is a third one, `by_replaced_functions`: for the time of a forward, `F.linear` and
the convolutions are replaced by functions that compute

    f(detach(x), W, b) + (f(x, V) - detach(f(x, V)))

of which the value is f(x, W, b) in every bit, the gradients of W and b are exact, and the error signal that
x gets is V's. It knows what W is in each call, derived or not, and so follows the rule under which all is
tested: V = sign(W), scaled to the norm of W (`RULE`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from oracle import Gradients
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

import feedbackhook

RULE = {"mode": "sign", "magnitude": "uniform", "scale": "norm"}
FUNCTIONS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
DROP_RATES = (
    *("drop_prob", "drop_rate", "drop_path_rate", "attn_drop_rate", "dropout_rate"),
    *("attn_drop", "attention_dropout", "dropout", "drop"),
)
IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


# --- the model ---------------------------------------------------------------------------------------------


def prepared(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model` in train mode and `dtype`, without dropout of any kind, and with nothing that starts at zero.

    A head of zeros sends no error signal back, and a layer scale of 1e-6 next to none, so that nothing could
    be told from gradients behind them: parameters that are constant and small are drawn anew.
    """
    model.to(dtype).train()
    for module in model.modules():
        if "Drop" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
            module.p = 0.0
        for name in DROP_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            constant = parameter.flatten()[0].item()
            if abs(constant) <= 0.1 and (parameter == constant).all():
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 10
                values = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter.copy_(values / max(fan_in, 1) ** 0.5)
    return model


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of standard normal pixels, always the same for its shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The step of most models: all the tensors that a call returns, end to end."""
    leaves = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    assert leaves
    return torch.cat([leaf.flatten() for leaf in leaves if leaf.is_floating_point()])


# --- the third oracle --------------------------------------------------------------------------------------


def feedback_of(weight: Tensor) -> Tensor:
    """V under `RULE`; all zeros where W is."""
    weight = weight.detach()
    sign = weight.sign()
    length = sign.norm()
    return sign * (weight.norm() / length) if length else sign


@dataclass
class Seen:
    """What the third oracle has seen of a forward and a backward, by the name of the layer."""

    calls: Counter[str] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)  # calls whose input required a gradient
    rerouted: Counter[str] = field(default_factory=Counter)  # error signals that arrived there
    derived: Counter[str] = field(default_factory=Counter)  # calls with a weight that is no parameter
    foreign: Counter[str] = field(default_factory=Counter)  # calls with a trained weight of no layer
    edges: list[Any] = field(default_factory=list)  # the graph's nodes through which V's products come

    def behind_feedback(self, model: nn.Module) -> set[str]:
        """The parameters whose gradient has come through some V, by the graph."""
        found: set[Any] = set()
        nodes = [node for node in self.edges if node is not None]
        while nodes:
            node = nodes.pop()
            if node not in found:
                found.add(node)
                nodes += [parent for parent, _ in node.next_functions if parent is not None]
        reached = {node.variable for node in found if hasattr(node, "variable")}
        return {name for name, parameter in model.named_parameters() if parameter in reached}


@contextmanager
def replaced_functions(model: nn.Module) -> Iterator[Seen]:
    """Let every call of a layer's weight send V's product back."""
    seen = Seen()
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, str] = {}
    for module, name in names.items():
        held = ("weight",) if isinstance(module, LAYERS) else ()
        held = IN_PROJECTIONS if isinstance(module, nn.MultiheadAttention) else held
        for attribute in held:
            if isinstance(weight := module._parameters.get(attribute), Tensor):
                owners.setdefault(id(weight), name if attribute == "weight" else f"{name}.{attribute}")
    running: list[nn.Module] = []

    def left(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    def owner_of(weight: Tensor) -> tuple[str | None, Tensor | None]:
        """The layer, and the feedback of the weight; a view of a weight has that view of its feedback."""
        whole = weight if weight._base is None else weight._base
        if id(whole) in owners:
            v = torch.empty_strided(whole.size(), whole.stride(), dtype=whole.dtype).copy_(feedback_of(whole))
            offset = weight.storage_offset() - whole.storage_offset()
            return owners[id(whole)], v.as_strided(weight.size(), weight.stride(), offset)
        layer = next((m for m in reversed(running) if isinstance(m, LAYERS)), None)
        if layer is not None and not isinstance(weight, nn.Parameter) and weight.requires_grad:
            seen.derived[names[layer]] += 1
            return names[layer], feedback_of(weight)
        return None, None

    def replacement(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replaced(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any):
            name, v = owner_of(weight)
            if name is None:
                if weight.requires_grad:
                    seen.foreign[names[running[-1]] if running else ""] += 1
                return function(input, weight, bias, *args, **kwargs)
            seen.calls[name] += torch.is_grad_enabled()
            if not input.requires_grad or not torch.is_grad_enabled():
                return function(input, weight, bias, *args, **kwargs)
            seen.upstream[name] += 1
            path = function(input, v, None, *args, **kwargs)
            path.register_hook(lambda error: seen.rerouted.update([name]))
            seen.edges.append(path.grad_fn)
            output = function(input.detach(), weight, bias, *args, **kwargs)
            return output + (path - path.detach())

        return replaced

    kept = {
        (space, name): getattr(space, name)
        for space in (F, torch)
        for name in FUNCTIONS
        if hasattr(space, name)
    }
    hooks = [
        register_module_forward_pre_hook(lambda module, args: running.append(module)),
        register_module_forward_hook(left, always_call=True),
    ]
    try:
        for (space, name), function in kept.items():
            setattr(space, name, replacement(function))
        yield seen
    finally:
        for (space, name), function in kept.items():
            setattr(space, name, function)
        for hook in hooks:
            hook.remove()


# --- one comparison ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row of the table."""

    case: str  # the id of the test
    family: str
    model: str = ""
    input: str = ""
    layers: int = 0
    calls: int = 0
    rerouted: int = 0
    error: float = math.nan  # the largest relative one of all parameters
    oracles: str = ""
    result: str = "ok"
    seconds: float = 0.0


def compare(
    model: nn.Module,
    x: Tensor,
    row: Row,
    *,
    step: oracle.Step = outputs,
    exclude: Sequence[type[nn.Module]] = (),
    saved_tensors: bool = True,
    tolerance: float = oracle.TOLERANCE,
) -> None:
    """Assert that `model` under a patch is what the oracles say; what was measured goes into `row`.

    Args:
        model: prepared and without a patch; it is used up, for the last of the runs has no copy.
        x: the batch.
        row: its counts and its error are filled in.
        step: how the model is run, to one tensor.
        exclude: types of layers that stay exact; none that calls a function in `FUNCTIONS`.
        saved_tensors: whether the saved-tensor oracle must agree. If not it must disagree, so that its
            blindness is no excuse once it is gone.
        tolerance: relative, for gradients.
    """
    row.input = "x".join(map(str, x.shape))

    def run(model: nn.Module) -> Gradients:
        torch.manual_seed(0)
        result = oracle.gradients(model, x, step, input_requires_grad=False)
        model.zero_grad()
        return result

    untouched, patched = copy.deepcopy(model), copy.deepcopy(model)
    exact = run(untouched)
    patch = feedbackhook.patch(patched, **RULE, exclude=list(exclude) or None)
    got = run(patched)
    row.layers = len(patch.layers)
    row.calls = sum(layer.calls for layer in patch.layers)
    row.rerouted = sum(layer.rerouted for layer in patch.layers)
    for (name, a), b in zip(untouched.named_buffers(), patched.buffers(), strict=True):
        assert torch.equal(a, b), f"the buffer {name} has changed"
    del untouched  # large models would not fit in so many copies
    literal = copy.deepcopy(model)
    with replaced_functions(literal) as seen:
        want = run(literal)
    behind = seen.behind_feedback(literal)
    seen.edges.clear()
    del literal

    assert torch.equal(got.output, exact.output), "the forward has changed"
    assert torch.equal(want.output, exact.output), "the oracle's forward has changed"
    assert exact.output.isfinite().all(), "the forward is not finite"

    apart = oracle.distances(got, want)
    row.error = max(apart.values())
    row.oracles = "functions"
    assert all(d <= tolerance for d in apart.values()), f"gradients differ from the oracle's: {worst(apart)}"
    counted = {layer.name: (layer.calls, layer.rerouted) for layer in patch.layers if layer.calls}
    expected = {name: (seen.calls[name], seen.rerouted[name]) for name in seen.calls}
    wrong = {name: (counted.get(name), expected.get(name)) for name in {*counted, *expected}}
    wrong = {name: both for name, both in wrong.items() if both[0] != both[1]}
    assert not wrong, f"(calls, rerouted) of the patch, and what they must be: {wrong}"
    assert row.rerouted == sum(seen.rerouted.values()) > 0
    assert_unlike_backprop(got, exact, behind)
    del want, exact

    feedback = {name: patch.feedback(name) for name in seen.upstream}
    patch.remove()
    del patch, patched
    with oracle.swapped_saved_tensors(model, feedback):
        swapped = run(model)
    apart = oracle.distances(got, swapped)
    agree = all(d <= tolerance for d in apart.values())
    if saved_tensors:
        row.oracles += ", saved tensors"
        row.error = max(row.error, *apart.values())
        assert agree, f"gradients differ from the saved-tensor oracle's: {worst(apart)}"
    else:
        assert not agree, "the saved-tensor oracle agrees too: it need not be left out any more"
    if seen.derived:
        row.result += f"; {len(seen.derived)} derived weights"
    if seen.foreign:
        row.result += f"; exact, for no layer holds the weight: {', '.join(sorted(seen.foreign))}"
    if unused := [name for name in seen.upstream if seen.rerouted[name] < seen.upstream[name]]:
        row.result += f"; no error signal comes to: {', '.join(sorted(unused))}"


def worst(apart: dict[str, float], count: int = 5) -> str:
    """The largest distances, for a message."""
    rows = sorted(apart.items(), key=lambda item: -item[1] if item[1] == item[1] else -math.inf)
    return f"{sum(d > 0 for d in apart.values())} of {len(apart)}, the worst {rows[:count]}"


def assert_unlike_backprop(got: Gradients, exact: Gradients, behind: set[str]) -> None:
    """Gradients that came through a V differ from backprop's; all others are backprop's.

    A gradient is left out where both are below `TOLERANCE` of the largest: in theory it is zero, as that of a
    bias before a normalisation.
    """
    largest = max(g.norm().item() for g in exact.parameters.values() if g is not None)
    apart = oracle.distances(got, exact)
    alike, unlike = [], []
    for name, a in got.parameters.items():
        b = exact.parameters[name]
        assert (a is None) == (b is None), f"only one of the two gives {name} a gradient"
        if a is None or (size := max(a.norm().item(), b.norm().item())) <= oracle.TOLERANCE * largest:
            continue
        distance = (a - b).norm().item() / size
        if name in behind and not distance > oracle.UNLIKE:
            alike.append((name, distance))
        if name not in behind and not apart[name] <= oracle.TOLERANCE:
            unlike.append((name, apart[name]))
    assert behind, "no gradient came through a feedback weight"
    assert not alike, f"backprop's gradients, behind feedback weights: {alike}"
    assert not unlike, f"not backprop's gradients, though not behind feedback weights: {unlike}"


# --- the table ---------------------------------------------------------------------------------------------

TABLE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
HEAD = """# Models that were tried

Written by the tests: `tests/test_timm.py` and `tests/test_torchvision.py` each replace their table when a
session has run all of their models (`make test-all`).

Each model is as small as it goes, on two images, in train mode and in float64, without dropout or drop path;
parameters that start at a small constant, zero included, are drawn anew. It is patched with `mode="sign",
magnitude="uniform"`, so that V = sign(W) scaled to the norm of W, for derived weights too. It must give the
forward and the buffers of the model without a patch in every bit; the gradients of the oracles, which share
nothing with the library (relative distance at most 2^-30, with 2^-13 of the largest gradient as the least
scale); gradients unlike backprop's wherever an error signal has passed a V, and backprop's elsewhere; and a
rerouted error signal for each call of a patched weight whose input requires a gradient. The first layer's
input, the image, requires none.

- *layers*, *calls*, *rerouted*: patched weights, their calls in one forward, and the error signals sent
  through V in one backward.
- *error*: the largest relative distance of a gradient from an oracle's, rounded up to a power of ten.
- *oracles*: "functions" replaces `F.linear` and the convolutions by functions with V's gradient; "saved
  tensors" swaps W for V among the tensors that autograd saves, which says nothing where a weight is derived
  from parameters.
"""


def session_folder(factory: Any, name: str) -> Path:
    """A folder that pytest's processes of this session share, by its `tmp_path_factory`."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "coverage" / name


@contextmanager
def recorded(row: Row, folder: Path) -> Iterator[Row]:
    """Keep what becomes of a comparison, its failure included, as a file in `folder`."""
    begin = time.perf_counter()
    try:
        yield row
    except BaseException as error:
        row.result = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
            :200
        ]
        raise
    finally:
        row.seconds = time.perf_counter() - begin
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{row.case}.json", json.dumps(asdict(row)))


def write_table(title: str, versions: Sequence[str], folder: Path, cases: Sequence[str]) -> bool:
    """Put the rows in `folder` into the section `title` of the table, if there is one for each case."""
    files = [folder / f"{case}.json" for case in cases]
    if not all(file.exists() for file in files):
        return False
    rows = [Row(**json.loads(file.read_text())) for file in files]
    lines = [
        f"## {title}",
        "",
        f"{len(rows)} models, {sum(row.result.startswith('FAILED') for row in rows)} failures; "
        f"Python {platform.python_version()}, {', '.join(versions)}, on {platform.machine()}.",
        "",
        "| module | model | input | layers | calls | rerouted | error | oracles | result |",
        "|---|---|---|---:|---:|---:|---:|---|---|",
        *(
            f"| {row.family} | {row.model} | {row.input} | {row.layers} | {row.calls} | {row.rerouted} "
            f"| {_order(row.error)} | {row.oracles} | {row.result.replace('|', '/')} |"
            for row in rows
        ),
        "",
    ]
    with _alone(folder.parent):
        old = TABLE.read_text() if TABLE.exists() else ""
        sections = {part.split("\n", 1)[0]: f"## {part}" for part in old.split("\n## ")[1:]}
        sections[title] = "\n".join(lines)
        ordered = [sections[name].rstrip("\n") + "\n" for name in sorted(sections)]
        _write(TABLE, "\n".join([HEAD, *ordered]))
    return True


def _order(error: float) -> str:
    """The next power of ten, so that the last bits of a machine leave no trace."""
    if not math.isfinite(error):
        return "-"
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error))}"


def _write(file: Path, text: str) -> None:
    """Aside, then renamed: no reader sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(file)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One of the session's processes at a time."""
    lock = folder / "writing"
    while True:
        try:
            lock.mkdir()
            break
        except FileExistsError:
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.rmdir()
