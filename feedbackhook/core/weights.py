"""Which layer a tensor belongs to: today's parameters of the patched modules, their parts and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.edge import Copied, Layer, Part, View
from feedbackhook.core.torch_internals import storage_of

COPYING: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float,
        Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.__getitem__, torch.index_select,
        Tensor.index_select, torch.reshape, Tensor.reshape, torch.flatten, Tensor.flatten, torch.flip,
        Tensor.flip, torch.roll, Tensor.roll, Tensor.repeat,
    }
)  # fmt: skip
"""Functions that choose and order the entries of a tensor, and may make a new one: what they make of W they
make of V as well."""


class Use(NamedTuple):
    """What a call uses: a layer's whole weight, of which the tensor in the call may be a part."""

    layer: Layer
    weight: Tensor
    part: Part | None = None


Copies = dict[int, tuple[Tensor, Use, int]]
"""By the id of a copy: the copy itself, which keeps the id its own, what it is a copy of, and its version
then, since one that was changed in place is a copy no more."""


class Weights:
    """The parameters of the patched layers, and a guard on each that learns.

    Args:
        layers: the patched layers, whose order and number change where weights are tied or come apart.
        guard: makes the hook for a layer's parameter.
    """

    def __init__(self, layers: list[Layer], guard: Callable[[Layer], Callable[[Tensor], None]]) -> None:
        self._layers = layers
        self._guard = guard
        self._by_id: dict[int, tuple[Tensor, Layer]] = {}
        self._of: dict[Layer, list[Tensor]] = {}
        self._guards: dict[Tensor, RemovableHandle] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave behind what belongs to this process's parameters."""
        return {**self.__dict__, "_by_id": {}, "_of": {}, "_guards": {}}

    # --- today's parameters --------------------------------------------------------------------------------

    def update(self, layers: Iterable[Layer]) -> bool:
        """Sees that the parameters which these layers hold today are known and guarded: copies, `assign=True`
        and `to_empty` bring new ones, and may tie or untie them. True where something has changed."""
        changed = False
        for layer in [layer for layer in layers if not self._is_known(layer)]:
            if layer in self._layers:  # which it no longer is where it was merged a moment ago
                changed = True
                self._split(layer)
        if changed:
            self._merge()
            for layer in [layer for layer in self._layers if not self._is_known(layer)]:
                self._learn(layer)
        return changed

    def _is_known(self, layer: Layer) -> bool:
        """Whether a layer's parameters are those that are known and guarded, wherever they are held."""
        plain = layer.targets[0].parameter()
        if plain is None:
            known, today = self._of.get(layer, []), list(layer.parameters())
            same = len(known) == len(today) and all(a is b for a, b in zip(known, today, strict=True))
            return same and all(p in self._guards or not p.requires_grad for p in today)
        if self.layer_of(plain) is not layer:
            return False
        if len(layer.targets) > 1 and any(target.parameter() is not plain for target in layer.targets):
            return False
        return plain in self._guards or not plain.requires_grad

    def _split(self, layer: Layer) -> None:
        """A weight that was tied and has come apart: each part is a layer with the random parts of the whole,
        so that V stays, and follows its own W from now on."""
        parts: dict[int, list[Any]] = {}
        for target in layer.targets:
            parts.setdefault(id(target.parameter()), []).append(target)
        if len(parts) == 1:
            return
        layer.targets, *others = parts.values()
        feedback = layer.feedback
        for place, targets in enumerate(others, self._layers.index(layer) + 1):
            copy = feedback.like(feedback.rule, feedback.seed, feedback.draws, feedback.layer.name)
            self._layers.insert(place, Layer(targets, copy))

    def _merge(self) -> None:
        """Layers whose weights have become one share the first one's V, as weights do that were tied before.

        Raises:
            RuntimeError: they follow different rules.
        """
        by_weight: dict[int, Layer] = {}
        for layer in list(self._layers):
            if (plain := layer.targets[0].parameter()) is None:
                continue
            first = by_weight.setdefault(id(plain), layer)
            if first is layer:
                continue
            if first.feedback.rule != layer.feedback.rule:
                raise RuntimeError(
                    f"{first.info.name!r} and {layer.info.name!r} were tied after patching, but follow "
                    "different rules: remove the patch, and patch again with one rule for both"
                )
            first.targets = [*first.targets, *layer.targets]
            self._layers.remove(layer)
            self._forget(layer, [])

    def _learn(self, layer: Layer) -> None:
        layer.check()
        today = list(layer.parameters())
        self._forget(layer, today)
        self._of[layer] = today
        if (plain := layer.targets[0].parameter()) is not None:
            self._by_id[id(plain)] = (plain, layer)
        for weight in today:
            if weight.requires_grad and weight not in self._guards:
                self._guards[weight] = weight.register_hook(self._guard(layer))

    def _forget(self, layer: Layer, but: list[Tensor]) -> None:
        for weight in self._of.pop(layer, []):
            if any(weight is kept for kept in but):
                continue
            if self.layer_of(weight) is layer:
                del self._by_id[id(weight)]
            if (guard := self._guards.pop(weight, None)) is not None:
                guard.remove()

    def clear(self) -> None:
        """Takes the guards off, and forgets every parameter."""
        for guard in self._guards.values():
            guard.remove()
        self._by_id, self._of, self._guards = {}, {}, {}

    # --- tensors in calls ----------------------------------------------------------------------------------

    def layer_of(self, tensor: Tensor) -> Layer | None:
        """The layer whose plain weight this very tensor is."""
        known, layer = self._by_id.get(id(tensor), (None, None))
        return layer if known is tensor else None

    def find(self, tensor: Tensor, copies: Copies) -> Use | None:
        """What a tensor is of a patched weight: the whole, a view or a copy of it; None if nothing."""
        if (layer := self.layer_of(tensor)) is not None:
            return Use(layer, tensor)
        if (base := tensor._base) is not None and base.is_contiguous():
            if (layer := self.layer_of(base)) is not None:
                return Use(layer, base, _view(tensor, base))
            if copies and (use := _copied(base, copies)) is not None:
                # The copy is contiguous, as is what the function makes of V.
                return use._replace(part=_Viewed(use.part, _view(tensor, base)))
        return _copied(tensor, copies) if copies else None

    def storages(self) -> dict[int, tuple[Tensor, Layer]]:
        """Today's plain weights by the memory that they lie in."""
        found = ((storage_of(plain), plain, layer) for plain, layer in self._by_id.values())
        return {
            key: (plain, layer) for key, plain, layer in found if key is not None and plain.is_contiguous()
        }

    def parameters(self) -> Iterator[tuple[Tensor, Layer]]:
        """All that is known, with the layer to which it belongs."""
        for layer, known in self._of.items():
            for parameter in known:
                yield parameter, layer


