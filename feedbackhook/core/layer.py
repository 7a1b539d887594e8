"""What is patched: a weight, or a module's input; its feedback, and what has happened to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.discovery import LayerInfo, Target, describe_layer, full_shape, weight_of
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.learning import learns
from feedbackhook.core.projection import Projection

Probe = Callable[[Tensor | None, Tensor], None]
"""Called with `(grad_input, grad_output)`; `grad_input` is None if the input requires no gradient."""

_PLAIN = (Tensor, nn.Parameter)


class Patched:
    """A place where error signals are rerouted, and what has happened there.

    Attributes:
        calls: number of forward calls with gradients enabled.
        rerouted: number of error signals sent through V or B.
        input_requires_grad: whether the input of any call required a gradient; None before the first call.
        depth: position in the order of the forward's calls, from 0; None before the first call.
        probes: called with each error signal that passes.
        compiled: whether `torch.compile` has traced a call; then no Python runs in its backward.
        last_backward: id of the last backward that reached a call; -1 before the first.
        bypassed: for the input of a direct rule, whether the error from above also got to something before it
            by another path, such as a skip connection, in the last forward that was examined; None if none
            was.
    """

    feedback: Feedback | Projection

    def __init__(self) -> None:
        self.calls = 0
        self.rerouted = 0
        self.input_requires_grad: bool | None = None
        self.depth: int | None = None
        self.probes: OrderedDict[int, Probe] = OrderedDict()
        self.compiled = False
        self.last_backward = -1
        self.bypassed: bool | None = None

    @property
    def info(self) -> LayerInfo:
        """What a rule may know about it."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """Its full names."""
        return [self.info.name]

    def parameters(self) -> Iterator[Tensor]:
        """Yield the parameters whose gradient tells how well it learns."""
        raise NotImplementedError

    def draw(self) -> None:
        """Draw the random parts now, if that is possible."""

    def add_probe(self, probe: Probe) -> RemovableHandle:
        """Call `probe` with each error signal from now on, until the handle is removed."""
        handle = RemovableHandle(self.probes)
        self.probes[handle.id] = probe
        return handle

    def probe(self, grad_input: Tensor | None, grad_output: Tensor) -> None:
        """Call the probes with an error signal; `grad_input` is None if the input requires no gradient."""
        for probe in list(self.probes.values()):
            probe(grad_input, grad_output)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within this context, call no probe; afterwards, restore all counts."""
        before = vars(self).copy()
        self.probes = OrderedDict()
        try:
            yield
        finally:
            vars(self).update(before)


class ModuleSite(Patched):
    """The input of a module, which receives the output's error signal. Inside the module, backprop is exact.

    Args:
        info: the module's name and kind. It has no weight of its own, so its shape is empty.
        module: the module.
        feedback: its B.

    Attributes:
        ran: whether the module has run in a forward of the model that builds a graph.
    """

    feedback: Projection

    def __init__(self, info: LayerInfo, module: nn.Module, feedback: Projection) -> None:
        super().__init__()
        self._info = info
        self.module = module
        self.feedback = feedback
        self.ran = False

    @property
    def info(self) -> LayerInfo:
        """The module's name and kind."""
        return self._info

    def parameters(self) -> Iterator[Tensor]:
        """Yield all parameters of the module."""
        yield from self.module.parameters()


