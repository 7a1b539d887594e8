"""The error at the network's output, and its way to the sites of direct rules.

A `Forward` belongs to one forward of the model. The nodes of its graph hold it, and the model does not, so
two forwards before one backward keep their own errors. A hook on the output stores the error e of each
running backward; autograd runs it before any node that the output was computed from. Each site's node holds a
`Delivery`, which turns e into the error signal of that site.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from feedbackhook.core.audit import tensors_in
from feedbackhook.core.layer import Patched
from feedbackhook.core.projection import Place, Projection, Use
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import (
    Node,
    after_backward,
    backward_roots,
    compiler_is_loaded,
    current_backward,
    transformed,
)

OUTPUT = "feedbackhook.output"
"""The key in a node's metadata that marks the output of a forward."""


class Forward:
    """One forward of the model.

    Args:
        state: the patch's.
        whole: the forward that this one is a part of, once that is known: a checkpoint recomputes a part.
        backward: the backward that recomputes it; None is the one that runs when the error is asked for.
    """

    def __init__(self, state: PatchState, whole: Forward | None = None, backward: int | None = None) -> None:
        self.state = state
        self.shape: tuple[int, ...] | None = None
        self.targets: Tensor | None = None
        self.part_of = whole
        self.backward = backward
        self.errors: dict[int, Tensor] = {}
        self._sites: list[tuple[str, Projection, Place, Tensor]] = []
        self._widths: dict[int, int] = {}

    def again(self) -> Forward:
        """Return this forward for the part of it that a checkpoint recomputes in the running backward."""
        return Forward(self.state, self, current_backward())

    # --- in the forward ------------------------------------------------------------------------------------

    def site(self, patched: Patched, projection: Projection, place: Place, like: Tensor) -> Delivery:
        """Return how the error comes to a site that runs now.

        Args:
            patched: the site.
            projection: its B.
            place: where its input has its batch and its features.
            like: a tensor of the dtype that B is kept in, on the site's device.

        Raises:
            RuntimeError: the output has run already, the site's batch differs from its, or a transform of
                torch.func is active.
        """
        name = patched.info.name
        if transformed():
            raise RuntimeError(
                f"direct feedback cannot reach {name!r} under a transform of torch.func, which hides the "
                "output's gradient; set patch.enabled = False for it"
            )
        if self.shape is not None:
            raise RuntimeError(
                f"{name!r} ran after {self.output()}, so the gradient of that output comes too late for it; "
                f"pass exclude=[{name!r}] to feedbackhook.patch, or another output="
            )
        if (whole := self.whole()).shape is not None:
            whole.recomputed(name, projection, place, like)
        else:
            self._sites.append((name, projection, place, like))
        return Delivery(self, patched, copy.copy(projection), place, like)

    def end(self, output: Any, examine: bool = False) -> None:
        """The module whose output's gradient is sent has run.

        Args:
            output: what it returned.
            examine: whether to find out which sites the error from above gets past.

        Raises:
            TypeError: it returned no tensor, and nothing with a tensor `logits`.
            RuntimeError: it ran before in this forward; a site has another batch, or has not run at all.
            ValueError: the targets do not fit the output.
        """
        if self.part_of is not None and self.whole().shape is not None:
            return  # a checkpoint recomputes an output that is known
        tensor = _tensor_of(output)
        if tensor is None:
            raise TypeError(
                f"{self.output()} is a {type(output).__name__}, but direct feedback needs the gradient of "
                "one tensor: a tensor, or the `logits` of a mapping or an object. Name a module that returns "
                "one with output= in feedbackhook.patch"
            )
        if self.shape is not None:
            raise RuntimeError(
                f"{self.output()} ran twice in one forward, so it has two gradients; name a module that runs "
                "once with output= in feedbackhook.patch"
            )
        if not tensor.requires_grad or tensor.grad_fn is None:
            return
        if missing := [site.info.name for site in self.state.sites if not site.ran]:
            raise RuntimeError(
                f"these sites have not run: {', '.join(map(repr, missing))}, so no error would reach what is "
                "before them, or it would get there by another path. Choose modules that the model calls, "
                "with sites= in feedbackhook.patch"
            )
        self.shape = tuple(tensor.shape)
        try:
            self._adopt(tensor.grad_fn)
            self._take_targets()
            self._check([(name, place) for name, _, place, _ in self._sites])
            for _, projection, place, like in self._sites:
                projection.last = self.use(projection, place, like)
                projection.learn(projection.last)
        except (RuntimeError, ValueError):
            self.shape = None
            raise
        if examine:
            find_bypassed(tensor.grad_fn)
        tensor.register_hook(self._arrived)
        node: Node = tensor.grad_fn
        node.metadata[OUTPUT] = True

    def close(self) -> None:
        """The outermost module has returned. A forward without an output may be a part of another one, as
        when a training step calls the parts of a model."""
        if self.shape is None and self.part_of is None and self._sites:
            self.state.parts.add(self)

    def _adopt(self, output: Node) -> None:
        """Take the parts that this forward's output was computed from."""
        if not self.state.parts:
            return
        for node in walk([output]):
            delivery = getattr(node, "delivery", None)
            if delivery is not None and (part := delivery.forward) in self.state.parts:
                self.state.parts.discard(part)
                self._sites += part.join(self)

    def join(self, whole: Forward) -> list[tuple[str, Projection, Place, Tensor]]:
        """Become a part of a forward that has an output, and return the sites that ran in this part."""
        self.part_of = whole
        return self._sites

    def _take_targets(self) -> None:
        self.targets, self.state.targets = self.state.targets, None
        if self.targets is not None and self.shape is not None and self.targets.shape != self.shape[:-1]:
            raise ValueError(
                f"patch.targets got classes of shape {tuple(self.targets.shape)}, but the output of shape "
                f"{self.shape} needs shape {self.shape[:-1]}"
            )

    def recomputed(self, name: str, projection: Projection, place: Place, like: Tensor) -> None:
        """A site runs again in a checkpoint, or for the first time if that is reentrant.

        Raises:
            RuntimeError: as in `_check`, or its width changes the matrix that others have used already.
        """
        before = dict(self._widths)
        self._check([(name, place)])
        if projection.rule.shared and self._widths != before:
            raise RuntimeError(
                f"{name!r} is the widest site, which a reentrant checkpoint hides until others have used the "
                "shared matrix; checkpoint with use_reentrant=False"
            )
        projection.last = self.use(projection, place, like)

    def _check(self, sites: Sequence[tuple[str, Place]]) -> None:
        """Check that the batches of the output and of sites agree, and note how wide the sites are.

        Raises:
            RuntimeError: some do not.
        """
        assert self.shape is not None
        differ: dict[str, Place] = {}
        for name, place in sites:
            fits = place.fit(self.shape)
            if fits is None:
                differ.setdefault(name, place)
            else:
                self._widths[fits.source] = max(fits.features, self._widths.get(fits.source, 0))
        if differ:
            name, place = next(iter(differ.items()))
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            larger = "put sites at the inputs of larger modules with sites= in feedbackhook.patch"
            hint = larger if self.state.sites else f"pass exclude={list(differ)}, or {larger}"
            raise RuntimeError(
                f"the batches of {self.output()} and of the input of {name!r}{more} differ (their shapes are "
                f"{self.shape} and {place.shape}), so no error belongs to its samples; {hint}"
            )

    # --- in the backward -----------------------------------------------------------------------------------

    def _arrived(self, error: Tensor) -> None:
        """The hook on the output: store the error of the running backward until it ends."""
        running = current_backward()
        if (name := _bypassing_site()) is not None and not self.state.exact and self.state.enabled:
            raise RuntimeError(
                f"a part of this loss does not come from {self.output()}: it reaches {name!r} by another "
                "path, and direct feedback would lose its gradient. Compute the loss from that output alone, "
                "or name another module with output= in feedbackhook.patch"
            )
        self.errors[running] = error.detach()
        self.state.heard.note(running)
        after_backward(lambda: self._forget(running))

    def hear(self, output: object) -> None:
        """Let a backward through what a checkpoint has recomputed count as one that came from the output, if
        the backward around it did."""
        around = self.backward
        if around is None or not self.state.heard.has(around):
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.state.heard.note(current_backward()))

    def _forget(self, backward: int) -> None:
        self.errors.pop(backward, None)

    def error(self, name: str) -> Tensor:
        """Return e in the running backward.

        Raises:
            RuntimeError: this backward did not come through the output, or the output never ran.
        """
        top, running = self, None
        while top.part_of is not None:
            running = running if top.backward is None else top.backward  # the outermost backward
            top = top.part_of
        error = top.errors.get(current_backward() if running is None else running)
        if error is not None:
            return error
        if top.shape is None:
            raise RuntimeError(
                f"{name!r} ran in a forward that {self.output()} was not computed from, so there is no "
                "output's error to send. Call the model itself, or name a module that is called with output= "
                f"in feedbackhook.patch{if_compiled()}"
            )
        raise RuntimeError(
            f"this loss reaches {name!r}, but does not come from {self.output()}, so there is no output's "
            "error to send; compute the loss from that output, or name another module with output= in "
            "feedbackhook.patch"
        )

    def whole(self) -> Forward:
        """Return the forward that has the output."""
        return self if self.part_of is None else self.part_of.whole()

    def use(self, projection: Projection, place: Place, like: Tensor) -> Use:
        """Return what a projection is needed for in this forward, whose output is known."""
        fits = None if self.shape is None else place.fit(self.shape)
        assert fits is not None  # checked in the forward
        widest = self._widths[fits.source]
        return Use(fits, widest if projection.rule.shared else fits.features, like)

    def output(self) -> str:
        """Return how messages call the output's module."""
        return f"the output of {self.state.output!r}" if self.state.output else "the model's output"


