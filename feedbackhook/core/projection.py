"""Direct feedback: a site's fixed random matrix B, and how it meets the shapes of the output and the site.

Letters: N rows that B acts on one by one (samples, or positions), K numbers of the output's error signal in a
row, D features of the site in a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.learning import learns
from feedbackhook.rng import CounterRNG

SHARED = "*"
"""The name from which a matrix that all sites share is drawn; no module can have it."""


class DirectRule(Protocol):
    """A rule that sends a site the output's error signal through a random matrix: a frozen dataclass of
    options, among them these three, with two methods."""

    @property
    def sites(self) -> str | Sequence[str] | None:
        """The modules whose inputs are the sites; None: the inputs of the patched layers."""

    @property
    def output(self) -> str | None:
        """The module whose output's gradient is sent; None: the model itself."""

    @property
    def shared(self) -> bool:
        """Whether all sites take their rows from one matrix."""

    def draw(self, matrix: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw B, under the key "B", like `matrix`, whose shape is (D, K)."""

    def signal(self, error: Tensor, targets: Tensor | None) -> Tensor:
        """Return what B multiplies, in the shape of the output's error signal."""


class LearningDirectRule(Protocol):
    """A direct rule that learns its B has `learns_from = "error"` and this method."""

    def direct_gradient(self, site: Tensor, signal: Tensor) -> Tensor:
        """Return the gradient of B, (D, K), from the site's input, (N, D), and what B multiplies, (N, K)."""


class Fit(NamedTuple):
    """How B meets the output and a site.

    Args:
        rows: N.
        source: K.
        features: D.
        positions: whether a row is a position of a sample, such as a token, and not a whole sample.
    """

    rows: int
    source: int
    features: int
    positions: bool


def fit(output: Sequence[int], site: Sequence[int], batched: bool, channels_first: bool) -> Fit | None:
    """Return how B meets an output and a site of these shapes, or None if their batches differ.

    Args:
        output: shape of the output.
        site: shape of the site.
        batched: whether the site's first dimension is the batch.
        channels_first: whether the site's features come right after the batch, as in convolutions.
    """
    if not batched:
        return Fit(1, math.prod(output), math.prod(site), False)
    if not output or not site:
        return None
    leading = output[:-1] if len(output) > 1 else output
    if len(leading) > 1 and not channels_first:
        flat = math.prod(leading)
        if len(site) == 2 and site[0] == flat and site[0] != leading[0]:  # the positions as rows
            return Fit(flat, output[-1], site[1], True)
        same = 0
        while same < min(len(leading), len(site) - 1) and leading[same] == site[same]:
            same += 1
        if same > 1:
            return Fit(math.prod(site[:same]), math.prod(output[same:]), math.prod(site[same:]), True)
    if output[0] != site[0]:
        return None
    return Fit(output[0], math.prod(output[1:]), math.prod(site[1:]), False)


class Attention(NamedTuple):
    """Where the batch is inside `nn.MultiheadAttention`, which puts it behind the positions.

    Args:
        positions: length of the query.
        batch: number of samples.
        batch_first: whether outside of it the batch is in front.
    """

    positions: int
    batch: int
    batch_first: bool


class Place(NamedTuple):
    """Where a site's input has its batch and its features.

    Args:
        shape: shape of the input.
        batched: whether its first dimension is the batch.
        channels_first: whether its features come right after the batch, as in convolutions.
        attention: where the batch is, if the site is inside `nn.MultiheadAttention`.
    """

    shape: tuple[int, ...]
    batched: bool = True
    channels_first: bool = False
    attention: Attention | None = None

    def fit(self, output: Sequence[int]) -> Fit | None:
        """Return how B meets an output of this shape, or None if the batches differ."""
        return fit(output, self._swapped(output) or self.shape, self.batched, self.channels_first)

    def back(self, signal: Tensor, output: Sequence[int]) -> Tensor:
        """Return what B sends for an output of this shape in the shape of the input."""
        if (swapped := self._swapped(output)) is not None:
            signal = signal.reshape(swapped).transpose(0, 1)
        return signal.reshape(self.shape)

    def rows(self, input: Tensor, output: Sequence[int], features: int) -> Tensor:
        """Return what enters the site, (N, D), in the order of the rows of an output of this shape."""
        if self._swapped(output) is not None:
            batch = self.attention.batch if self.attention is not None and len(self.shape) != 3 else None
            if batch is not None:
                input = input.reshape(-1, batch, self.shape[-1])
            input = input.transpose(0, 1)
        return input.reshape(-1, features)

    def _swapped(self, output: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape with the batch in front, if it is not there but is in front of the output."""
        if self.attention is None or not (self.attention.batch_first or len(output) < 3):
            return None
        if len(self.shape) == 3:
            return self.shape[1], self.shape[0], self.shape[2]
        return self.attention.batch, self.attention.positions, self.shape[-1]


class Use(NamedTuple):
    """What B is needed for.

    Args:
        fits: how it meets the output and the site.
        width: D, or that of the widest site if they share a matrix.
        like: a tensor of the dtype that B is kept in, on the site's device.
    """

    fits: Fit
    width: int
    like: Tensor


class Projection:
    """The matrix B of a site. It is drawn when the shapes of the output and the site are known.

    Args:
        rule: what is sent, and how B is drawn.
        layer: the site; B follows from its name.
        seed: the patch's seed.
        draws: how often B has been redrawn.
        recompute: whether to draw B again for each use instead of keeping it.
        fused: whether to draw it with one kernel made by `torch.compile`.
        kept: the matrices that are kept; sites that share one also share this.

    Attributes:
        last: what B was needed for in the last forward; None before the first.
    """

    def __init__(
        self,
        rule: DirectRule,
        layer: LayerInfo,
        seed: int,
        draws: int = 0,
        recompute: bool = False,
        fused: bool = False,
        kept: dict[int, tuple[object, Tensor]] | None = None,
    ) -> None:
        self.rule = rule
        self.layer = dataclasses.replace(layer, name=SHARED) if rule.shared else layer
        self.seed = seed
        self.draws = draws
        self.recompute = recompute
        self.fused = fused
        self.last: Use | None = None
        self.learned: dict[str, nn.Parameter] = {}
        self._kept = {} if kept is None else kept
        self._others: dict[int, Projection] = {}

    def send(self, signal: Tensor, use: Use) -> Tensor:
        """Return B times what the rule makes of the output's error signal, shape (N, D), in B's dtype."""
        b = self.matrix(use)
        return signal.reshape(use.fits.rows, use.fits.source).to(b) @ b.t()

    @torch.no_grad()
    def matrix(self, use: Use) -> Tensor:
        """Return B, shape (D, K)."""
        fits, width, like = use
        if self.learned:
            return self._learned(use)
        wanted = (self.rule, self.layer.name, self.seed, self.draws, width, like.dtype, like.device)
        known, b = self._kept.get(fits.source, (None, None))
        if b is None or known != wanted:
            template = like.new_empty((width, fits.source))
            rng = CounterRNG(self.seed, self.layer, self.draws, self.fused)
            b = self.rule.draw(template, rng)["B"]
            if not self.recompute:
                self._kept[fits.source] = wanted, b
        return b[: fits.features]

    def learn(self, use: Use) -> None:
        """Make B a learned tensor, if the rule learns and it is not one yet."""
        if learns(self.rule) and not self.learned:
            self.learned["B"] = nn.Parameter(self.matrix(use).clone())
            self._kept.clear()

    def gradient(self, site: Tensor, signal: Tensor, use: Use) -> Tensor:
        """Return the gradient of the learned B.

        Args:
            site: what enters the site, shape (N, D).
            signal: what B multiplies.
            use: what B is needed for.
        """
        b = self._learned(use)
        rows = signal.reshape(use.fits.rows, use.fits.source).to(b)
        return cast(LearningDirectRule, self.rule).direct_gradient(site.to(b), rows)

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Set what was learned to stored values, in place if the tensors have these shapes."""
        for name, tensor in learned.items():
            if name in self.learned and self.learned[name].shape == tensor.shape:
                with torch.no_grad():
                    self.learned[name].copy_(tensor)
            else:
                self.learned[name] = nn.Parameter(tensor.detach().clone())

    def _learned(self, use: Use) -> Tensor:
        b = self.learned["B"]
        if b.dtype != use.like.dtype or b.device != use.like.device:
            b.data = b.data.to(use.like)
        if b.shape != (use.fits.features, use.fits.source):
            raise RuntimeError(
                f"the B that {self.layer.name!r} has learned has the shape {tuple(b.shape)}, but now the "
                f"shape {(use.fits.features, use.fits.source)} is needed"
            )
        return b.detach()

    def sizes(self) -> dict[object, int]:
        """Return the bytes that each matrix of the last forward takes. One that is shared has the same key in
        all projections that share it."""
        found: dict[object, int] = {}
        for number, each in enumerate((self, *self._others.values())):
            if each.last is not None:
                fits, width, like = each.last
                key = (fits.source,) if self.rule.shared else (id(self), number)
                found[key] = width * fits.source * like.element_size()
        return found

    def of_input(self, number: int) -> Projection:
        """Return the projection of one of a module's inputs that require a gradient; the first one has this
        one."""
        if number == 0:
            return self
        if learns(self.rule):
            raise RuntimeError(
                f"the site {self.layer.name!r} gets several tensors that require a gradient, and a rule that "
                "learns has a matrix for one; choose other modules with sites= in feedbackhook.patch"
            )
        other = self._others.get(number)
        if other is None or (other.rule, other.seed, other.draws) != (self.rule, self.seed, self.draws):
            layer = dataclasses.replace(self.layer, name=f"{self.layer.name}[{number}]")
            kept = self._kept if self.rule.shared else None
            other = Projection(self.rule, layer, self.seed, self.draws, self.recompute, self.fused, kept)
            self._others[number] = other
        return other

    def copy(self) -> Projection:
        """Return a projection with the same B."""
        return self.like(self.rule, self.seed, self.draws, self.layer.name)

    def redraw(self) -> None:
        """Advance to the next draw, which happens when B is next needed."""
        self.draws += 1

    def describe(self, layer: LayerInfo) -> None:
        """Follow a layer of another shape. B follows from the same name."""
        self.layer = dataclasses.replace(layer, name=self.layer.name)

    def follow(self, rule: DirectRule) -> None:
        """Change the rule. The draw count stays."""
        self.rule = rule

    def like(self, rule: DirectRule, seed: int, draws: int, drawn_as: str | None = None) -> Projection:
        """Return a projection of the same site that keeps its matrix in the same way.

        Args:
            rule: as in the constructor.
            seed: as in the constructor.
            draws: as in the constructor.
            drawn_as: the site's name that B follows from; None is the current one.
        """
        layer = self.layer if drawn_as is None else dataclasses.replace(self.layer, name=drawn_as)
        other = Projection(rule, layer, seed, draws, self.recompute, self.fused, self._kept)
        if type(rule) is type(self.rule):
            other.learned = self.learned
        return other
