"""The handle that `feedbackhook.patch` returns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.audit import Finding, graph_of
from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.interception import Interceptor
from feedbackhook.core.layer import Layer, Patched, Probe
from feedbackhook.core.projection import Projection
from feedbackhook.core.state import PatchState
from feedbackhook.listing import table
from feedbackhook.monitor import Watch
from feedbackhook.rules import (
    changed,
    check_layers,
    describe,
    follow,
    make_rule,
    restored,
    rule_name,
    rule_values,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.store.recorder import Recorder


@dataclass(frozen=True)
class LayerRow:
    """One row of `Patch.layers`: a patched layer, or a site at a module's input, and what has happened to it.

    Args:
        info: the layer's name, kind, weight shape and fan-in. A tied weight is named after the first module
            that holds it.
        rule: the rule, with the options that differ from their defaults.
        calls: number of forward calls with gradients enabled.
        rerouted: number of error signals that went through V or B.
        input_requires_grad: whether the layer's input required a gradient. If not, as in most first layers,
            there is no error signal to reroute. None before the first call.
        depth: position, from 0, in the order of the forward's calls. None before the first call.
    """

    info: LayerInfo
    rule: str
    calls: int
    rerouted: int
    input_requires_grad: bool | None
    depth: int | None

    @property
    def name(self) -> str:
        """The layer's full name."""
        return self.info.name

    @property
    def kind(self) -> str:
        """The layer's kind, such as "Linear" or "Conv2d"."""
        return self.info.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.info.shape