class Layer(Patched):
    """A patched weight.

    Args:
        targets: where the weight is. A tied weight has several targets; the first names the layer.
        feedback: its V, or the B of its input.

    Attributes:
        derived: W as the last forward used it, if it differs from the module's own weight.
    """

    def __init__(self, targets: list[Target], feedback: Feedback | Projection) -> None:
        super().__init__()
        self.targets = targets
        self.feedback = feedback
        self.derived: Tensor | None = None

    @property
    def info(self) -> LayerInfo:
        """What a rule may know about the layer."""
        return self.targets[0].info

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight; for a tied weight, the first one."""
        return self.targets[0].place.module

    @property
    def names(self) -> list[str]:
        """The full names of the layer."""
        return [target.info.name for target in self.targets]

    def weight(self) -> Tensor:
        """Return the current W as the module's forward uses it.

        If the forward derives W from the module's weight (by standardizing it, say), this is W as the last
        forward used it. A sharded weight is gathered, so every rank must call this.

        Raises:
            RuntimeError: the module stores integers, and no forward has turned them into a weight yet.
        """
        self.describe()
        place = self.targets[0].place
        weight = weight_of(place.module, place.attribute) if self.derived is None else self.derived
        if not weight.is_floating_point():
            raise RuntimeError(
                f"the weight of {self.info.name!r} is stored as {weight.dtype}, and V follows the weight "
                "that the forward makes of it; run a forward with gradients enabled first"
            )
        gather = getattr(weight, "full_tensor", None)  # a DTensor of torch.distributed has it
        return weight if gather is None else gather()

    def has_other_shape(self) -> bool:
        """Whether the weight was replaced by one of another shape, as in structured pruning. (A sharded one
        may be flat outside its forward, which does not count.)"""
        plain, known = self.targets[0].place.parameter(), self.info.shape
        return plain is not None and plain.shape != known and plain.dim() == len(known) and plain.numel() > 0

    def describe(self) -> None:
        """Find out anew what a rule may know about the layer, if its weight has another shape now."""
        if not self.has_other_shape():
            return
        self.targets = [Target(place, describe_layer(info.name, place)) for place, info in self.targets]
        self.feedback.describe(self.info)
        self.derived = None

    def check(self) -> None:
        """Check that V can be made from such a weight.

        Raises:
            TypeError: the weight is sparse, complex or packed; the error names the layer.
        """
        name, plain = self.info.name, self.targets[0].place.parameter()
        hint = f"pass exclude={[name]} to feedbackhook.patch to leave it with exact backprop"
        if plain is None:
            return
        if plain.layout is not torch.strided:
            raise TypeError(f"the weight of {name!r} is sparse ({plain.layout}), but V is dense; {hint}")
        if plain.is_complex():
            raise TypeError(f"the weight of {name!r} is complex; feedback is defined only for real weights")
        if not plain.is_floating_point() and tuple(plain.shape) != full_shape(self.module):
            raise TypeError(
                f"{name!r} keeps its weight packed, as {plain.dtype} of shape {tuple(plain.shape)}, and its "
                f"forward unpacks it where the patch cannot see it; {hint}"
            )

    def try_feedback(self) -> None:
        """Compute V once, so that a weight from which no V can be made is refused before patching.

        Raises:
            TypeError: no V can be made from such a weight; the error names the layer.
        """
        self.check()
        if isinstance(self.feedback, Projection):
            return  # B follows no weight
        if learns(self.feedback.rule):
            self._check_learning()
            self.feedback.learn(self.weight())
        if not self.has_weight():
            return  # the forward makes a weight of it, and V will follow that
        if not self.is_opaque():
            self.feedback(self.weight())
            return
        try:
            self.feedback(self.weight())
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise TypeError(
                f"the weight of {self.info.name!r} is a {self.weight_type()}, from which no V can be made; "
                f"pass exclude={[self.info.name]} to leave it with exact backprop"
            ) from error

    def _check_learning(self) -> None:
        """Check that the layer's feedback can learn from it.

        Raises:
            TypeError: its weight is no plain dense parameter, though the rule needs one.
        """
        if self.targets[0].place.parameter() is None:
            self._refuse_derived()
        if self.is_opaque():
            raise TypeError(
                f"the feedback of {self.info.name!r} cannot learn, since its weight is stored as "
                f"{self.weight_type()}; pass exclude={[self.info.name]} to feedbackhook.patch"
            )

    def _refuse_derived(self) -> None:
        """Raise if the rule takes W's own gradient: a derived weight does not move along it."""
        rule = self.feedback.rule
        if learns(rule) and rule.learns_from == "gradient":
            raise TypeError(
                f"{type(rule).__name__} moves V along W's own gradient, but the weight of {self.info.name!r} "
                "is computed from other parameters (a parametrization or a standardization), so updates do "
                "not move it that way. Give this layer another rule, such as 'WM' or 'symmetric-alignment', "
                f"or pass exclude={[self.info.name]} to feedbackhook.patch"
            )

    def prepare(self, weight: Tensor) -> None:
        """Bring the learned tensors to the stored weight's dtype and device, before a call that uses
        `weight`.

        Raises:
            TypeError: `weight` is derived from the stored one, though the rule needs that itself.
        """
        if isinstance(self.feedback, Projection) or not learns(self.feedback.rule):
            return
        self.check_source(weight)
        plain = self.targets[0].place.parameter()
        self.feedback.learn(weight if plain is None else plain)

    def check_source(self, weight: Tensor) -> None:
        """Check that a call uses the stored weight, if the rule takes its gradient for its update.

        Raises:
            TypeError: it does not.
        """
        if self.targets[0].place.parameter() is not weight:
            self._refuse_derived()

    def draw(self) -> None:
        """Draw the random parts now, so that compiled code finds them where it found the previous ones."""
        if self.has_weight() and isinstance(self.feedback, Feedback):
            weight = self.weight()
            self.feedback.learn(weight)
            self.feedback.parts(weight)

    def has_weight(self) -> bool:
        """Whether `weight` can be called already."""
        plain = self.targets[0].place.parameter()
        return self.derived is not None or plain is None or plain.is_floating_point()

    def use(self, weight: Tensor) -> None:
        """Record what the forward uses as W, if `weight_of` would not find it."""
        plain = self.targets[0].place.parameter()
        self.derived = None if plain is None or plain is weight else weight.detach()

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weight, or the parameters from which the module derives it."""
        if (weight := self.targets[0].place.parameter()) is not None:
            yield weight
            return
        for name, parameter in self.module.named_parameters():
            if "bias" not in name.split("."):
                yield parameter

    def is_opaque(self) -> bool:
        """Whether the weight is not a plain dense tensor, so that its module may compute out of sight."""
        weight = self.targets[0].place.parameter()
        return weight is not None and (not weight.is_floating_point() or type(weight) not in _PLAIN)

    def is_constant(self) -> bool:
        """Whether the weight is no parameter, and comes from none."""
        return self.targets[0].place.parameter() is None and not any(True for _ in self.parameters())

    def weight_type(self) -> str:
        """Describe how the module stores its weight."""
        weight = self.targets[0].place.parameter()
        return f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"

    def may_derive(self, weight: Tensor) -> bool:
        """Whether a weight used in the module's forward is its parameter, or derived from its parameters."""
        own = not isinstance(weight, nn.Parameter) or self.targets[0].place.parameter() is weight
        return own and weight.shape == self.info.shape
