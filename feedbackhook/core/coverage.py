"""Find what the patch does not reroute, and report it by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from feedbackhook.core.audit import Finding, Weight, audit, graph_of, tensors_in
from feedbackhook.core.discovery import OWN, is_layer, layers_in
from feedbackhook.core.errors import ExactGradientError, exact_use, warn
from feedbackhook.core.marks import mark_of
from feedbackhook.core.mode import Mode, Running
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import own_child, requires_grad
from feedbackhook.core.weights import Weights


class Coverage:
    """The audits of a model's forwards, and the warnings and errors that follow from them.

    Args:
        root: the patched model.
        state: the patch's.
        weights: the parameters of the patched layers.
    """

    def __init__(self, root: nn.Module, state: PatchState, weights: Weights) -> None:
        self._root = root
        self._state = state
        self._weights = weights
        self._known_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet(layers_in(root).values())
        self._warned: set[str] = set()
        self._tree = [_place_in(root, name) for name in state.paths() if name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known_layers": list(self._known_layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known_layers = weakref.WeakSet(state["_known_layers"])

    def audit(self, nodes: Iterable[Any], since: int = 0) -> list[Finding]:
        """Return what a graph does with weights of this model, see `feedbackhook.core.audit`."""
        patched_modules = {target.place.module for layer in self._state.layers for target in layer.targets}
        held = {
            id(parameter)
            for module in self._root.modules()
            if is_layer(module)
            for name, parameter in module.named_parameters(recurse=False)
            if module not in patched_modules or name in OWN
        }
        parameters = dict(self._root.named_parameters())
        weights = {
            id(parameter): Weight(name, False, tuple(parameter.shape))
            for name, parameter in parameters.items()
            if id(parameter) not in held and parameter.dim() > 1
        }
        patched = list(self._weights.parameters())
        weights |= {
            id(p): Weight(layer.info.name, True, tuple(p.shape), layer.compiled)
            for p, layer in (*patched, *self._weights.buffers())
        }
        own = (*parameters.values(), *self._root.buffers(), *(p for p, _ in patched))
        return audit(nodes, weights, own, since)

    def audit_all(self, nodes: Iterable[Any]) -> list[Finding]:
        """Return what a graph does with the model's matrices, whether they belong to layers or not."""
        parameters = dict(self._root.named_parameters())
        weights = {
            id(parameter): Weight(name, True, tuple(parameter.shape))
            for name, parameter in parameters.items()
            if parameter.dim() > 1
        }
        return audit(nodes, weights, (*parameters.values(), *self._root.buffers()))

    def audit_forward(self, mode: Mode, outermost: Running, inputs: object, output: object) -> bool:
        """Audit the graph of a forward that did something new: it called a function for the first time, or
        was the first in this training mode, or the first with inputs that require a gradient.

        Returns:
            Whether there was an audit, after which the backward is audited as well.

        Raises:
            ExactGradientError: the forward uses a patched weight without rerouting.
        """
        grad_of_inputs = any(requires_grad(tensor) for tensor in tensors_in(inputs, objects=False))
        kind = (outermost.module.training, grad_of_inputs)
        if not self._state.enabled or (not mode.new and kind in outermost.mark.audited):
            return False
        # Where the sites are the inputs of modules, backprop is exact inside them.
        nodes = graph_of(output) if self._state.layers else []
        findings = self.audit(nodes, mode.since) if nodes else []
        if self._state.layers:
            self._warn_of_new_layers()
        if patched := [finding for finding in findings if finding.patched]:
            self.look_again()
            raise exact_use(patched[0].name, patched[0].operation)
        self._warn_of_unpatchable(findings)
        outermost.mark.audited.add(kind)
        for seen, function in mode.new:
            seen.add(function)
        return True

    def look_again(self) -> None:
        """Audit the next forwards as if they were the first."""
        for module in self._root.modules():
            if (mark := mark_of(module)) is not None:
                mark.seen.clear()
                mark.audited.clear()

    def check_tree(self) -> None:
        """Raise if a patched module is no longer in the model, since its replacement would be exact."""
        if all(own_child(parent, name) is child for parent, name, child in self._tree):
            return
        present = {id(module) for module in self._root.modules()}
        for layer in self._state.layers:
            for target in layer.targets:
                if id(target.place.module) not in present:
                    raise RuntimeError(
                        f"{target.info.name!r} was replaced after patching, and its replacement would have "
                        "exact backprop: remove the patch, then patch again"
                    )
        for site in self._state.sites:
            if id(site.module) not in present:
                raise RuntimeError(
                    f"the site {site.info.name!r} was replaced after patching, and its replacement would "
                    "pass on the exact error: remove the patch, then patch again"
                )

    def patched_modules(self) -> set[nn.Module]:
        """Return all modules that may carry a mark, including those that are no longer in the model."""
        patched = (target.place.module for layer in self._state.layers for target in layer.targets)
        return {*self._root.modules(), *patched, *(child for _, _, child in self._tree)}

    def check_opaque(self, ended: Running, output: object) -> None:
        """Raise if a layer ran without a rerouted call and its weight leaves no trace in the graph: it is not
        a plain dense tensor, which a kernel may use out of sight, or comes from no parameter."""
        layer = self._state.own.get(ended.mark.path)
        if layer is None or layer.calls > ended.calls or not self._state.enabled:
            return
        opaque = layer.is_opaque()
        if (opaque or layer.is_constant()) and graph_of(output):
            stored = f"as {layer.weight_type()}" if opaque else "in no parameter"
            raise ExactGradientError(
                f"{layer.info.name!r} ran without a call that could be rerouted: it stores its weight "
                f"{stored} and computes with it where the patch cannot see it. Pass "
                f"exclude={[layer.info.name]} to feedbackhook.patch to leave it exact"
            )

    def warn_of_unknown_weight(self, function: str, weight: Tensor) -> None:
        """Warn if a call's weight may come from a frozen one. A frozen weight leaves no trace in what is
        computed from it, so that is all that can be said."""
        if not self._state.enabled or weight.requires_grad or isinstance(weight, nn.Parameter):
            return
        key = f"{function} {tuple(weight.shape)}"
        if key in self._warned or any(weight is buffer for buffer in self._root.buffers()):
            return
        frozen = [
            layer
            for p, layer in self._weights.parameters()
            if not p.requires_grad and p.numel() == weight.numel()
        ]
        if not frozen:
            return
        self._warned.add(key)
        warn(
            f"{function} is called with a weight of shape {tuple(weight.shape)} of unknown origin. If it was "
            f"computed from the frozen weight of {frozen[0].info.name!r}, its error signal is exact; make "
            "that weight require a gradient to have it followed"
        )

    def _warn_of_unpatchable(self, findings: list[Finding]) -> None:
        new = [finding for finding in findings if finding.name not in self._warned]
        if new:
            self._warned.update(finding.name for finding in new)
            names = ", ".join(f"{finding.name!r} ({finding.operation})" for finding in new)
            warn(
                "these weights belong to no layer that can be patched, so their error signals stay exact: "
                f"{names}"
            )

    def _warn_of_new_layers(self) -> None:
        new = {
            name: module for name, module in layers_in(self._root).items() if module not in self._known_layers
        }
        if new:
            self._known_layers.update(new.values())
            names = ", ".join(map(repr, new))
            warn(
                f"these layers were added after patching, so their error signals stay exact: {names}. To "
                "reroute them, remove the patch, then patch again"
            )


def _place_in(root: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """Return a module's parent, its name there, and the module."""
    parent, _, key = name.rpartition(".")
    return root.get_submodule(parent), key, root.get_submodule(name)
