"""Before any training: how far do gradients under each rule point backprop's way?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from feedbackhook.core.angles import Sums, sums_of
from feedbackhook.core.layer import Patched
from feedbackhook.diagnosis.floor import floor_of
from feedbackhook.diagnosis.grid import CONCORDANCES, MODES, Modes, Setting, settings
from feedbackhook.diagnosis.passes import (
    Batch,
    Loss,
    Scales,
    listed,
    loss_of,
    named_gradients,
    observe,
    preserved,
    trainable,
)
from feedbackhook.diagnosis.profiled import Profile, Values, summarized
from feedbackhook.handle import Patch
from feedbackhook.measurement import collect_error_angles
from feedbackhook.patching import get_patch, patch
from feedbackhook.selection import Selection


class _Exact(NamedTuple):
    """What backprop gives for one batch.

    Args:
        gradients: by the id of each parameter.
        scales: by the name of each layer.
    """

    gradients: dict[int, Tensor]
    scales: dict[str, Scales]


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    modes: Modes = MODES,
    concordances: Iterable[float] = CONCORDANCES,
    seeds: int = 3,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> Profile:
    """Compare each layer's gradient under a grid of rules with exact backprop, before any training.

    The model runs in the training mode in which it is. Afterwards its weights, `.grad`, buffers, training
    modes and hooks, and the random states are as they were, also after an error.

    Args:
        model: a model that is not patched.
        batches: a few pairs (input, target), or mappings of keyword arguments of the model, on its device.
            All are used, so pass `itertools.islice(loader, 2)` rather than a whole loader. An input that is
            a tuple or a mapping becomes several arguments.
        loss: a function of the model's output and the target, such as `torch.nn.functional.cross_entropy`;
            for a mapping, of the output and the mapping. It returns a scalar.
        modes: names of rules, or a mapping from names of your own to arguments of `feedbackhook.patch`.
        concordances: those at which rules with an option `concordance` are profiled.
        seeds: number of draws of each rule.
        include: as in `feedbackhook.patch`, for all rules.
        exclude: as in `feedbackhook.patch`, for all rules.

    Returns:
        For each rule, layer and metric, the mean and the standard deviation over batches and draws:
        `gradient_angle` (degrees) and `gradient_norm_ratio`, of the layer's weight gradient as delivered and
        under exact backprop; `error_angle` (degrees), between V's and W's product with the same error signal.
        A gradient angle is NaN if the exact gradient is zero or at the numerical floor
        (`feedbackhook.diagnosis.floor`); `Profile.undefined` says why.

    Raises:
        ValueError: the model is patched, `batches` is empty, `seeds` is less than 1, a rule or option is
            wrong, or the loss is no scalar or has no graph.
        TypeError: a batch is neither a pair nor a mapping, or an option has the wrong type.
        RuntimeError: what the model or a rule raises.
    """
    if get_patch(model) is not None:
        raise ValueError(
            "this model is patched; remove the patch first, or call feedbackhook.diagnose(patch)"
        )
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds must be an integer of at least 1, not {seeds!r}")
    grid = settings(modes, concordances)
    chosen = {"include": include, "exclude": exclude}
    given = listed(batches, model)
    exact, order = _exact(model, given, loss, chosen)
    values: Values = defaultdict(list)
    undefined: dict[str, str] = {}
    for setting in [Setting(s.mode, s.concordance, {**chosen, **s.arguments}) for s in grid]:
        for seed in range(seeds):
            _profile_draw(model, zip(given, exact, strict=True), loss, setting, seed, values, undefined)
    return Profile(summarized(values, order), undefined, len(given), seeds, _zero_scales(model))


def _profile_draw(
    model: nn.Module,
    batches: Iterable[tuple[Batch, _Exact]],
    loss: Loss,
    setting: Setting,
    seed: int,
    values: Values,
    undefined: dict[str, str],
) -> None:
    """Add the metrics of one draw of one rule."""
    with patch(model, seed=seed, **setting.arguments) as handle:
        for batch, backprop in batches:
            with preserved(model):
                found = _delivered(handle, batch, loss, backprop, undefined)
            for (layer, metric), value in found.items():
                values[setting.mode, setting.concordance, layer, metric].append(value)


def _exact(
    model: nn.Module, batches: list[Batch], loss: Loss, chosen: dict[str, Selection | None]
) -> tuple[list[_Exact], dict[str, int]]:
    """Return what backprop gives for each batch, and the depth of each layer."""
    found: list[_Exact] = []
    with patch(model, "symmetric", **chosen) as handle:  # type: ignore[arg-type]
        state = handle.state
        for batch in batches:
            with preserved(model), observe(state) as observed:
                value = loss_of(model, batch, loss)
                with state.exact_backward():
                    gradients = named_gradients(value, model.parameters())
            found.append(_Exact(gradients, {each.info.name: s for each, s in observed.of.items()}))
        called = [each for each in state.patched if each.depth is not None]
    return found, {each.info.name: each.depth for each in called if each.depth is not None}


def _zero_scales(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the normalizations whose scale is zero, as of the last one of a residual branch."""
    scales = {
        name: dict(module.named_parameters(recurse=False)).get("weight")
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
    }
    return tuple(name for name, scale in scales.items() if scale is not None and not scale.any())


def _delivered(
    handle: Patch, batch: Batch, loss: Loss, backprop: _Exact, undefined: dict[str, str]
) -> dict[tuple[str, str], float]:
    """Return each layer's metrics for one batch."""
    state = handle.state
    with collect_error_angles(state) as errors:
        value = loss_of(handle.model, batch, loss, state)
        gradients = named_gradients(value, [p for each in state.patched for p in trainable(each)])
    found: dict[tuple[str, str], float] = {}
    for each in state.patched:
        for metric, number in _compare(each, gradients, backprop, undefined).items():
            found[each.info.name, metric] = number
    for row in errors.rows(state.patched):
        found[str(row.layer), row.metric] = row.value
    return found


def _compare(
    each: Patched, gradients: dict[int, Tensor], backprop: _Exact, undefined: dict[str, str]
) -> dict[str, float]:
    """Return the angle and the ratio of norms of a layer's gradients; note why an angle is undefined."""
    name, nothing = each.info.name, {"gradient_angle": float("nan"), "gradient_norm_ratio": float("nan")}
    pairs = [
        (gradients.get(id(p), torch.zeros_like(p)), backprop.gradients[id(p)])
        for p in trainable(each)
        if id(p) in backprop.gradients
    ]
    if not pairs:
        undefined.setdefault(name, "its weight gets no gradient")
        return nothing
    sums = Sums.total(Sums(*sums_of(a, b, signs=False).tolist()) for a, b in pairs)
    floor = floor_of(each, sums.bb**0.5, backprop.scales.get(name))
    if floor.reason is not None:
        undefined.setdefault(name, floor.reason)
        return nothing
    return {"gradient_angle": sums.angle, "gradient_norm_ratio": sums.norm_ratio}
