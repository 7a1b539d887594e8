"""How feedback weights, and what they do to error signals and gradients, compare with backprop's.

Letters: V feedback weight, W feedforward weight, delta the error signal at a layer's output, G the gradient
of a layer's weight as it is delivered, G* the one under exact backprop on the same graph.

| metric | definition |
|---|---|
| weight_angle | between V and W, flattened, in degrees |
| error_angle | between V's and W's product with the same delta, in degrees |
| gradient_angle | between G and G*, in degrees |
| sign_agreement | share, 0 to 1, of the entries nonzero in V and W whose signs agree |
| norm_ratio | norm(V) / norm(W), Frobenius |

What is not defined, such as the angle with a tensor that is all zero, is NaN and keeps its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.core.edge import Layer
    from feedbackhook.core.interception import Bracket
    from feedbackhook.patching import Patch

_BLOCK = 1 << 17  # float64 numbers compared at a time on a CPU: three buffers of 1 MiB stay in cache
_GPU_BLOCK = 1 << 24  # and on a GPU, where they are to take some hundred MiB at most


class Row(NamedTuple):
    """One measured value.

    Args:
        layer: the layer's full name; None where the value is of all patched layers together, as if their
            tensors were one.
        depth: the layer's place, from 0, in the order of the forward's calls; None before the first call
            with gradients.
        metric: its name, see the table above.
        value: what was measured: degrees for angles.
    """

    layer: str | None
    depth: int | None
    metric: str
    value: float


class Sums(NamedTuple):
    """All that angle, norms and signs of two tensors a and b need. Parts of tensors add up: calls of one
    layer, and layers of one network.

    Args:
        ab: the sum over a o b; likewise aa and bb.
        agreeing: how many entries have the same sign.
        nonzero: how many are nonzero in both.
    """

    ab: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    agreeing: float = 0.0
    nonzero: float = 0.0

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Sums:
        """Those of two tensors of one shape."""
        return cls(*_sums(*_flat(gathered(a.detach()), gathered(b.detach())), signs=True).tolist())

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        return cls(*map(sum, zip(*parts, strict=True)))

    @property
    def angle(self) -> float:
        """The angle between a and b in degrees, 0 to 180, to about 1e-6; NaN if one is all zero."""
        return _angles(torch.tensor([self[:3]], dtype=torch.float64)).item()

    @property
    def sign_agreement(self) -> float:
        """The share, 0 to 1, of the entries nonzero in both whose signs agree; NaN where there are none."""
        return self.agreeing / self.nonzero if self.nonzero else float("nan")

    @property
    def norm_ratio(self) -> float:
        """norm(a) / norm(b); NaN where b is all zero."""
        return (self.aa / self.bb) ** 0.5 if self.bb else float("nan")


def measure(
    patch: Patch,
    loss: Tensor | None = None,
    *,
    per_sample: bool = False,
    group: ProcessGroup | None = None,
) -> list[Row]:
    """How the feedback of each layer, and of all together, compares with backprop on the graph of `loss`.

    Call it before `loss.backward()`; it makes two gradient passes of its own. The graph, the parameters'
    `.grad`, buffers, random states, counts and probes are as if it had not been called; hooks that you have
    put on tensors of the graph, `retain_grad()` among them, see both passes. Without `loss` it gives what V
    and W alone tell: `weight_angle`, `sign_agreement` and `norm_ratio`.

    Args:
        patch: the handle.
        loss: a scalar that a forward of the patched model has just given.
        per_sample: also gives `error_angle_per_sample`, the mean of the angles of single samples (along the
            first dimension of the layer's input; inside nn.MultiheadAttention that is the position), and
            `error_angle_samples`, over how many; a sample without an error signal has none.
        group: of torch.distributed, whose ranks hold shares of one batch and losses that sum up, or average,
            to that of the whole: all of them must call it, and the rows are those of the whole batch. Without
            it they are of this rank's own share.

    Returns:
        Rows by layer in the order of `patch.layers`, then those of the whole network. A layer to which the
        loss sends no error signal, or which sends none on, has `error_angle` NaN; one whose weight gets no
        gradient, `gradient_angle` NaN.

    Raises:
        ValueError: `loss` is no scalar, or its graph holds no patched layer.
        RuntimeError: the graph is used up, was made by compiled code, or holds a reentrant checkpoint;
            parameters are sharded; it is the first step of DistributedDataParallel with `static_graph=True`.
    """
    bracket = patch._bracket
    if loss is None:
        return list(weight_rows(bracket))
    _check(bracket, loss)
    parameters = {layer: [p for p in layer.parameters() if p.requires_grad] for layer in bracket.layers}
    with _as_if_nothing_were(patch), observed(bracket, per_sample) as errors:
        delivered = _gradients(loss, parameters)
    with _as_if_nothing_were(patch), patch.exact():
        exact = _gradients(loss, parameters)
    if not errors.seen and not any(delivered.values()):
        raise ValueError(
            "the graph of this loss holds no patched layer: was it made without gradients, with the patch "
            "disabled, or by another model?"
        )
    if group is not None:
        for gradient in [g for layer in bracket.layers for g in (*delivered[layer], *exact[layer])]:
            torch.distributed.all_reduce(gradient, group=group)
    gradients = {
        layer: Sums.total([Sums(), *map(Sums.of, delivered[layer], exact[layer])]) for layer in bracket.layers
    }
    rows = [*weight_rows(bracket), *errors.rows(bracket.layers, group)]
    rows += [_row(layer, "gradient_angle", total.angle) for layer, total in gradients.items()]
    rows.append(_row(None, "gradient_angle", Sums.total(gradients.values()).angle))
    return sorted(rows, key=_order(bracket))


def weight_rows(bracket: Bracket) -> Iterator[Row]:
    """`weight_angle`, `sign_agreement` and `norm_ratio` of each layer and of all together."""
    totals: dict[Layer | None, Sums] = {}
    for layer in bracket.layers:
        w = layer.weight().detach()
        totals[layer] = Sums.of(layer.feedback(w), w)
    totals[None] = Sums.total(totals.values())
    for of, total in totals.items():
        yield _row(of, "weight_angle", total.angle)
        yield _row(of, "sign_agreement", total.sign_agreement)
        yield _row(of, "norm_ratio", total.norm_ratio)


class ErrorAngles:
    """What is seen of error signals while they pass the layers: V's and W's product with the same delta.

    Backwards count together as long as they accumulate: one that finds no gradient in any patched weight is
    the first of its step, and what was seen before it belongs to a step that was given up.
    """

    def __init__(self, layers: Iterable[Layer], per_sample: bool = False) -> None:
        self.per_sample = per_sample
        self.seen: dict[Layer, list[Tensor]] = {}
        self._samples: dict[Layer, list[Tensor]] = {}
        self._layers = list(layers)
        self._backward = -1

    def observe(self, layer: Layer, by_v: Tensor, by_w: Tensor) -> None:
        """Notes one error signal: its products with V and with W, each of the input's shape."""
        if self._backward != (now := torch._C._current_graph_task_id()):
            self._backward = now
            trained = [p for each in self._layers for p in each.parameters() if p.requires_grad]
            if trained and all(p.grad is None for p in trained):
                self.seen.clear()
                self._samples.clear()
        self.seen.setdefault(layer, []).append(_sums(*_flat(by_v, by_w), signs=False))
        if self.per_sample:
            samples = len(by_v) if by_v.dim() >= len(layer.info.shape) else 1  # layers take single ones too
            a, b = (x.reshape(samples, x.numel() // max(1, samples)) for x in (by_v, by_w))
            self._samples.setdefault(layer, []).append(_angles_of_rows(a, b))

    def rows(self, layers: Iterable[Layer], group: ProcessGroup | None = None) -> Iterator[Row]:
        """The rows of each layer; what was not seen is NaN. With a group all its ranks must ask, and what
        they have seen counts together."""
        layers = list(layers)
        seen = [self._sums_of(layer) for layer in layers]
        if group is not None and seen:
            table = torch.tensor(seen, dtype=torch.float64, device=layers[0].weight().device)
            torch.distributed.all_reduce(table, group=group)
            seen = table.tolist()
        for layer, (ab, aa, bb, degrees, samples) in zip(layers, seen, strict=True):
            yield _row(layer, "error_angle", Sums(ab, aa, bb).angle)
            if self.per_sample:
                mean = degrees / samples if samples else float("nan")
                yield _row(layer, "error_angle_per_sample", mean)
                yield _row(layer, "error_angle_samples", samples)

    def _sums_of(self, layer: Layer) -> list[float]:
        """Those of its error signals, the sum of its samples' angles, and over how many."""
        calls = (Sums(*part.tolist()) for part in self.seen.get(layer, []))
        parts = [part.cpu() for part in self._samples.get(layer, [])]
        angles = torch.cat([torch.empty(0, device="cpu"), *parts])
        samples = float(angles.isfinite().sum())
        return [*Sums.total([Sums(), *calls])[:3], angles.nansum().item(), samples]


@contextmanager
def observed(bracket: Bracket, per_sample: bool = False) -> Iterator[ErrorAngles]:
    """Collects the error angles of the backwards within."""
    errors = ErrorAngles(bracket.layers, per_sample)
    bracket.observers.append(errors.observe)
    try:
        yield errors
    finally:
        bracket.observers.remove(errors.observe)


def _check(bracket: Bracket, loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a tensor of one number, not {shape}")
    if loss.grad_fn is None:
        raise ValueError("loss has no graph: was it made without gradients, or detached?")
    if any(hasattr(p, "full_tensor") for layer in bracket.layers for p in layer.parameters()):
        raise RuntimeError(
            "measure(patch, loss) does not work on sharded parameters, whose gradients only backward() puts "
            "together; use patch.watch, or measure(patch) for what V and W alone tell"
        )


def _gradients(loss: Tensor, parameters: dict[Layer, list[Tensor]]) -> dict[Layer, list[Tensor]]:
    """The gradients of each layer's parameters, of those that the loss reaches. The pass visits what
    `loss.backward()` would."""
    leaves = list(_leaves(loss))
    try:
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this loss is used up: call measure(patch, loss) before loss.backward()"
            ) from error
        if "use_reentrant" in str(error):
            raise RuntimeError(
                "measure(patch, loss) needs gradients of a part of the graph, which reentrant checkpoints do "
                "not give: checkpoint with use_reentrant=False"
            ) from error
        raise
    gradient = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}
    return {
        layer: [g for p in of_layer if (g := gradient.get(id(p))) is not None]
        for layer, of_layer in parameters.items()
    }


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors for which `loss.backward()` would gather gradients.

    Raises:
        RuntimeError: the graph holds what a pass of ours would not see, or would disturb.
    """
    nodes, seen = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node: Any = nodes.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable
        if node.name().startswith("CompiledFunction"):
            raise RuntimeError(
                "measure(patch, loss) cannot look inside compiled code; build the loss by the uncompiled "
                "model, or call measure(patch) for what V and W alone tell"
            )
        ddp = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
        if ddp is not None and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued:
            raise RuntimeError(
                "DistributedDataParallel with static_graph=True makes up its mind in the first backward, "
                "which must be the training's own: call measure(patch, loss) from the second step on"
            )
        for earlier, _ in node.next_functions:
            if earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)


@contextmanager
def _as_if_nothing_were(patch: Patch) -> Iterator[None]:
    """Counts, probes, buffers and random states are after the block what they were before it; within it no
    probe is called. (Checkpoints run forwards in a backward.)"""
    bracket = patch._bracket
    kept = [(layer, vars(layer).copy()) for layer in bracket.layers]
    observers, bracket.observers = bracket.observers, []
    buffers: dict[Tensor, Tensor] = {}

    def keep(module: torch.nn.Module, args: object) -> None:
        buffers.update({buffer: buffer.clone() for buffer in module.buffers() if buffer not in buffers})

    devices = {p.device for p in patch.model.parameters() if p.device.type == "cuda"}
    recomputing = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        with torch.random.fork_rng(devices=devices):
            for layer in bracket.layers:
                layer.taps = type(layer.taps)()
            yield
    finally:
        recomputing.remove()
        bracket.observers = observers
        for layer, before in kept:
            vars(layer).update(before)
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # by `data`, so that a graph which has saved the buffer goes on


def _row(layer: Layer | None, metric: str, value: float) -> Row:
    return (
        Row(None, None, metric, value) if layer is None else Row(layer.info.name, layer.depth, metric, value)
    )


def _order(bracket: Bracket) -> Callable[[Row], tuple[int, int]]:
    places = {name: place for place, name in enumerate([layer.info.name for layer in bracket.layers])}
    return lambda row: (len(places) if row.layer is None else places[row.layer], _METRICS.index(row.metric))


_METRICS = (
    "weight_angle",
    "error_angle",
    "error_angle_per_sample",
    "error_angle_samples",
    "gradient_angle",
    "sign_agreement",
    "norm_ratio",
)


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both flattened, entry by entry; in the order of memory where it is the same, which saves a copy."""
    if a.stride() == b.stride() and not a.is_contiguous():
        order = sorted(range(a.dim()), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return a.reshape(-1), b.reshape(-1)


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor (torch.distributed's DTensor) put together, for which every rank must ask."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole.to_dense() if whole.is_sparse else whole


def _wide(x: Tensor) -> torch.dtype:
    """The type in which sums are made: float64, but on Apple's GPUs, which lack it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _sums(a: Tensor, b: Tensor, signs: bool) -> Tensor:
    """The numbers of `Sums` for two flat tensors, on their device; without `signs` the last two are zero."""
    total = torch.zeros(5, dtype=_wide(a), device=a.device)
    block = _block(a)
    for start in range(0, a.numel(), block):
        x, y = (part[start : start + block].to(total.dtype) for part in (a, b))
        total[:3] += torch.stack([x.dot(y), x.dot(x), y.dot(y)])
        if signs:
            agreed = (x * y).sign_()  # 1, -1, or 0 where one is zero: quicker than comparing
            nonzero = agreed.dot(agreed)
            total[3:] += torch.stack([(agreed.sum() + nonzero) / 2, nonzero])
    return total


def _angles_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each row of a with the same row of b, in degrees; NaN where one is all zero."""
    sums = []
    rows = max(1, _block(a) // max(1, a.shape[1]))
    for start in range(0, len(a), rows):
        x, y = (part[start : start + rows].to(_wide(a)) for part in (a, b))
        sums.append(torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], dim=1))
    return _angles(torch.cat(sums)) if sums else a.new_empty(0, dtype=_wide(a))


def _block(x: Tensor) -> int:
    return _BLOCK if x.device.type == "cpu" else _GPU_BLOCK


def _angles(sums: Tensor) -> Tensor:
    """Degrees, shape (N,), from a.b, a.a and b.b, shape (N, 3); NaN where one of them is all zero."""
    ab, aa, bb = sums.unbind(1)
    across = (aa * bb - ab * ab).clamp(min=0).sqrt()
    return torch.where(aa * bb > 0, torch.rad2deg(torch.atan2(across, ab)), torch.nan)
