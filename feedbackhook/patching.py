"""`patch` and the handle that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.audit import Finding, graph_of
from feedbackhook.core.edge import Layer, Tap
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.interception import Bracket
from feedbackhook.core.marks import mark_of
from feedbackhook.monitor import Watch
from feedbackhook.rules import Rule, changed, describe, make_rule, rule_name, rule_values
from feedbackhook.selection import LayerInfo, Selection, Target, find_targets, layers_in, select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.store.recorder import Recorder


class LayerRow(NamedTuple):
    """One patched layer, for the eye.

    Args:
        name: its full name; where a weight is tied, that of the first module that holds it.
        kind: "Linear", "Conv2d" and so on.
        shape: that of the weight.
        rule: the rule, with the options that differ from their defaults.
        calls: forward calls with gradients enabled.
        rerouted: error signals that went through V.
        upstream: whether its input required a gradient; where not, there is no error signal to reroute, as
            in most first layers. None before the first call.
        depth: its place, from 0, in the order of the forward's calls. None before the first call.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rule: str
    calls: int
    rerouted: int
    upstream: bool | None
    depth: int | None


def patch(
    model: nn.Module,
    mode: str | Mapping[str, str | Mapping[str, Any]] = "sign",
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    seed: int = 0,
    recompute: bool = False,
    fused: bool = False,
    **options: Any,
) -> Patch:
    """Patches `model` in place: from now on its error signals go through feedback weights V instead of W.

    Forward outputs, parameters, `state_dict` keys and, given the error signal that reaches a layer, its
    weight and bias gradients stay as they are. Every `nn.Linear`, `nn.Conv1d/2d/3d`,
    `nn.ConvTranspose1d/2d/3d` and `nn.MultiheadAttention` is patched, the classifier included.

    Args:
        model: any module.
        mode: the name of a rule: "symmetric", "sign", "random", "tensor", "uSF", "NuSF", "brSF", "frSF",
            "RndF" or one of your own (`register_rule`). Or a mapping from regular expressions for full names
            to a mode, or to a dict of `mode` and its options: the first that matches a layer wins, and layers
            that none matches stay exact.
        include: layers to patch; None is all. A string is a regular expression for the full name, a list
            holds full names, name suffixes or module types.
        exclude: layers to leave exact, in the same form; it wins over `include`.
        seed: with the layers' names it decides all random parts of V.
        recompute: keep no random parts, which take as much memory as the weights, but draw them again for
            each error signal. V is the same; the step takes longer, with `fused` hardly.
        fused: draw by one kernel, which torch.compile makes when it is first needed (seconds; on CPUs it
            needs a C++ compiler). V is the same; worth it where V is drawn often: brSF, `recompute`.
        options: the rule's own, such as `concordance=0.8`; none beside a mapping.

    Returns:
        The handle: a context manager, with `remove()`, `enabled`, `set()`, `layers` and more.

    Raises:
        ValueError: unknown mode; an option out of range; a selection without effect; nothing to patch; the
            model or a part of it is patched already.
        TypeError: an option that the rule does not have, or of the wrong type; a fused recurrent layer; a
            complex weight.
        The model is untouched then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):  # numpy's integers have it too
        raise TypeError(f"seed must be an int, not {seed!r}")
    _refuse_second_patch(model)
    patterns = list(mode) if isinstance(mode, Mapping) else None
    if patterns == []:
        raise ValueError("the mapping of modes is empty")
    targets = find_targets(model, include, exclude, patterns)
    layers = _layers(_rules(mode, options, targets), int(seed), recompute, fused)
    _check([(layer.info, layer.feedback.rule) for layer in layers])
    for layer in layers:
        _try(layer)  # whatever is wrong shows before anything is attached
    bracket = Bracket(layers)
    handle = Patch(model, bracket)
    bracket.attach(model, handle)
    return handle


class Patch:
    """The handle of a patched model. Made by `feedbackhook.patch`."""

    def __init__(self, model: nn.Module, bracket: Bracket) -> None:
        self._model = model
        self._bracket = bracket

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the patch off: no hook, no attribute is left. Graphs that are already built keep their V."""
        self._bracket.detach()

    @property
    def enabled(self) -> bool:
        """Whether forwards are rerouted. Set to False, what is built from then on is plain backprop."""
        return self._bracket.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._bracket.enabled = bool(value)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """A context in which `backward` runs plain backprop, on graphs that were built with the patch.

        Raises:
            RuntimeError: the model was compiled; what a compiled backward does is fixed.
        """
        if any(layer.compiled for layer in self._bracket.layers):
            raise RuntimeError(
                "exact() cannot change the backward of a compiled model; set patch.enabled = False before "
                "the forward, or run the model uncompiled"
            )
        before = self._bracket.exact
        self._bracket.exact = True
        try:
            yield
        finally:
            self._bracket.exact = before

    def set(self, **options: Any) -> None:
        """Changes options of the rule, during training too: `patch.set(concordance=0.5)`. Where layers follow
        different rules, those change that have all of these options.

        Raises:
            TypeError, ValueError: as in `patch`; nothing is changed then.
        """
        having = [
            layer
            for layer in self._bracket.layers
            if options.keys() <= rule_values(layer.feedback.rule).keys()
        ]
        old = {id(layer.feedback.rule): layer.feedback.rule for layer in having or self._bracket.layers}
        new = {key: changed(rule, options) for key, rule in old.items()}
        rules = [new[id(layer.feedback.rule)] for layer in having]
        _check([(layer.info, rule) for layer, rule in zip(having, rules, strict=True)])
        for layer, rule in zip(having, rules, strict=True):
            layer.feedback.follow(rule)
        _draw_now(having)

    def redraw(self) -> None:
        """Draws the random parts of every V anew, as `redraw="update"` does after each optimizer step."""
        for layer in self._bracket.layers:
            layer.feedback.redraw()
        _draw_now(self._bracket.layers)

    def feedback(self, name: str) -> Tensor:
        """Today's V of a layer, in the layout of its weight, detached.

        Raises:
            KeyError: no patched layer has that name.
        """
        layer = self._layer(name)
        return layer.feedback(layer.weight()).clone()

    def weight(self, name: str) -> Tensor:
        """Today's W of a layer, as its forward uses it, detached.

        Raises:
            KeyError: no patched layer has that name.
        """
        return self._layer(name).weight().detach()

    def on_error_signal(self, name: str, fn: Tap) -> RemovableHandle:
        """Calls `fn(error_in, error_out)` for each error signal that passes a layer; the handle's `remove()`
        ends it.

        `error_out` is the signal at the layer's output, of the output's shape; `error_in` the one that V
        sends on, of the input's shape, or None where nothing lies upstream.

        Raises:
            KeyError: no patched layer has that name.
        """
        taps = self._layer(name).taps
        handle = RemovableHandle(taps)
        taps[handle.id] = fn
        return handle

    def audit(self, output: object) -> list[Finding]:
        """Looks into the graph of an output, or of a loss, for weights that send error signals exactly.

        The same happens by itself in the first forward in which a module calls a function for the first time,
        and in the backward that follows: a patched weight is an error there, another is a warning.

        Args:
            output: a tensor, or tensors in tuples, lists, mappings or dataclasses, with their graph.

        Returns:
            A finding for each weight and operation: its name, whether a patched layer holds it (else it
            belongs to no layer that can be patched), its shape, and the operation as the graph calls it. None
            are expected.

        Raises:
            ValueError: the output has no graph.
        """
        if not (nodes := graph_of(output)):
            raise ValueError("the output has no graph: was it made without gradients, or detached?")
        return self._bracket.audit(nodes)

    def watch(
        self,
        every: int,
        recorder: Recorder,
        *,
        step: int = 0,
        per_sample: bool = False,
        group: ProcessGroup | None = None,
    ) -> Watch:
        """Measures inside the training that goes on: every `every`-th step of the optimizer that holds the
        patched weights, the first included, puts into `recorder` what `feedbackhook.measure` gives but
        `gradient_angle`, and the norms of weights and gradients and the learning rate. With gradient
        accumulation a step is all backwards before it.

        Rows have the number of steps done before and `recorder.epoch`, which you set. Training goes as it
        would without. A watched step takes one more product of each error signal, with W.

        Args:
            every: steps from one that is watched to the next.
            recorder: where the rows go.
            step: how many steps have been done already, for a run that goes on.
            per_sample: as in `feedbackhook.measure`.
            group: of torch.distributed, whose ranks hold shares of one batch: error angles are of all their
                samples then, and every rank must watch the same steps. Without it they are of this rank's.

        Returns:
            A handle whose `remove()` ends it, as that of the patch does.

        Raises:
            ValueError: `every` or `step` out of range.
            RuntimeError: the patch is removed. Later, from the optimizer's step: where model or step run as
                compiled code, which shows nothing; where the step runs its own backward (`step(closure)`) or
                lies inside one; where two optimizers step after a backward each.
        """
        if not self._bracket.attached:
            raise RuntimeError("this patch is removed: there is nothing to watch")
        return Watch(self, every, recorder, step, per_sample, group)

    @property
    def layers(self) -> list[LayerRow]:
        """A row for each patched layer, in the order in which the model registers them."""
        return [
            LayerRow(
                layer.info.name,
                layer.info.kind,
                layer.info.shape,
                describe(layer.feedback.rule),
                layer.calls,
                layer.rerouted,
                layer.upstream,
                layer.depth,
            )
            for layer in self._bracket.layers
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that decides V, in plain types (and the user's tensors, for "tensor"): loadable with
        `torch.load(weights_only=True)`. Random parts are not stored: seed and draw counts give them again."""
        layers = {
            layer.info.name: {
                "mode": rule_name(layer.feedback.rule),
                "options": rule_values(layer.feedback.rule),
                "seed": layer.feedback.seed,
                "draws": layer.feedback.draws,
                "drawn_as": layer.feedback.layer.name,  # another name than its own after weights came apart
            }
            for layer in self._bracket.layers
        }
        return {"enabled": self.enabled, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, on a patch of the same layers.

        Raises:
            ValueError: the layers are others; nothing is changed then.
        """
        own = {layer.info.name: layer for layer in self._bracket.layers}
        saved = state["layers"]
        if own.keys() != saved.keys():
            missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
            raise ValueError(f"the state lacks the layers {missing} and has the unknown layers {unknown}")
        restored = {
            name: own[name].feedback.like(
                make_rule(row["mode"], row["options"]), row["seed"], row["draws"], row.get("drawn_as")
            )
            for name, row in saved.items()
        }
        for name, feedback in restored.items():
            own[name].feedback = feedback
        _draw_now(self._bracket.layers)
        self.enabled = state["enabled"]

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._model

    def name_of(self, module: nn.Module) -> str | None:
        """The full name of a module in the patched model; None where it is no part of it."""
        return next((name for name, part in self._model.named_modules() if part is module), None)

    def __repr__(self) -> str:
        return f"<feedbackhook.Patch of {type(self._model).__name__}, {len(self._bracket.layers)} layers>"

    def __str__(self) -> str:
        """A table: which layers, which rule, how often each was rerouted; then the layers left exact."""
        head = ("layer", "kind", "weight", "rule", "calls", "rerouted")
        rows = [
            (
                row.name or "(root)",
                row.kind,
                "x".join(map(str, row.shape)),
                row.rule,
                str(row.calls),
                "no upstream" if row.upstream is False else str(row.rerouted),
            )
            for row in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows)
        ]
        patched = {name for layer in self._bracket.layers for name in layer.names}
        moved = {target.module for layer in self._bracket.layers for target in layer.targets}
        left = [  # a patched module may have got another name since then
            name or "(root)"
            for name, module in layers_in(self._model).items()
            if name not in patched and module not in moved
        ]
        if left:
            lines.append(f"exact: {', '.join(left)}")
        return "\n".join(line.rstrip() for line in lines)

    def _layer(self, name: str) -> Layer:
        for layer in self._bracket.layers:
            if name in layer.names:
                return layer
        known = ", ".join(repr(layer.info.name) for layer in self._bracket.layers)
        raise KeyError(f"no patched layer is named {name!r}; patched: {known}")


def get_patch(model: nn.Module) -> Patch | None:
    """The patch on `model`, on a part of it or on a whole of which it is a part; None where there is none.

    Raises:
        ValueError: parts of it have different patches.
    """
    patches = _patches(model)
    if len(patches) > 1:
        raise ValueError(
            f"{len(patches)} patches lie on parts of this {type(model).__name__}; ask for one part's, "
            "or take all off with feedbackhook.unpatch(model)"
        )
    return patches[0][1] if patches else None


def unpatch(model: nn.Module) -> None:
    """Takes off every patch on `model`, on parts of it and on a whole of which it is a part.

    Raises:
        ValueError: there is none.
    """
    patches = _patches(model)
    if not patches:
        raise ValueError(f"this {type(model).__name__} is not patched")
    for _, handle in patches:
        handle.remove()


def _patches(model: nn.Module) -> list[tuple[str, Patch]]:
    """Each patch met in the tree, with the name of the first module that carries it."""
    found: dict[int, tuple[str, Patch]] = {}
    for name, module in model.named_modules():
        mark = mark_of(module)
        if mark is not None and (bracket := mark.link.bracket) is not None:
            found.setdefault(id(bracket), (name, bracket.patch))
    return list(found.values())


def _refuse_second_patch(model: nn.Module) -> None:
    for name, patch_found in _patches(model):
        where = f"its part {name!r}" if name else "it"
        if (inside := patch_found.name_of(model)) and not name:
            where = f"it, {inside!r} of a {type(patch_found.model).__name__},"
        raise ValueError(
            f"cannot patch this {type(model).__name__}: {where} is patched already; "
            "feedbackhook.get_patch(model) gives that patch, feedbackhook.unpatch(model) takes it off"
        )


def _rules(
    mode: str | Mapping[str, str | Mapping[str, Any]], options: Mapping[str, Any], targets: list[Target]
) -> list[tuple[Target, Rule]]:
    """The targets that are to be patched, each with its rule."""
    if not isinstance(mode, Mapping):
        rule = make_rule(mode, options)
        return [(target, rule) for target in targets]
    if options:
        raise TypeError(
            f"options beside a mapping of modes ({', '.join(options)}) would belong to no rule; "
            "write them as {pattern: dict(mode=..., option=...)}"
        )
    modules = {target.info.name: target.module for target in targets}
    rules: dict[str, Rule] = {}
    for pattern, entry in mode.items():
        if not isinstance(entry, (str, Mapping)):
            raise TypeError(f"mode[{pattern!r}] must be a mode or a dict of mode and options, not {entry!r}")
        given = {"mode": entry} if isinstance(entry, str) else dict(entry)
        if "mode" not in given:
            raise TypeError(f"mode[{pattern!r}] lacks the key 'mode'")
        rule = make_rule(given.pop("mode"), given)
        rules = {**dict.fromkeys(select("mode", pattern, modules), rule), **rules}
    return [(target, rules[target.info.name]) for target in targets]


def _layers(rules: list[tuple[Target, Rule]], seed: int, recompute: bool, fused: bool) -> list[Layer]:
    """A layer for each target; targets that hold one parameter as their weight share a layer.

    Raises:
        ValueError: they have different rules.
    """
    by_weight: dict[int, Layer] = {}
    layers = []
    for target, rule in rules:
        weight = target.parameter()
        layer = by_weight.get(id(weight)) if weight is not None else None
        if layer is None:
            layer = Layer([target], Feedback(rule, target.info, seed, 0, recompute, fused))
            layers.append(layer)
            if weight is not None:
                by_weight[id(weight)] = layer
        elif layer.feedback.rule is rule:
            layer.targets.append(target)
        else:
            raise ValueError(
                f"{layer.info.name!r} and {target.info.name!r} share a weight; give them one rule"
            )
    return layers


def _try(layer: Layer) -> None:
    """Makes V once.

    Raises:
        TypeError: of such a weight no V can be made; the error names the layer.
    """
    layer.check()
    if not layer.has_weight():
        return  # the forward makes a weight of it, which V will follow
    if not layer.is_opaque():
        layer.feedback(layer.weight())
        return
    try:
        layer.feedback(layer.weight())
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise TypeError(
            f"the weight of {layer.info.name!r} is a {layer.weight_type()}, of which no V can be made; "
            f"exclude={[layer.info.name]} leaves it with exact backprop"
        ) from error


def _draw_now(layers: Iterable[Layer]) -> None:
    """Draws the random parts, so that compiled code finds them, or their keys, as it found the old ones."""
    for layer in layers:
        if layer.has_weight():
            layer.feedback.parts(layer.weight())


def _check(rules: list[tuple[LayerInfo, Rule]]) -> None:
    """Lets each rule that has a `check` see the layers that follow it."""
    followers: dict[int, tuple[Rule, list[LayerInfo]]] = {}
    for info, rule in rules:
        followers.setdefault(id(rule), (rule, []))[1].append(info)
    for rule, infos in followers.values():
        if callable(check := getattr(rule, "check", None)):
            check(infos)