def alias(tensor: Tensor, storages: dict[int, tuple[Tensor, Layer]]) -> Use | None:
    """What a tensor is of a weight with which it only shares memory: `.data`, `.detach()`, a view of them."""
    if isinstance(tensor, nn.Parameter) or (storage := storage_of(tensor)) not in storages:
        return None
    plain, layer = storages[storage]
    offset = tensor.storage_offset() - plain.storage_offset()
    return Use(layer, plain, _view(tensor, plain)) if 0 <= offset < plain.numel() else None


class _Viewed(NamedTuple):
    """A view of a part that is a copy."""

    part: Part | None
    view: View

    def of(self, v: Tensor) -> Tensor:
        """The same part of V."""
        return self.view.of(v if self.part is None else self.part.of(v))


def _view(tensor: Tensor, base: Tensor) -> View:
    return View(tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())


def _copied(tensor: Tensor, copies: Copies) -> Use | None:
    copy, use, version = copies.get(id(tensor), (None, None, None))
    return use if copy is tensor and copy._version == version else None


def note_copy(
    use: Use,
    copy: Any,
    copies: Copies,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Keeps in mind that `copy` is what a function of `COPYING` made of a weight or a part of it."""
    if isinstance(copy, Tensor) and copy._base is None:
        part = Copied(use.part, func, args[1:], kwargs)
        copies[id(copy)] = copy, use._replace(part=part), copy._version
