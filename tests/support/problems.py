"""Small float64 networks to try a patch on, and hypothesis strategies that draw layers with their input.

Activations are smooth, so that no gradient is zero by chance, and every weight is drawn from an explicit
generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import feedbackhook

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
PATCHABLE = (nn.Linear, *CONV.values(), *CONV_TRANSPOSE.values())


# --- values ----------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64, from a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 with every parameter drawn anew, so that none is zero; in place."""
    model.double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.copy_(draw(*parameter.shape, seed=1000 * seed + number) / fan_in**0.5)
    return model


def layer_names(model: nn.Module) -> list[str]:
    """Every layer that `patch` takes by default."""
    return [name for name, module in model.named_modules() if isinstance(module, PATCHABLE)]


def random_feedback(model: nn.Module, names: Iterable[str] | None = None, seed: int = 7) -> dict[str, Tensor]:
    """V by layer name: independent of W and 1.5 times as large, so that a single entry differs too."""
    feedback = {}
    for number, name in enumerate(layer_names(model) if names is None else names):
        weight = model.get_submodule(name).weight
        v = draw(*weight.shape, seed=1000 * seed + number).to(weight.dtype)
        feedback[name] = v * (1.5 * weight.detach().norm() / v.norm())
    return feedback


# --- one layer between two others ------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A layer between two others, and the shape of the input of the three."""

    layer: Callable[[], nn.Module]
    description: str
    input_shape: tuple[int, ...]
    seed: int = 0

    def __repr__(self) -> str:
        return f"{self.description} on {self.input_shape}, seed {self.seed}"

    def model(self) -> nn.Sequential:
        """`upstream -> tanh -> layer -> tanh -> downstream`; the outer two act on each position alone."""
        layer = self.layer()
        if isinstance(layer, nn.Linear):
            upstream, downstream = nn.Linear(2, layer.in_features), nn.Linear(layer.out_features, 2)
        else:
            pointwise = CONV[len(layer.kernel_size)]
            upstream, downstream = pointwise(2, layer.in_channels, 1), pointwise(layer.out_channels, 2, 1)
        model = nn.Sequential()
        model.add_module("upstream", upstream)
        model.add_module("tanh_1", nn.Tanh())
        model.add_module("layer", layer)
        model.add_module("tanh_2", nn.Tanh())
        model.add_module("downstream", downstream)
        return redrawn(model, self.seed)

    def input(self) -> Tensor:
        """A batch for `model()`, which has 2 features or channels."""
        return draw(*self.input_shape, seed=self.seed + 1)


def _problem(cls: type[nn.Module], args: tuple, options: dict, input_shape: tuple, seed: int) -> Problem:
    words = [str(a) for a in args] + [f"{key}={value!r}" for key, value in options.items()]
    return Problem(lambda: cls(*args, **options), f"{cls.__name__}({', '.join(words)})", input_shape, seed)


PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
SEEDS = st.integers(0, 2**16)
BATCH = st.sampled_from([(), (1,), (3,)])


