"""Which layer a tensor belongs to: the current parameters of the patched modules, their parts and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.layer import Layer
from feedbackhook.core.memory import Memory
from feedbackhook.core.parts import Copied, Part, View, ViewOfCopy
from feedbackhook.core.torch_internals import attach_hooks_again, base_of, contents_of, version_of


class Use(NamedTuple):
    """What a call uses: a layer's weight, or a part of it."""

    layer: Layer
    weight: Tensor
    part: Part | None = None


Copies = dict[int, tuple[Tensor, Use, int]]
"""By the id of a copy: the copy itself (so that no other tensor gets its id), what it is a copy of, and its
version, since a tensor changed in place is no longer a copy."""


class Weights:
    """The parameters of the patched layers, and a guard on each trainable one.

    Args:
        layers: the patched layers. The list changes if weights are tied or untied.
        guard: returns the hook for a layer's parameter.
    """

    def __init__(self, layers: list[Layer], guard: Callable[[Layer], Callable[[Tensor], None]]) -> None:
        self._layers = layers
        self._guard = guard
        self._by_id: dict[int, tuple[Tensor, Layer]] = {}
        self._of: dict[Layer, list[Tensor]] = {}
        self._guards: dict[Tensor, tuple[RemovableHandle, int]] = {}  # and the contents that are guarded

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles find their own parameters."""
        return {**self.__dict__, "_by_id": {}, "_of": {}, "_guards": {}}

    # --- current parameters --------------------------------------------------------------------------------

    def update(self, layers: Iterable[Layer]) -> bool:
        """Make sure that the current parameters of these layers are known and guarded.

        Copies, `assign=True` and `to_empty` bring new parameters, and may tie or untie them.

        Returns:
            Whether something has changed.
        """
        changed = False
        for layer in [layer for layer in layers if not self._is_known(layer)]:
            if layer in self._layers:  # it may have been merged a moment ago
                changed = True
                self._split(layer)
        if changed:
            self._merge()
            for layer in [layer for layer in self._layers if not self._is_known(layer)]:
                self._learn(layer)
        return changed

    def _is_known(self, layer: Layer) -> bool:
        """Whether a layer's parameters are known and guarded in all the places that hold them."""
        plain = layer.targets[0].place.parameter()
        if plain is None:
            known, today = self._of.get(layer, []), list(layer.parameters())
            same = len(known) == len(today) and all(a is b for a, b in zip(known, today, strict=True))
            return same and all(self._is_guarded(p) or not p.requires_grad for p in today)
        if self.layer_of(plain) is not layer or layer.has_other_shape():
            return False
        if len(layer.targets) > 1 and any(target.place.parameter() is not plain for target in layer.targets):
            return False
        return self._is_guarded(plain) or not plain.requires_grad

    def _is_guarded(self, parameter: Tensor) -> bool:
        _, contents = self._guards.get(parameter, (None, None))
        return contents == contents_of(parameter)

    def _split(self, layer: Layer) -> None:
        """Split a layer whose tied weight was untied. Each new layer keeps the random parts, so that V stays,
        and follows its own W from now on."""
        parts: dict[int, list[Any]] = {}
        for target in layer.targets:
            parts.setdefault(id(target.place.parameter()), []).append(target)
        if len(parts) == 1:
            return
        layer.targets, *others = parts.values()
        for place, targets in enumerate(others, self._layers.index(layer) + 1):
            self._layers.insert(place, Layer(targets, layer.feedback.copy()))

    def _merge(self) -> None:
        """Merge layers whose weights were tied, so that they share the first one's V.

        Raises:
            RuntimeError: they follow different rules.
        """
        by_weight: dict[int, Layer] = {}
        for layer in list(self._layers):
            if (plain := layer.targets[0].place.parameter()) is None:
                continue
            first = by_weight.setdefault(id(plain), layer)
            if first is layer:
                continue
            if first.feedback.rule != layer.feedback.rule:
                raise RuntimeError(
                    f"{first.info.name!r} and {layer.info.name!r} were tied after patching, but follow "
                    "different rules: remove the patch, then patch again with one rule for both"
                )
            first.targets = [*first.targets, *layer.targets]
            self._layers.remove(layer)
            self._forget(layer, [])

    def _learn(self, layer: Layer) -> None:
        layer.check()
        layer.describe()
        today = list(layer.parameters())
        self._forget(layer, today)
        self._of[layer] = today
        if (plain := layer.targets[0].place.parameter()) is not None:
            self._by_id[id(plain)] = (plain, layer)
        for weight in today:
            if weight.requires_grad and not self._is_guarded(weight):
                self._protect(weight, layer)

    def _protect(self, weight: Tensor, layer: Layer) -> None:
        if weight in self._guards:
            guard, _ = self._guards[weight]
            attach_hooks_again(weight)
        else:
            guard = weight.register_hook(self._guard(layer))
        self._guards[weight] = guard, contents_of(weight)

    def _forget(self, layer: Layer, but: list[Tensor]) -> None:
        for weight in self._of.pop(layer, []):
            if any(weight is kept for kept in but):
                continue
            if self.layer_of(weight) is layer:
                del self._by_id[id(weight)]
            if weight in self._guards:
                guard, _ = self._guards.pop(weight)
                guard.remove()

    def clear(self) -> None:
        """Remove the guards and forget all parameters."""
        for guard, _ in self._guards.values():
            guard.remove()
        self._by_id, self._of, self._guards = {}, {}, {}

    # --- tensors in calls ----------------------------------------------------------------------------------

    def layer_of(self, tensor: Tensor) -> Layer | None:
        """Return the layer whose plain weight is this very tensor."""
        known, layer = self._by_id.get(id(tensor), (None, None))
        return layer if known is tensor else None

    def find(self, tensor: Tensor, copies: Copies) -> Use | None:
        """Return which part of a patched weight a tensor is: all of it, a view or a copy; None if no part."""
        if (layer := self.layer_of(tensor)) is not None:
            return Use(layer, tensor)
        if (base := base_of(tensor)) is not None and base.is_contiguous():
            if (layer := self.layer_of(base)) is not None:
                return Use(layer, base, View.between(tensor, base))
            if copies and (use := _copied(base, copies)) is not None:
                # The copy is contiguous, and so is what the function makes of V.
                return use._replace(part=ViewOfCopy(use.part, View.between(tensor, base)))
        return _copied(tensor, copies) if copies else None

    def memory(self) -> Memory[tuple[Tensor, Layer]]:
        """Return the current plain weights, by the memory that they occupy."""
        plain = [*self._by_id.values(), *self.buffers()]
        return Memory((tensor, (tensor, layer)) for tensor, layer in plain if tensor.is_contiguous())

    def buffers(self) -> Iterator[tuple[Tensor, Layer]]:
        """Yield the weights that are buffers, each with its layer."""
        for layer in self._layers:
            if (buffer := layer.targets[0].place.buffer()) is not None:
                yield buffer, layer

    def parameters(self) -> Iterator[tuple[Tensor, Layer]]:
        """Yield all known parameters, each with its layer."""
        for layer, known in self._of.items():
            for parameter in known:
                yield parameter, layer


def alias(tensor: Tensor, memory: Memory[tuple[Tensor, Layer]]) -> Use | None:
    """Return which part of a weight a tensor is that only shares its memory: `.data`, `.detach()`, a view."""
    if isinstance(tensor, nn.Parameter):
        return None
    for plain, layer in memory.sharing(tensor):
        if tensor.storage_offset() >= plain.storage_offset() and tensor.dtype == plain.dtype:
            return Use(layer, plain, View.between(tensor, plain))
    return None


def _copied(tensor: Tensor, copies: Copies) -> Use | None:
    copy, use, version = copies.get(id(tensor), (None, None, None))
    return use if copy is tensor and version_of(copy) == version else None


def note_copy(
    use: Use,
    copy: Any,
    copies: Copies,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Remember that `copy` is what a function in `COPYING` made of a weight or of a part of it."""
    if isinstance(copy, Tensor) and base_of(copy) is None:
        part = Copied(use.part, func, args[1:], kwargs)
        copies[id(copy)] = copy, use._replace(part=part), version_of(copy)
