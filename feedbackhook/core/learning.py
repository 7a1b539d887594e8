"""What a layer knows in one call, and the protocol of rules that learn their feedback from it.

Letters: x input, W weight, delta the error signal at the output; V, or any tensor in the layout of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from feedbackhook.core.operations import Apply, Outer, Product
from feedbackhook.core.parts import Part, whole_of
from feedbackhook.rng import CounterRNG

LearnsFrom = Literal["gradient", "error", "activity", "noise"]


class LearningRule(Protocol):
    """A rule that learns: a frozen dataclass of options with these methods, beside those of `Rule`.

    Its V is made of the random parts that `draw` returns, if it has that method, and of the learned tensors.
    `feedback` gets both as one mapping. A learning rule may also have

    - a class attribute `fixed`: the names of options that cannot change while the model is patched, since
      the shapes of the learned tensors follow from them;
    - the method of `MirrorRule`, and then options `every` and `steps`: so many steps of the mirror phase
      after every N updates of W (None: only when `Patch.mirror` is called).
    """

    @property
    def learns_from(self) -> LearnsFrom:
        """What `local_gradient` reads of a call (a class attribute).

        - "gradient": W's own gradient and nothing else of the call. The learned tensors then learn only while
          W does, and their gradients carry the scale of the loss, as that of W does.
        - "error": the error signal, in which the gradients must be linear, and all else.
        - "activity": what does not depend on the error signal: input, output and W. The gradients then do not
          carry the scale of the loss.
        - "noise": nothing; `mirror` changes the learned tensors, and no optimizer does.
        """

    def initial(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return the learned tensors at the start. `weight` tells dtype and device."""

    def local_gradient(self, local: Local, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of each learned tensor from one call of the layer."""


class MirrorRule(Protocol):
    """A rule that learns in a mirror phase (`Patch.mirror`), without data."""

    def mirror(self, weight: Tensor, parts: Mapping[str, Tensor], rng: CounterRNG) -> dict[str, Tensor]:
        """Return new values of learned tensors after one step, from noise drawn from `rng`."""


def learns(rule: object) -> TypeGuard[LearningRule]:
    """Whether a rule has learned tensors."""
    return getattr(rule, "learns_from", None) is not None


def reads_calls(rule: object) -> bool:
    """Whether a rule learns from the calls of its layer, so that an optimizer steps its learned tensors."""
    return learns(rule) and rule.learns_from != "noise"


def mirrors(rule: object) -> bool:
    """Whether a rule learns in a mirror phase."""
    return callable(getattr(rule, "mirror", None))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast does not round the factors of matrix products."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Products(NamedTuple):
    """The three products of a call, see `feedbackhook.core.operations`."""

    product: Product
    apply: Apply
    outer: Outer


class Local:
    """What a layer knows in one call: all that a rule may learn from.

    The tensors are in the dtype of the learned tensors. If the call uses a part of the weight, as attention
    does with its stacked projections, everything below still takes and returns tensors in the layout of the
    whole weight.

    Args:
        rule: the rule, for messages.
        learns_from: what it may read.
        products: the products of the call.
        part: the part of the weight that the call uses; None is all of it.
        weight: W.
        input: x.
        error: delta.
        samples: the number of samples; in linear layers each position of a sample counts as one.
        dtype: that of the learned tensors.
    """

    def __init__(
        self,
        rule: str,
        learns_from: LearnsFrom,
        products: Products,
        part: Part | None,
        weight: Tensor,
        input: Tensor,
        error: Tensor,
        samples: int,
        dtype: torch.dtype,
    ) -> None:
        self._rule, self._learns_from = rule, learns_from
        self._products, self._part, self._dtype = products, part, dtype
        self._weight, self._input, self._error = weight, input, error
        self.samples = samples

    @property
    def weight(self) -> Tensor:
        """W, zero outside the part that the call uses."""
        return self.only(self._weight.to(self._dtype))

    @property
    def input(self) -> Tensor:
        """x, in its own shape: the batch first."""
        self._check("input", "error", "activity")
        return self._input.to(self._dtype)

    @property
    def output(self) -> Tensor:
        """W x, without the bias; it is computed again."""
        self._check("output", "error", "activity")
        return self.apply(self.input, self._weight.to(self._dtype))

    @property
    def error(self) -> Tensor:
        """delta, in the shape of the output."""
        self._check("error", "error")
        return self._error.to(self._dtype)

    @property
    def weight_gradient(self) -> Tensor:
        """delta x^T, W's own gradient in this call, from V's error signals."""
        self._check("weight_gradient", "error", "gradient")
        return self.outer(self._input.to(self._dtype), self._error.to(self._dtype))

    def apply(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return V x: what the layer computes with another weight, without the bias."""
        return self._products.apply(input, self._used(weight))

    def send(self, error: Tensor, weight: Tensor) -> Tensor:
        """Return V^T delta: the layer's input gradient with another weight."""
        return self._products.product(error, self._used(weight), None)

    def outer(self, input: Tensor, error: Tensor) -> Tensor:
        """Return delta x^T: the layer's weight gradient with another input and error signal."""
        like = self._used(self._weight).to(input.dtype)
        return whole_of(self._part, self._products.outer(input, error, like), self._weight)

    def only(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the layout of W, zero outside the part that the call uses."""
        return tensor if self._part is None else whole_of(self._part, self._used(tensor), tensor)

    def _used(self, whole: Tensor) -> Tensor:
        return whole if self._part is None else self._part.of(whole)

    def _check(self, name: str, *allowed: LearnsFrom) -> None:
        if self._learns_from not in allowed:
            raise TypeError(
                f"{self._rule} has learns_from = {self._learns_from!r}, so its local_gradient cannot read "
                f"`local.{name}`, which takes {' or '.join(map(repr, allowed))}"
            )
