"""What a patch could leave behind, on a model or in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.optim import optimizer as optimizer_globals


def traces(model: nn.Module) -> dict[str, object]:
    """Everything that a patch could leave on a model or in torch: hooks, attributes, modes, classes.

    Empty hook dictionaries count as none, since torch creates them lazily.
    """
    found: dict[str, object] = {"function modes": torch._C._len_torch_function_stack()}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        for attribute, value in vars(module).items():
            if attribute not in {"_parameters", "_modules", "_buffers"}:
                found[f"{name}: {attribute}"] = _contents(value)
    for name, parameter in model.named_parameters():
        found[f"{name}: identity"] = id(parameter)
        found[f"{name}: class"] = type(parameter)
        found[f"{name}: attributes"] = dict(vars(parameter))
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}: {hooks}"] = _contents(getattr(parameter, hooks))
    return found


def _contents(value: object) -> object:
    if isinstance(value, (dict, set, list)) or value is None:
        return dict(value) if isinstance(value, dict) and value else (value or None)
    return value


def global_hooks() -> set[tuple[str, int]]:
    """The name of each of torch's own hook dictionaries with each key in it."""
    dictionaries = {
        name: value
        for library in (module_globals, optimizer_globals)
        for name, value in vars(library).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    assert {"_global_forward_hooks", "_global_optimizer_post_hooks"} <= dictionaries.keys()
    return {(name, key) for name, hooks in dictionaries.items() for key in hooks}


@contextmanager
def no_trace_left(model: nn.Module) -> Iterator[None]:
    """What is patched inside is gone at the end; hooks that vanish with other tests' patches do not count."""
    before, hooks = traces(model), global_hooks()
    yield
    assert traces(model) == before
    assert global_hooks() <= hooks
