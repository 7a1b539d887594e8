"""The handle that `feedbackhook.patch` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.changes import frozen_rules, load_state, set_modes, set_options, set_rules, state_of
from feedbackhook.core.audit import Finding, graph_of
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.interception import Interceptor
from feedbackhook.core.layer import Layer, Patched, Probe
from feedbackhook.core.learners import mirror
from feedbackhook.core.learning import learns, mirrors
from feedbackhook.core.projection import Projection
from feedbackhook.core.state import PatchState
from feedbackhook.listing import LayerRow, table
from feedbackhook.monitor import Watch
from feedbackhook.rng import STREAM, check_stream
from feedbackhook.rules import describe, rule_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.store.recorder import Recorder


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
        if any(each.compiled for each in self.state.patched):
            raise RuntimeError(
                "exact() cannot change the backward of a compiled model; set patch.enabled = False before "
                "the forward, or run the model uncompiled"
            )
        return self.state.exact_backward()

    def set(self, mode: str | Mapping[str, Any] | None = None, **options: Any) -> None:
        """Change the rule or its options, also during training: `patch.set(concordance=0.5)`.

        If layers follow different rules, this changes the rules that have all of these options. With `mode`,
        the patched layers follow another rule from now on; a mapping from patterns to modes, as in `patch`,
        changes the layers that match; "frozen" is `freeze()`. What a layer has learned is lost unless its
        rule keeps its class.

        Raises:
            TypeError: no rule has these options, or a value has the wrong type. Nothing is changed.
            ValueError: a value is out of range. Nothing is changed.
        """
        if mode == "frozen":
            self.freeze()
        elif mode is None:
            set_options(self.state, options)
        else:
            set_modes(self.state, mode, options)

    def freeze(self) -> None:
        """Let every layer whose feedback learns go on with its V as it is now, under the rule "tensor"."""
        set_rules(self.state, frozen_rules(self.state))

    def redraw(self) -> None:
        """Draw the random parts of every V and B again, as `redraw="update"` does after optimizer steps."""
        for each in self.state.patched:
            each.feedback.redraw()
        for each in self.state.patched:
            each.draw()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the learned tensors by name: the layer's full name and the rule's, as in "fc1.V"."""
        self.state.handed_out = True
        if self.awaits_forward:
            raise RuntimeError(
                "the shape of what this rule learns follows from the output: run the model once, such as "
                "model(x[:2]), before you ask for patch.parameters()"
            )
        for each in self.state.patched:
            for name, parameter in each.feedback.learned.items():
                yield f"{each.info.name}.{name}".lstrip("."), parameter

    @property
    def awaits_forward(self) -> bool:
        """Whether a direct rule that learns ("DKP") needs a forward, which tells the shape of its B."""
        direct = [projection for projection in self.state.projections if learns(projection.rule)]
        return bool(direct) and not any(projection.learned for projection in direct)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned tensors, for an optimizer: they are not among the model's parameters.

        `torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)`. There are none if no rule
        learns. Each backward adds to their `.grad`.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    def mirror(self, steps: int = 1) -> None:
        """Run the mirror phase of each layer whose rule has one ("WM"): V learns from the layer's own noise.

        This needs no data and runs no forward. It leaves the model, its buffers and torch's random state
        as they are. The noise follows from the seed and from the number of steps so far.

        Args:
            steps: number of steps for each layer.

        Raises:
            ValueError: no rule has a mirror phase, or `steps` is not a positive number.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, not {steps!r}")
        layers = [layer for layer in self.state.layers if mirrors(layer.feedback.rule)]
        if not layers:
            raise ValueError("no layer follows a rule with a mirror phase, such as 'WM'")
        for layer in layers:
            mirror(layer, steps)

    def average_gradients(self, group: ProcessGroup | None = None) -> None:
        """Replace the gradients of the learned tensors by their means over the processes of `group`.

        DistributedDataParallel and `fully_shard` need no such call, since the patch then averages at the end
        of each backward. Every process must call this, before it clips gradients or steps.
        """
        self._interceptor.learners.average((group,))

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
        return self._patched(name).add_probe(fn)

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
        """Return all that determines V and B, in plain types and tensors: those that were learned, and the
        user's, for mode "tensor".

        `torch.load(weights_only=True)` can load it. Random parts are not stored, since they follow from the
        seed and the draw counts; `stream` is the number of how. As in a model's `state_dict`, the tensors
        share memory with the patch's.
        """
        return {"enabled": self.enabled, "stream": STREAM, "layers": state_of(self.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on a patch of the same layers.

        The state brings its rules: that of a patch with "frSF" makes one with "uSF" a patch with "frSF".

        Raises:
            ValueError: this is no state of a patch; the layers differ, or the places that direct rules take
                errors from and send them to; or the state is from a version that draws another V from the
                same seed. Nothing is changed.
        """
        if not {"enabled", "layers"} <= state.keys():
            keys = ", ".join([*map(repr, list(state)[:3]), *["..."] * (len(state) > 3)])
            raise ValueError(
                f"this is no state of a patch: it has {f'the keys {keys}' if keys else 'no keys'}; pass what "
                "Patch.state_dict returned, such as saved['patch']"
            )
        check_stream(state)
        load_state(self.state, state["layers"])
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