class Delivery(NamedTuple):
    """How the error comes to one call of a site.

    Args:
        forward: the forward of this call.
        patched: the site.
        projection: its B, as it was in the forward.
        place: where its input has its batch and its features.
        like: a tensor of the dtype that B is kept in, on the site's device.
    """

    forward: Forward
    patched: Patched
    projection: Projection
    place: Place
    like: Tensor

    def send(self) -> Tensor:
        """Return the site's error signal in the running backward, in the shape of its input."""
        error = self.forward.error(self.patched.info.name)
        whole = self.forward.whole()
        signal = self.projection.rule.signal(error, whole.targets)
        sent = self.projection.send(signal, whole.use(self.projection, self.place, self.like))
        return self.place.back(sent, error.shape)

    def gradient(self, input: Tensor) -> Tensor:
        """Return the gradient of the site's learned B in the running backward.

        Args:
            input: what enters the site.
        """
        error = self.forward.error(self.patched.info.name)
        whole = self.forward.whole()
        use = whole.use(self.projection, self.place, self.like)
        signal = self.projection.rule.signal(error, whole.targets)
        site = self.place.rows(input, error.shape, use.fits.features)
        return self.projection.gradient(site, signal, use)


def if_compiled() -> str:
    """Return what to add to an error that compiled code may be the reason for."""
    return ". A compiled model must run uncompiled" if compiler_is_loaded() else ""


