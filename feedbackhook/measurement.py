"""Measure how feedback weights, and the error signals and gradients they produce, compare with backprop's.

Letters: V feedback weight, W feedforward weight, delta the error signal at a layer's output, G the gradient
of a layer's weight as delivered, G* the gradient under exact backprop on the same graph.

| metric | definition |
|---|---|
| weight_angle | between V and W, flattened, in degrees |
| error_angle | between V's and W's product with the same delta, in degrees |
| gradient_angle | between G and G*, in degrees |
| sign_agreement | fraction, 0 to 1, of the entries nonzero in V and W whose signs agree |
| norm_ratio | norm(V) / norm(W), Frobenius |

On request (`also`):

| metric | definition | source |
|---|---|---|
| weight_cosine | trace(V^T W) / (norm(V) norm(W)), the cosine of weight_angle | Refinetti et al. 2021 |
| error_cosine | the cosine of error_angle | Nokland 2016 |
| gradient_cosine | the cosine of gradient_angle | Launay et al. 2019 |
| participation_ratio | tr(M)^2 / tr(M^2) for the second moments M of error signals as delivered | below |
| exact_participation_ratio | the same of backprop's error signals | Gao et al. 2017 |

Direct rules have no V: what they send stands in the place of V's product, and what needs V is NaN.

An undefined value, such as the angle to a tensor that is all zero, is NaN and keeps its row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from feedbackhook.core.angles import Sums, angles_of_rows, gathered, sums_of
from feedbackhook.core.audit import is_compiled, nodes_behind
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.layer import Patched
from feedbackhook.core.state import PatchHandle, PatchState
from feedbackhook.core.torch_internals import awaits_first_backward, current_backward
from feedbackhook.names import nearest
from feedbackhook.ranks import Ranks, collect_ranks

ALSO = (
    "weight_cosine",
    "error_cosine",
    "gradient_cosine",
    "participation_ratio",
    "exact_participation_ratio",
)
"""The metrics that `measure` returns on request."""

_NO_LAYER = (
    "the graph of this loss contains no patched layer: was it made without gradients, with the patch "
    "disabled, or by another model?"
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Row(NamedTuple):
    """One measured value.

    Attributes:
        layer: the layer's full name; None if the value is for all patched layers together, as if their
            tensors were one.
        depth: the layer's position, from 0, in the order of the forward's calls; None before the first call
            with gradients.
        metric: the metric's name, see the table above.
        value: the measured value; angles are in degrees.
    """

    layer: str | None
    depth: int | None
    metric: str
    value: float


def measure(
    patch: PatchHandle,
    loss: Tensor | None = None,
    *,
    per_sample: bool = False,
    group: ProcessGroup | None = None,
    also: Collection[str] = (),
) -> list[Row]:
    """Compare the feedback of each layer, and of all together, with backprop on the graph of `loss`.

    Call it before `loss.backward()`. It runs two gradient passes, and leaves the graph, the parameters'
    `.grad`, buffers, random states, counts and probes as they were. Hooks that you have put on tensors of the
    graph, including those of `retain_grad()`, see both passes. Without `loss` it returns what needs only V
    and W: `weight_angle`, `sign_agreement` and `norm_ratio`.

    Args:
        patch: the patch.
        loss: a scalar from a forward of the patched model.
        per_sample: also return `error_angle_per_sample`, the mean of the angles of single samples (along the
            first dimension of the layer's input, which inside nn.MultiheadAttention is the position), and
            `error_angle_samples`, the number of samples with an error signal.
        group: a torch.distributed group whose ranks hold parts of one batch, and losses that add up, or
            average, to the loss of the whole batch. All ranks must call this, and the rows are those of the
            whole batch. Without it the rows are those of this rank's part.
        also: further metrics, of those that `ALSO` lists; participation ratios need a loss and no group.

    Returns:
        Rows by layer in the order of `patch.layers`, then the rows of the whole network. `error_angle` is NaN
        for a layer that receives no error signal or passes none on, and `gradient_angle` is NaN for a layer
        whose weight gets no gradient.

    Raises:
        ValueError: `loss` is not a scalar, its graph contains no patched layer, or `also` is wrong.
        RuntimeError: the graph was used up by a backward, was made by compiled code, or contains a reentrant
            checkpoint; parameters are sharded; or it is the first step of DistributedDataParallel with
            `static_graph=True`.
    """
    _check_also(also, loss, group)
    state = patch.state
    if loss is None:
        return list(weight_rows(state, weight_sums(state), "weight_cosine" in also))
    check_loss(state, loss)
    layers = state.patched
    parameters = {layer: [p for p in layer.parameters() if p.requires_grad] for layer in layers}
    ranked = layers if any("participation" in name for name in also) else []
    with undisturbed(patch), collect_error_angles(state, per_sample) as errors, collect_ranks(ranked) as own:
        delivered = gradients_of(loss, parameters)
    with undisturbed(patch), state.exact_backward(), collect_ranks(ranked) as backprops:
        exact = gradients_of(loss, parameters)
    if not errors.seen and not any(delivered.values()):
        raise ValueError(_NO_LAYER)
    rows = [
        *weight_rows(state, weight_sums(state), "weight_cosine" in also),
        *errors.rows(layers, group, "error_cosine" in also),
        *_gradient_rows(delivered, exact, group, "gradient_cosine" in also),
        *_rank_rows(layers, also, {"participation_ratio": own, "exact_participation_ratio": backprops}),
    ]
    places: dict[str | None, int] = {layer.info.name: place for place, layer in enumerate(layers)}
    return sorted(rows, key=lambda row: places.get(row.layer, len(places)))


class WeightSums(NamedTuple):
    """What the weights of a patch sum up to.

    Args:
        pairs: V with W, of each layer that has a V.
        squares: the sum of squares of each parameter that is the W of such a layer.
    """

    pairs: dict[Patched, Sums]
    squares: dict[Tensor, float]


def weight_sums(state: PatchState) -> WeightSums:
    """Compare the current V and W of each layer."""
    pairs: dict[Patched, Tensor] = {}
    plain: dict[Patched, Tensor] = {}
    for layer in state.layers:
        if isinstance(layer.feedback, Feedback):
            w = layer.weight()
            if isinstance(w, torch.nn.Parameter):
                plain[layer] = w
            pairs[layer] = sums_of(gathered(layer.feedback(w)), gathered(w))
    found = dict(zip(pairs, Sums.listed(list(pairs.values())), strict=True))
    return WeightSums(found, {w: found[layer].bb for layer, w in plain.items()})


def weight_rows(state: PatchState, sums: WeightSums, cosine: bool = False) -> Iterator[Row]:
    """Yield `weight_angle`, `sign_agreement` and `norm_ratio` of each layer and of all together, NaN if there
    is no V, and if asked for `weight_cosine`."""
    totals: dict[Patched | None, Sums] = {each: sums.pairs.get(each, Sums()) for each in state.patched}
    totals[None] = Sums() if state.projections else Sums.total(totals.values())
    for of, total in totals.items():
        yield _row(of, "weight_angle", total.angle)
        yield _row(of, "sign_agreement", total.sign_agreement)
        yield _row(of, "norm_ratio", total.norm_ratio)
        if cosine:
            yield _row(of, "weight_cosine", total.cosine)


def _gradient_rows(
    delivered: dict[Patched, list[Tensor]],
    exact: dict[Patched, list[Tensor]],
    group: ProcessGroup | None,
    cosine: bool,
) -> Iterator[Row]:
    """Yield `gradient_angle` of each layer and of all together, and if asked for `gradient_cosine`."""
    if group is not None:
        for gradient in [g for layer in delivered for g in (*delivered[layer], *exact[layer])]:
            torch.distributed.all_reduce(gradient, group=group)
    totals = {
        layer: Sums.total([Sums(), *map(Sums.of, delivered[layer], exact[layer])]) for layer in delivered
    }
    for layer, total in [*totals.items(), (None, Sums.total(totals.values()))]:
        yield _row(layer, "gradient_angle", total.angle)
        if cosine:
            yield _row(layer, "gradient_cosine", total.cosine)


def _rank_rows(layers: Iterable[Patched], also: Collection[str], ranks: dict[str, Ranks]) -> Iterator[Row]:
    for layer in layers:
        yield from (_row(layer, name, found.of(layer)) for name, found in ranks.items() if name in also)


class ErrorAngles:
    """Collects V's and W's product with each error signal that passes a layer.

    Backwards count together as long as gradients accumulate. A backward that finds no gradient in any patched
    weight is the first of its step; what was collected before it belongs to a step that was abandoned.
    """

    def __init__(self, layers: Iterable[Patched], per_sample: bool = False) -> None:
        self.per_sample = per_sample
        self.seen: dict[Patched, Tensor] = {}
        self._layers = list(layers)
        self._backward = -1

    def observe(self, layer: Patched, by_v: Tensor, by_w: Tensor) -> None:
        """Record one error signal: its products with V and with W, each of the input's shape."""
        if self._backward != (now := current_backward()):
            self._backward = now
            trainable = [p for each in self._layers for p in each.parameters() if p.requires_grad]
            if trainable and all(p.grad is None for p in trainable):
                self.seen.clear()
        sums = sums_of(by_v, by_w, signs=False)
        if self.per_sample:
            batched = by_v.dim() >= len(layer.info.shape)  # layers accept a single sample without a batch
            samples = len(by_v) if batched else 1
            a, b = (x.reshape(samples, x.numel() // max(1, samples)) for x in (by_v, by_w))
            angles = angles_of_rows(a, b)
            sums = torch.cat([sums, torch.stack([angles.nansum(), angles.isfinite().sum()])])
        self.seen[layer] = self.seen[layer] + sums if layer in self.seen else sums

    def rows(
        self, layers: Iterable[Patched], group: ProcessGroup | None = None, cosine: bool = False
    ) -> Iterator[Row]:
        """Yield the rows of each layer, NaN if nothing was collected, and if asked for also the cosines. With
        a group, all its ranks must call this, and what they have collected counts together."""
        layers = list(layers)
        for layer, sums in zip(layers, self._collected(layers, group), strict=True):
            yield _row(layer, "error_angle", Sums(*sums[:3]).angle)
            if cosine:
                yield _row(layer, "error_cosine", Sums(*sums[:3]).cosine)
            if self.per_sample:
                degrees, samples = sums[3:]
                mean = degrees / samples if samples else float("nan")
                yield _row(layer, "error_angle_per_sample", mean)
                yield _row(layer, "error_angle_samples", samples)

    def _collected(self, layers: Sequence[Patched], group: ProcessGroup | None) -> list[list[float]]:
        """Return a.b, a.a and b.b of each layer's error signals, and by samples the sum of these samples'
        angles and their number."""
        if not layers:
            return []
        nothing = next((torch.zeros_like(sums) for sums in self.seen.values()), None)
        if nothing is None:
            parameters = (parameter for layer in layers for parameter in layer.parameters())
            device = "cpu" if group is None else next(parameters).device
            nothing = torch.zeros(5 if self.per_sample else 3, dtype=torch.float64, device=device)
        table = torch.stack([self.seen.get(layer, nothing).to(nothing) for layer in layers])
        if group is not None:
            torch.distributed.all_reduce(table, group=group)
        rows: list[list[float]] = table.tolist()
        return rows


@contextmanager
def collect_error_angles(state: PatchState, per_sample: bool = False) -> Iterator[ErrorAngles]:
    """Collect the error angles of the backwards within this context."""
    errors = ErrorAngles(state.patched, per_sample)
    with state.listen_to_errors(errors.observe):
        yield errors


def _check_also(also: Collection[str], loss: Tensor | None, group: ProcessGroup | None) -> None:
    if isinstance(also, str):
        raise ValueError(f"also must be a list of metrics, such as [{also!r}]")
    for name in also:
        if name not in ALSO:
            near = nearest(name, ALSO) or f"; known: {', '.join(ALSO)}"
            raise ValueError(f"also names {name!r}, which is not a metric to ask for{near}")
        if loss is None and name != "weight_cosine":
            raise ValueError(f"{name} needs a loss: call measure(patch, loss, also=[{name!r}])")
        if group is not None and "participation" in name:
            raise ValueError(f"{name} is of one rank's error signals; call measure without a group for it")


def check_loss(state: PatchState, loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a tensor with one element, not {shape}")
    if loss.grad_fn is None:
        raise ValueError("loss has no graph: was it made without gradients, or detached?")
    if any(hasattr(p, "full_tensor") for layer in state.patched for p in layer.parameters()):
        raise RuntimeError(
            "measure(patch, loss) does not work with sharded parameters, whose gradients only backward() "
            "puts together; use patch.watch, or measure(patch) for what needs only V and W"
        )


def gradients_of(loss: Tensor, parameters: dict[Patched, list[Tensor]]) -> dict[Patched, list[Tensor]]:
    """Return the gradients of each layer's parameters that the loss reaches. The pass visits every node that
    `loss.backward()` would visit."""
    leaves = list(_leaves(loss))
    try:
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this loss is used up; call measure(patch, loss) before loss.backward()"
            ) from error
        if "use_reentrant" in str(error):
            raise RuntimeError(
                "measure(patch, loss) needs gradients of a part of the graph, which reentrant checkpoints "
                "cannot compute; checkpoint with use_reentrant=False"
            ) from error
        raise
    gradient = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}
    return {
        layer: [g for p in of_layer if (g := gradient.get(id(p))) is not None]
        for layer, of_layer in parameters.items()
    }


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors for which `loss.backward()` would accumulate gradients.

    Raises:
        RuntimeError: the graph contains something that our passes would not see, or would disturb.
    """
    node: Any
    for node in nodes_behind([loss.grad_fn] if loss.grad_fn is not None else []):
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable
        if is_compiled(node):
            raise RuntimeError(
                "measure(patch, loss) cannot look inside compiled code; compute the loss with the uncompiled "
                "model, or call measure(patch) for what needs only V and W"
            )
        if awaits_first_backward(node):
            raise RuntimeError(
                "DistributedDataParallel with static_graph=True records the graph in the first backward, "
                "which must be the training's own; call measure(patch, loss) from the second step on"
            )


@contextmanager
def undisturbed(patch: PatchHandle) -> Iterator[None]:
    """Restore counts, probes, buffers and random states after this context, and call no probe within it.
    (Checkpoints run forwards in a backward.)"""
    buffers: dict[Tensor, Tensor] = {}

    def keep(module: torch.nn.Module, args: object) -> None:
        buffers.update({buffer: buffer.clone() for buffer in module.buffers() if buffer not in buffers})

    devices = {p.device for p in patch.model.parameters() if p.device.type == "cuda"}
    recomputing = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        with torch.random.fork_rng(devices=devices), patch.state.undisturbed():
            yield
    finally:
        recomputing.remove()
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # through `data`, so that a graph that saved the buffer stays valid


def _row(layer: Patched | None, metric: str, value: float) -> Row:
    if layer is None:
        return Row(None, None, metric, value)
    return Row(layer.info.name, layer.depth, metric, value)
