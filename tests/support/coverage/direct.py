"""One comparison of a whole model with direct feedback and an oracle.

The oracle runs an unpatched model in pieces: the input of each layer, or of each site, is detached, so that
the graph falls apart there. The pieces then get their error signals as separate roots of one backward: the
loss for the last, B e for the inputs of the others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

import feedbackhook
from support import oracle
from support.coverage import timm_models
from support.coverage.comparison import Row, worst
from support.coverage.models import image
from support.coverage.replaced_functions import LAYERS, layers_by_weight
from support.oracle import Gradients

BLOCKS = (
    r"(.*\.)?(\w*blocks\d*|stages|layers|layer\d|levels|features|network|stage\d|body)(\.\d+|\.\w*block\w*)"
)
"""Where most families of timm keep their blocks."""

OTHER_BLOCKS = {
    "dla": r"level\d",
    "dpn": r"features\.conv[2-5]_\d+",
    "inception_resnet_v2": r"mixed_\d\w|repeat\w*|block8",
    "inception_v3": r"Mixed_\d\w",
    "nasnet": r"(reduction_)?cell_\d+",
    "pnasnet": r"cell_\d+",
    "regnet": r"s\d\.b\d+",
    "twins": r"blocks\.\d+\.\d+",
    "xception": r"block\d+",
}
"""Where others do, by module."""

Cuts = list[tuple[str, Tensor]]


@contextmanager
def cut_at_layers(model: nn.Module, names: set[str]) -> Iterator[Cuts]:
    """Within the block, each call of a named layer's weight gets its input detached."""
    cuts: Cuts = []
    owners, modules = layers_by_weight(model), {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    functions = {
        (space, name): getattr(space, name)
        for space in (torch.nn.functional, torch)
        for name in ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
        if hasattr(space, name)
    }

    def left(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    def owner_of(weight: Tensor) -> str | None:
        whole = weight if weight._base is None else weight._base
        if id(whole) in owners:
            return owners[id(whole)]
        layer = next((module for module in reversed(running) if isinstance(module, LAYERS)), None)
        derived = layer is not None and not isinstance(weight, nn.Parameter) and weight.requires_grad
        return modules[layer] if derived else None

    def replacement(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replaced(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = owner_of(weight)
            if name in names and input.requires_grad:
                cuts.append((name, input))
                input = input.detach()
            return function(input, weight, *args, **kwargs)

        return replaced

    hooks = [
        register_module_forward_pre_hook(lambda module, args: running.append(module)),
        register_module_forward_hook(left, always_call=True),
    ]
    try:
        for (space, name), function in functions.items():
            setattr(space, name, replacement(function))
        yield cuts
    finally:
        for (space, name), function in functions.items():
            setattr(space, name, function)
        for hook in hooks:
            hook.remove()


@contextmanager
def cut_at_modules(model: nn.Module, names: set[str], cut: bool = True) -> Iterator[Cuts]:
    """Within the block, each named module gets its inputs detached, or only copied."""
    cuts: Cuts = []

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            leaves, tree = tree_flatten(args)
            pieces: dict[Tensor, Tensor] = {}  # a tensor that is given twice is one input
            for x in leaves:
                if isinstance(x, Tensor) and x.requires_grad and x not in pieces:
                    piece = x.detach().requires_grad_().clone() if cut else x.clone()
                    cuts.append((f"{name}[{len(pieces)}]" if pieces else name, x if cut else piece))
                    pieces[x] = piece
            return tree_unflatten([pieces.get(x, x) if isinstance(x, Tensor) else x for x in leaves], tree)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield cuts
    finally:
        for hook in hooks:
            hook.remove()


def sent(name: str, e: Tensor, x: Tensor) -> Tensor:
    """B e for the input `x` of a site, with B ~ U[-1/sqrt(D), 1/sqrt(D)] drawn from the site's name."""
    errors = e.flatten(1)
    features = x[0].numel()
    rng = feedbackhook.CounterRNG(0, feedbackhook.LayerInfo(name, "", (), 0))
    b = rng.uniform(torch.empty(features, errors.shape[1])).double() * 2 - 1
    return (errors @ b.T).reshape(x.shape) / features**0.5


def without_effect(model: nn.Module, x: Tensor, names: set[str]) -> set[str]:
    """The inputs of these modules on which the output does not depend, so that no error belongs there."""
    with cut_at_modules(model, names, cut=False) as pieces:
        output = model(x)
    found = torch.autograd.grad(output.sum(), [piece for _, piece in pieces], allow_unused=True)
    return {name for (name, _), gradient in zip(pieces, found, strict=True) if gradient is None}


def by_cuts(model: nn.Module, x: Tensor, names: set[str], at_modules: bool) -> Gradients:
    """The gradients of the oracle."""
    torch.manual_seed(0)
    idle = without_effect(copy.deepcopy(model), x, names) if at_modules else set()
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with (cut_at_modules if at_modules else cut_at_layers)(model, names) as cuts:
        output = model(x)
    cuts = [(name, at) for name, at in cuts if name not in idle]
    leaf = output.detach().requires_grad_()
    (e,) = torch.autograd.grad(oracle.probe(leaf), leaf)
    signals = [sent(name, e, cut) for name, cut in cuts]
    roots = [output] if output.requires_grad else []  # its graph may begin at a frozen last layer
    torch.autograd.backward([*roots, *(cut for _, cut in cuts)], [*([e] if roots else []), *signals])
    return oracle.read_gradients(model, x, output)


def compare_direct(
    model: nn.Module, x: Tensor, row: Row, sites: str | None, exclude: Sequence[type[nn.Module]] = ()
) -> None:
    """Assert that `model` with "DFA" agrees with the oracle, or that it is refused by name.

    Layers whose batch differs from that of the output are excluded, as the error that names them says.

    Args:
        model: prepared and unpatched.
        x: the batch.
        row: receives the counts, the error and what was refused.
        sites: modules whose inputs are the sites; None: layers.
        exclude: types of layers that stay exact, if the sites are layers.
    """
    row.input = "x".join(map(str, x.shape))
    patched, exact = copy.deepcopy(model), copy.deepcopy(model)
    excluded: list[str | type[nn.Module]] = list(exclude)
    while True:
        options: dict[str, Any] = {"sites": sites} if sites else {"exclude": excluded or None}
        patch = feedbackhook.patch(patched, "DFA", recompute=True, **options)
        torch.manual_seed(0)
        try:
            got = oracle.gradients(patched, x, input_requires_grad=False)
        except (RuntimeError, TypeError) as error:
            patch.remove()
            said = re.search(r"batches .* differ .*exclude=\[(.*?)\]", str(error))
            if said is None or sites:
                row.result = f"refused: {str(error).split(', so ')[0]}"
                break
            excluded += re.findall(r"'([^']*)'", said[1])
            patched.load_state_dict(model.state_dict())
        else:
            break
    if row.result != "ok":
        reasons = ("the model's output is a", "the batches of", "these sites have not run", "the site ")
        assert row.result.removeprefix("refused: ").startswith(reasons), row.result
        return
    torch.manual_seed(0)
    plain = oracle.gradients(exact, x, input_requires_grad=False)
    assert torch.equal(got.output, plain.output), "the forward has changed"
    for (name, a), b in zip(exact.named_buffers(), patched.buffers(), strict=True):
        assert torch.equal(a, b), f"the buffer {name} has changed"
    row.layers = len(patch.layers)
    row.calls = sum(layer.calls for layer in patch.layers)
    row.rerouted = sum(layer.rerouted for layer in patch.layers)
    assert row.rerouted > 0
    names = {layer.name for layer in patch.layers if layer.rerouted}
    want = by_cuts(model, x, names, at_modules=sites is not None)
    apart = oracle.distances(got, want)
    row.error = max(apart.values())
    assert all(d <= oracle.TOLERANCE for d in apart.values()), f"gradients differ: {worst(apart)}"
    oracle.assert_unlike(got, plain)
    if by_name := [name for name in excluded if isinstance(name, str)]:
        row.result = (
            f"ok with {len(by_name)} layers excluded, refused without: their batch is not the output's"
        )


IDS = [f"{name}, {where}" for name in timm_models.IDS for where in ("layers", "blocks")]


def fill(row: Row) -> None:
    """Compare the model of `row.case`, such as "resnet, blocks", and put the measurements into `row`.

    Raises:
        AssertionError: the patched model disagrees with the oracle.
    """
    name, where = row.case.split(", ")
    module, case = name.split("-")[0], timm_models.case_of(name)
    row.family, row.model, row.oracles = f"{module}, {where}", case.describe(), "pieces"
    sites = None if where == "layers" else OTHER_BLOCKS.get(module, BLOCKS)
    compare_direct(case.build(module), image(2, 3, case.size, case.size), row, sites, case.exclude)