def comes_from_output(roots: Iterable[Node]) -> bool:
    """Whether a graph contains the output of a forward."""
    stack, seen = list(roots), set[Node]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if OUTPUT in node.metadata:
            return True
        seen.add(node)
        stack += [earlier for earlier, _ in node.next_functions]
    return False


def walk(roots: Iterable[Node]) -> Iterator[Node]:
    """Yield the nodes of a graph, each once, from its roots up to the outputs of forwards."""
    stack, seen = list(roots), set[Node]()
    while stack:
        node = stack.pop()
        if node is None or node in seen or OUTPUT in node.metadata:
            continue
        seen.add(node)
        yield node
        stack += [earlier for earlier, _ in node.next_functions]


def _bypassing_site() -> str | None:
    """Return the name of a site that the running backward reaches without passing an output, if there is one.

    In the usual case this visits the few nodes between the loss and the output.
    """
    for node in walk(backward_roots() or ()):
        delivery = getattr(node, "delivery", None)
        if delivery is not None:
            name: str = delivery.patched.info.name
            return name
    return None


def find_bypassed(output: Node) -> None:
    """Record for each site of a graph whether the error from above also gets to something before the site by
    a path that does not pass it.

    Args:
        output: the output's node, not marked yet.
    """
    calls: dict[Patched, list[Node]] = {}
    for node in walk([output]):
        if (delivery := getattr(node, "delivery", None)) is not None:
            calls.setdefault(delivery.patched, []).append(node)
    for patched, edges in calls.items():
        without = set(_before([output], edges))
        sources = [edge.next_functions[edge.input_at][0] for edge in edges]
        patched.bypassed = any(node in without for node in _before(sources, ()))


def _before(roots: Iterable[Node], cut: Sequence[Node]) -> Iterator[Node]:
    """Yield the inner nodes of a graph from its roots to its leaves, without passing the inputs of the sites
    whose edges are `cut`."""
    stack, seen = list(roots), set[Node]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        earlier = [before for before, _ in node.next_functions]
        if earlier:  # leaves are parameters, which several layers may share
            yield node
        stack += [before for at, before in enumerate(earlier) if node not in cut or at != node.input_at]


def _tensor_of(output: Any) -> Tensor | None:
    """Return the tensor whose gradient is sent: the output itself, or its logits."""
    if not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None
