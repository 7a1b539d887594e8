"""The third oracle: the functions that layers call are replaced, for the time of a forward.

`F.linear` and the convolutions become functions that compute

    f(detach(x), W, b) + (f(x, V) - detach(f(x, V)))

whose value is f(x, W, b) in every bit, whose gradients of W and b are exact, and which sends V's error signal
to x. It knows W in each call, even if W is derived from parameters, where the saved-tensor oracle of
`oracle.py` is blind. So it follows the rule that all comparisons use: V = sign(W), scaled to the norm of W
(`RULE`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

RULE = {"mode": "sign", "magnitude": "uniform", "scale": "norm"}
FUNCTIONS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def feedback_of(weight: Tensor) -> Tensor:
    """V under `RULE`; all zeros where W is."""
    weight = weight.detach()
    sign = weight.sign()
    length = sign.norm()
    return sign * (weight.norm() / length) if length else sign


@dataclass
class Seen:
    """What the third oracle saw in a forward and a backward, by the name of the layer."""

    calls: Counter[str] = field(default_factory=Counter)
    input_requires_grad: Counter[str] = field(default_factory=Counter)  # calls
    rerouted: Counter[str] = field(default_factory=Counter)  # error signals that arrived there
    derived: Counter[str] = field(default_factory=Counter)  # calls with a weight that is not a parameter
    foreign: Counter[str] = field(default_factory=Counter)  # calls with a trainable weight of no layer
    edges: list[Any] = field(default_factory=list)  # the graph's nodes through which V's products come

    def behind_feedback(self, model: nn.Module) -> set[str]:
        """The parameters whose gradient came through some V, read from the graph."""
        found: set[Any] = set()
        nodes = [node for node in self.edges if node is not None]
        while nodes:
            node = nodes.pop()
            if node not in found:
                found.add(node)
                nodes += [parent for parent, _ in node.next_functions if parent is not None]
        reached = {node.variable for node in found if hasattr(node, "variable")}
        return {name for name, parameter in model.named_parameters() if parameter in reached}


def layers_by_weight(model: nn.Module) -> dict[int, str]:
    """The name of the layer that holds each weight, by the weight's id."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        held = ("weight",) if isinstance(module, LAYERS) else ()
        held = IN_PROJECTIONS if isinstance(module, nn.MultiheadAttention) else held
        for attribute in held:
            if isinstance(weight := module._parameters.get(attribute), Tensor):
                owners.setdefault(id(weight), name if attribute == "weight" else f"{name}.{attribute}")
    return owners


@contextmanager
def replaced_functions(model: nn.Module) -> Iterator[Seen]:
    """Within the block, every call of a layer's weight sends V's product back."""
    seen = Seen()
    names = {module: name for name, module in model.named_modules()}
    owners = layers_by_weight(model)
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
            seen.input_requires_grad[name] += 1
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
