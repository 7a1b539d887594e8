"""The sites of direct rules at the inputs of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from feedbackhook.core.audit import tensors_in
from feedbackhook.core.edge import SiteEdge
from feedbackhook.core.layer import ModuleSite
from feedbackhook.core.mode import Mode
from feedbackhook.core.projection import Place
from feedbackhook.core.state import PatchState


def reroute_inputs(
    state: PatchState, site: ModuleSite, mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a site's module, each tensor that requires a gradient behind an edge.

    The first such tensor receives the site's own B; a further one gets a B of its own.

    Raises:
        RuntimeError: an input keeps such a tensor where it cannot be replaced.
    """
    assert mode.forward is not None
    forward = mode.forward
    dtype = next((p.dtype for p in site.parameters() if p.is_floating_point()), None)
    joined: dict[int, tuple[Tensor, Tensor]] = {}

    def join(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in joined:
            shape = tuple(tensor.shape)
            place = Place(shape, batched=len(shape) > 1, channels_first=len(shape) > 3)
            own = tensor.new_empty(0, dtype=dtype)
            delivery = forward.site(site, site.feedback.of_input(len(joined)), place, own)
            learned = delivery.projection.learned.values()
            joined[id(tensor)] = tensor, SiteEdge.apply(tensor, state, delivery, *learned)
        return joined[id(tensor)][1]

    new_args, new_kwargs = _replaced((args, kwargs), join, site.info.name)
    site.calls += 1
    if site.depth is None:
        site.depth = sum(other.depth is not None for other in state.patched)
    site.input_requires_grad = bool(site.input_requires_grad) or bool(joined)
    return new_args, new_kwargs


def _replaced(value: Any, join: Callable[[Tensor], Tensor], name: str) -> Any:
    """Return a module's input with its tensors replaced, in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return join(value)
    kind = type(value)
    if kind in (tuple, list):
        return kind(_replaced(each, join, name) for each in value)
    if kind is dict:
        return {key: _replaced(each, join, name) for key, each in value.items()}
    if any(tensor.requires_grad for tensor in tensors_in(value)):
        raise RuntimeError(
            f"the site {name!r} gets a tensor that requires a gradient inside a {kind.__name__}, where "
            "direct feedback cannot replace it; choose other modules with sites= in feedbackhook.patch"
        )
    return value