class Patch:
    """The handle of a patched model, returned by `feedbackhook.patch`. It is a context manager that removes
    the patch at the end."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the patch, with all its hooks and attributes. Graphs that exist already keep their V."""
        self._interceptor.detach()

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._interceptor.root

    @property
    def state(self) -> PatchState:
        """The patch's internal state, which listeners subscribe to."""
        return self._interceptor.state

    @property
    def enabled(self) -> bool:
        """Whether forwards are rerouted. If set to False, later forwards build plain backprop graphs."""
        return self.state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.state.enabled = bool(value)

    def exact(self) -> AbstractContextManager[None]:
        """Return a context in which `backward` runs plain backprop on graphs built with the patch.

        Raises:
            RuntimeError: the model was compiled, which fixes what its backward does.
        """
        return self.state.exact_backward()

    def set(self, **options: Any) -> None:
        """Change options of the rule, also during training: `patch.set(concordance=0.5)`.

        If layers follow different rules, this changes the rules that have all of these options.

        Raises:
            TypeError: no rule has these options, or a value has the wrong type. Nothing is changed.
            ValueError: a value is out of range. Nothing is changed.
        """
        patched = self.state.patched
        having = [each for each in patched if options.keys() <= rule_values(each.feedback.rule).keys()]
        old = {id(each.feedback.rule): each.feedback.rule for each in having or patched}
        new = {key: changed(rule, options) for key, rule in old.items()}
        rules = [new[id(each.feedback.rule)] for each in having]
        check_layers((each.info, rule) for each, rule in zip(having, rules, strict=True))
        for each, rule in zip(having, rules, strict=True):
            follow(each.feedback, rule)
        for each in having:
            each.draw()

    def redraw(self) -> None:
        """Draw the random parts of every V and B again, as `redraw="update"` does after optimizer steps."""
        for each in self.state.patched:
            each.feedback.redraw()
        for each in self.state.patched:
            each.draw()

    def targets(self, classes: Tensor) -> None:
        """Give the next forward the classes of its samples, for the rule "DRTP".

        Args:
            classes: integers in the shape of the output without its last dimension; negative: ignored.

        Raises:
            TypeError: they are no integers.
        """
        if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.is_complex():
            raise TypeError("targets must be a tensor of integers, the classes of the next forward's samples")
        self.state.targets = classes.detach()

    def feedback(self, name: str) -> Tensor:
        """Return a layer's current V, detached, in the layout of its weight.

        Raises:
            KeyError: no patched layer has that name.
            ValueError: the layer follows a direct rule, which has no V.
        """
        layer = self._layer(name)
        if not isinstance(layer.feedback, Feedback):
            raise ValueError(
                f"{name!r} follows {rule_name(layer.feedback.rule)}, which has no V; "
                f"patch.projection({name!r}) returns its B"
            )
        return layer.feedback(layer.weight()).clone()

    def projection(self, name: str) -> Tensor:
        """Return the current B of a layer or module that follows a direct rule, as its last forward needs it.

        Its shape is (D, K): D features of the site's input, K numbers of the output's error signal, in each
        sample or position.

        Raises:
            KeyError: nothing that is patched has that name.
            ValueError: it follows no direct rule, or has not run yet, so that the shape of B is not known.
        """
        found = self._patched(name)
        if not isinstance(found.feedback, Projection):
            raise ValueError(f"{name!r} follows {rule_name(found.feedback.rule)}, which has no B")
        if found.feedback.last is None:
            raise ValueError(f"{name!r} has no B before its first forward, which tells the shape of B")
        return found.feedback.matrix(found.feedback.last).clone()

    def weight(self, name: str) -> Tensor:
        """Return a layer's current W, detached, as its forward uses it.

        Raises:
            KeyError: no patched layer has that name.
        """
        return self._layer(name).weight().detach()

    def on_error_signal(self, name: str, fn: Probe) -> RemovableHandle:
        """Call `fn(grad_input, grad_output)` for each error signal that passes a layer or site.

        `grad_output` is the gradient with respect to the layer's output. `grad_input` is the gradient with
        respect to its input, computed with V or B, or None if the input requires no gradient. For a site at a
        module's input, both are at this input: what arrives there from the module, and what is sent on.

        Returns:
            A handle whose `remove()` stops the calls.

        Raises:
            KeyError: nothing that is patched has that name.
        """
        probes = self._patched(name).probes
        handle = RemovableHandle(probes)
        probes[handle.id] = fn
        return handle

    def audit(self, output: object) -> list[Finding]:
        """Search the graph of an output, or of a loss, for weights that pass error signals on exactly.

        This also happens automatically in the first forward in which a module calls a function for the first
        time, and in the backward that follows. There, a patched weight raises an error and any other weight
        gives a warning.

        Args:
            output: a tensor, or tensors in tuples, lists, mappings or dataclasses, with their graph.

        Returns:
            A finding for each weight and operation; an empty list if all is well. A finding tells the
            weight's name and shape, whether a patched layer holds it (otherwise it belongs to no layer that
            can be patched), and the operation as the graph names it.

        Raises:
            ValueError: the output has no graph.
        """
        if not (nodes := graph_of(output)):
            raise ValueError("the output has no graph: was it made without gradients, or detached?")
        return self._interceptor.coverage.audit(nodes)

    def watch(
        self,
        every: int,
        recorder: Recorder,
        *,
        step: int = 0,
        per_sample: bool = False,
        group: ProcessGroup | None = None,
    ) -> Watch:
        """Measure during training, in every `every`-th step of the optimizer, the first included.

        The rows that go to `recorder` are those of `feedbackhook.measure` except `gradient_angle`, the norms
        of weights and gradients, and the learning rate. They have the number of steps done before and
        `recorder.epoch`, which you set. With gradient accumulation, all backwards before a step count for it.
        Training is not affected; a recorded step takes one more product of each error signal, with W.

        Args:
            every: record every N optimizer steps.
            recorder: receives the rows.
            step: number of steps done already, for a run that resumes.
            per_sample: as in `feedbackhook.measure`.
            group: a torch.distributed group whose ranks hold parts of one batch. Error angles are then those
                of all samples, and every rank must record the same steps. Without it they are those of this
                rank.

        Returns:
            A handle whose `remove()` stops the measurements. Removing the patch stops them too.

        Raises:
            ValueError: `every` or `step` is out of range.
            RuntimeError: the patch is removed. Later, from the optimizer's step: the model or the step runs
                as compiled code, which shows nothing; the step runs its own backward (`step(closure)`) or
                lies inside one; or two optimizers step after a backward each.
        """
        if not self._interceptor.attached:
            raise RuntimeError("this patch is removed, so there is nothing to watch")
        return Watch(self, every, recorder, step, per_sample, group)

    @property
    def layers(self) -> list[LayerRow]:
        """A row for each patched layer, then one for each site at a module's input, in the order in which the
        model registers them."""
        return [
            LayerRow(
                each.info,
                describe(each.feedback.rule),
                each.calls,
                each.rerouted,
                each.input_requires_grad,
                each.depth,
            )
            for each in self.state.patched
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return all that determines V and B, in plain types (and the user's tensors, for mode "tensor").

        `torch.load(weights_only=True)` can load it. Random parts are not stored, since they follow from the
        seed and the draw counts.
        """
        layers = {
            each.info.name: {
                "mode": rule_name(each.feedback.rule),
                "options": rule_values(each.feedback.rule),
                "seed": each.feedback.seed,
                "draws": each.feedback.draws,
                "drawn_as": each.feedback.layer.name,  # differs from the name after weights were untied
            }
            for each in self.state.patched
        }
        return {"enabled": self.enabled, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on a patch of the same layers.

        Raises:
            ValueError: the layers differ, or the places that direct rules take errors from and send them to.
                Nothing is changed.
        """
        own = {each.info.name: each for each in self.state.patched}
        saved = state["layers"]
        if own.keys() != saved.keys():
            missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
            raise ValueError(f"the state lacks the layers {missing} and has the unknown layers {unknown}")
        feedbacks = {
            name: restored(
                own[name].feedback,
                make_rule(row["mode"], row["options"]),
                row["seed"],
                row["draws"],
                row.get("drawn_as"),
            )
            for name, row in saved.items()
        }
        for name, feedback in feedbacks.items():
            own[name].feedback = feedback
        for each in self.state.patched:
            each.draw()
        self.enabled = state["enabled"]

    def name_of(self, module: nn.Module) -> str | None:
        """Return the full name of a module in the patched model, or None if it is not part of the model."""
        return next((name for name, part in self.model.named_modules() if part is module), None)

    def __repr__(self) -> str:
        sites = f", {len(self.state.sites)} sites" if self.state.sites else ""
        layers = f", {len(self.state.layers)} layers" if self.state.layers or not sites else ""
        return f"<feedbackhook.Patch of {type(self.model).__name__}{layers}{sites}>"

    def __str__(self) -> str:
        """Return a table of what is patched, with rules and counts, then the layers left exact, or the memory
        of all B."""
        return table(self.model, self.state)

    def _patched(self, name: str) -> Patched:
        site = self.state.site_at.get(name)
        return self._layer(name) if site is None else site

    def _layer(self, name: str) -> Layer:
        for layer in self.state.layers:
            if name in layer.names:
                return layer
        known = ", ".join(repr(each.info.name) for each in self.state.patched)
        raise KeyError(f"no patched layer is named {name!r}; patched: {known}")