@st.composite
def linear_problems(draw_from: st.DrawFn) -> Problem:
    """`nn.Linear` on any number of leading dimensions, none included."""
    features = draw_from(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    leading = draw_from(st.lists(st.integers(1, 3), max_size=4))
    options = {"bias": draw_from(st.booleans())}
    return _problem(nn.Linear, features, options, (*leading, 2), draw_from(SEEDS))


@st.composite
def conv_problems(draw_from: st.DrawFn, n: int, padding_mode: str | None = None) -> Problem:
    """`nn.Conv{n}d` on a batch or without one; no `padding_mode` stands for `padding='same'` in any."""
    same = padding_mode is None
    kernel = draw_from(_per_dimension(n, 2 if same else 1, 4 if n < 3 else 3))
    dilation = draw_from(_per_dimension(n, 1, 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = "same" if same else draw_from(st.one_of(_per_dimension(n, 0, 2), st.sampled_from(["valid", 1])))
    stride = (1,) * n if same else draw_from(_per_dimension(n, 1, 3))
    groups = draw_from(st.integers(1, 3))
    channels = [groups * draw_from(st.integers(1, 2)) for _ in ("in", "out")]
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw_from(st.booleans()),
        "padding_mode": padding_mode or draw_from(st.sampled_from(PADDING_MODES)),
    }
    sizes = [max(r, 3) + draw_from(st.integers(0, 2)) for r in reach]
    return _problem(CONV[n], tuple(channels), options, (*draw_from(BATCH), 2, *sizes), draw_from(SEEDS))


@st.composite
def conv_transpose_problems(draw_from: st.DrawFn, n: int) -> Problem:
    """`nn.ConvTranspose{n}d`; the output padding may exceed the stride where the dilation allows it."""
    kernel = draw_from(_per_dimension(n, 1, 3))
    dilation = draw_from(_per_dimension(n, 1, 3))
    stride = draw_from(_per_dimension(n, 1, 3))
    padding = tuple(
        draw_from(st.integers(0, d * (k - 1) // 2)) for d, k in zip(dilation, kernel, strict=True)
    )
    output_padding = tuple(
        draw_from(st.integers(0, max(d, s) - 1)) for d, s in zip(dilation, stride, strict=True)
    )
    groups = draw_from(st.integers(1, 3))
    channels = [groups * draw_from(st.integers(1, 2)) for _ in ("in", "out")]
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw_from(st.booleans()),
    }
    sizes = [draw_from(st.integers(2, 4)) for _ in range(n)]
    return _problem(
        CONV_TRANSPOSE[n], tuple(channels), options, (*draw_from(BATCH), 2, *sizes), draw_from(SEEDS)
    )


def _per_dimension(n: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * n)


PROBLEMS = {
    "Linear": linear_problems(),
    **{f"Conv{n}d, {mode}": conv_problems(n, mode) for n in (1, 2, 3) for mode in PADDING_MODES},
    **{f"Conv{n}d, same": conv_problems(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": conv_transpose_problems(n) for n in (1, 2, 3)},
}


# --- networks with a life of their own -------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.tanh(self.conv1(x)))


class Net(nn.Module):
    """A stem, two blocks and a classifier, to be run in more ways than by calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, stride=2)
        self.blocks = nn.Sequential(Block(3), Block(3))
        self.classifier = nn.Linear(3, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(torch.tanh(self.stem(x)))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier(torch.tanh(features).mean((-2, -1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class InPlaceNet(nn.Module):
    """Every layer's output is overwritten by its activation, or added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.LeakyReLU(0.3, inplace=True)
        self.fc = nn.Linear(4, 5)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        y += x
        y = self.act(y).mean((-2, -1))
        y = self.fc(y)
        y.sigmoid_()
        y = self.classifier(y)
        return y.mul_(2)


class LightningLike(nn.Module):
    """A module that is never called: its method calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.projection = nn.Linear(4, 3)

    def training_step(self, x: Tensor) -> Tensor:
        return self.projection(torch.tanh(self.net(x)))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a training step does not call the module itself")


class FunctionalNet(nn.Module):
    """Its second weight is used without a call of the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc1(x)), self.fc2.weight, self.fc2.bias)


def mlp() -> nn.Sequential:
    """Three linear layers named "0", "2" and "4"."""
    return redrawn(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


MLP_UPSTREAM = ["input", "0.weight", "0.bias", "2.weight", "2.bias"]
"""What of `mlp` an error signal reaches through a patched weight."""


CNN_INPUT = (2, 2, 9, 9)
"""The shape of an input of `Net`."""

CNN_UPSTREAM = ["input", "stem.weight", "blocks.0.conv1.weight", "blocks.1.conv2.weight"]
"""What of `Net` an error signal reaches through a patched weight."""


def patched(problem_or_model, mode="tensor", **options):
    """A fresh model and its patch, with independent random feedback unless told otherwise."""
    model = problem_or_model.model() if isinstance(problem_or_model, Problem) else problem_or_model
    if mode == "tensor" and "feedback" not in options:
        options["feedback"] = random_feedback(model)
    return model, feedbackhook.patch(model, mode, **options)


def conv_net() -> nn.Sequential:
    """Convolutions with groups, strides and padding, one transposed, and a linear layer."""
    return redrawn(
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2, padding="same", dilation=(1, 2)),
            nn.Flatten(),
            nn.Linear(3 * 6 * 6, 3),
        )
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (3, 4)),
    "convolutional": (conv_net, (3, 2, 7, 7)),
}
"""Networks of several layer kinds by name, with the shape of an input."""


# --- removal ---------------------------------------------------------------------------------------------


def patched_copy(plain: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A patched copy of `plain`, and its feedback: random, and independent of the weights."""
    model, feedback = copy.deepcopy(plain), random_feedback(plain)
    feedbackhook.patch(model, "tensor", feedback=feedback)
    return model, feedback


def outside_every_forward(model: nn.Sequential, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, model[0].weight)), model[2].weight)
