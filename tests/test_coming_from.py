"""docs/coming_from.md: what it says to write gives the other toolkits' V and gradients.

BioTorch runs here in the same process, if it is installed. The other two are written by hand from their
formulas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from torch import Tensor, nn

import feedbackhook
from feedbackhook import rules

PAGE = (Path(__file__).parents[1] / "docs/coming_from.md").read_text()
CELLS = re.findall(r"^\| `+(.+?)`(?:.*?)\| `(patch\(model.*?)` \|", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> dict[str, object]:
    """What the code blocks of the page define."""
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    return names


def network(groups: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=2, groups=groups),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 40),
        nn.Tanh(),
        nn.Linear(40, 10),
    ).double()


WEIGHTS = ("0", "2", "5", "7")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (6,), generator=generator)


def written(page: dict[str, object], label: str, model: nn.Module) -> feedbackhook.Patch:
    """Patch as the page's cell beside `label` says."""
    code = dict(CELLS)[label]
    return eval(code, {**page, "patch": feedbackhook.patch, "model": model})


def learn(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The gradients of the input and of all parameters that have one."""
    x, y = batch()
    x.requires_grad_()
    model.zero_grad()
    (F.cross_entropy(model(x), y) if loss is None else loss(model, x)).backward()
    found = {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"input": x.grad.clone(), **found}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        bound = bounds.HALF_OF_FLOAT64 * grad.abs().max().item()
        torch.testing.assert_close(
            ours[name], grad, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_not_backprop(found: dict[str, Tensor], groups: int = 2) -> None:
    exact = learn(network(groups))
    for name in ("input", "0.weight", "2.weight"):
        assert (found[name] - exact[name]).norm() > 0.1 * exact[name].norm(), name


def test_the_page_has_the_cells_that_are_tested_here() -> None:
    assert len(CELLS) == len(dict(CELLS)) == 15


@pytest.mark.parametrize("label", dict(CELLS))
def test_what_the_page_says_to_write_runs(page: dict[str, object], label: str) -> None:
    model = network()
    patch = written(page, label, model)
    if label == "--train-mode DRTP":
        patch.targets(batch()[1])
    learn(model)
    rerouted = sum(row.rerouted for row in patch.layers)
    assert rerouted == (4 if patch.layers[-1].name == "7" else 3)


# --- BioTorch --------------------------------------------------------------------------------------------


@pytest.fixture
def biotorch() -> Callable[..., nn.Module]:
    """Convert the network by BioTorch."""
    reason = 'biotorch is not installed: pip install -e ".[bench]"'
    module = pytest.importorskip("biotorch.module.biomodule", reason=reason)
    return lambda mode, **how: module.BioModule(network(**how), mode=mode, output_dim=10).double()


def feedback_of(peer: nn.Module, mode: str) -> dict[str, Tensor]:
    """BioTorch's V, as its last forward used it."""
    layers = {name: peer.module.get_submodule(name) for name in WEIGHTS}
    if mode == "frsf":  # it keeps the magnitudes alone
        return {name: layer.weight_backward * layer.weight.sign() for name, layer in layers.items()}
    return {name: layer.weight_backward.detach().clone() for name, layer in layers.items()}


@pytest.mark.parametrize("mode", ["fa", "usf", "frsf", "brsf"])
def test_the_gradients_are_biotorchs_on_its_v(biotorch: Callable[..., nn.Module], mode: str) -> None:
    peer = biotorch(mode)
    theirs = learn(peer)
    model = network()
    feedbackhook.patch(model, "tensor", feedback=feedback_of(peer, mode))
    assert_equal(learn(model), theirs)
    assert_not_backprop(theirs)


def test_the_pages_usf_is_biotorchs(biotorch: Callable[..., nn.Module], page: dict[str, object]) -> None:
    peer, model = biotorch("usf"), network()
    written(page, '"usf"', model)
    assert_equal(learn(model), learn(peer))


@pytest.mark.parametrize("mode", ["fa", "frsf", "brsf"])
def test_v_is_drawn_from_biotorchs_distribution(
    biotorch: Callable[..., nn.Module], page: dict[str, object], mode: str
) -> None:
    """Uniform to the same bound, and the signs of W where the rule takes them."""
    peer, model = biotorch(mode), network()
    patch = written(page, f'"{mode}"', model)
    learn(peer), learn(model)
    for name, theirs in feedback_of(peer, mode).items():
        ours, weight = patch.feedback(name), model.get_submodule(name).weight
        fan_out = weight.shape[0] * weight[0, 0].numel()
        bound = (6 / (weight[0].numel() + fan_out)) ** 0.5
        for v in (ours, theirs):
            assert v.abs().max() <= bound * (1 + bounds.ROUNDING["float32"])
            spread = bounds.of_mean(bound / 12**0.5, v.numel())  # of U[0, bound], whose mean is half of it
            assert v.abs().mean().item() == pytest.approx(bound / 2, abs=spread)
            agreeing = (v.sign() == weight.sign()).double().mean().item()
            if mode == "fa":
                assert agreeing == pytest.approx(0.5, abs=bounds.of_share(0.5, v.numel()))
            else:
                assert agreeing == 1


@pytest.fixture
def _given_matrices() -> Iterator[None]:
    @feedbackhook.register_rule("given B")
    @dataclass(frozen=True)
    class GivenMatrices(rules.DirectFeedback):
        """B from outside, by the site's name."""

        matrices: dict[str, Tensor] = field(default_factory=dict)

        def draw(self, matrix: Tensor, rng: feedbackhook.CounterRNG) -> dict[str, Tensor]:
            return {"B": self.matrices[rng.layer.name]}

    yield
    del rules.RULES["given B"]


def as_matrix(layer: nn.Module, size: torch.Size) -> Tensor:
    """BioTorch's B, of shape (D, K), from the weight that it projects e with. Before a convolution it repeats
    e at each position of the output."""
    if isinstance(layer, nn.Linear):
        return layer.weight_backward.T
    output = layer(torch.zeros(size, dtype=torch.float64))
    columns = [
        torch.nn.grad.conv2d_input(
            (1, *size[1:]),
            layer.weight_backward,
            e.view(1, -1, 1, 1).expand(1, len(e), *output.shape[2:]),
            layer.stride,
            layer.padding,
        ).flatten()
        for e in torch.eye(10, dtype=torch.float64)
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.usefixtures("_given_matrices")
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_direct_feedback_is_biotorchs_on_its_b(biotorch: Callable[..., nn.Module]) -> None:
    model = network(groups=1)  # BioTorch's projection fails before a convolution with groups
    peer = biotorch("dfa", groups=1)
    theirs = learn(peer, lambda peer, x: F.cross_entropy(peer(x, batch()[1], F.cross_entropy), batch()[1]))
    sizes: dict[str, torch.Size] = {}
    for name in WEIGHTS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sizes.update({name: args[0].shape})
        )
    model(batch()[0])
    layers = {name: peer.module.get_submodule(name) for name in WEIGHTS}
    matrices = {name: as_matrix(layer, sizes[name]).detach() for name, layer in layers.items()}
    patch = feedbackhook.patch(model, "given B", matrices=matrices)
    assert_equal(learn(model), theirs)
    assert torch.equal(patch.projection("2"), matrices["2"])
    assert_not_backprop(theirs, groups=1)


# --- sign-symmetry's code, by hand -----------------------------------------------------------------------


def scale_of(weight: Tensor) -> float:
    """s: by the kernel and all output channels of a convolution, by the inputs of a linear layer."""
    return (
        (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5 if weight.dim() > 2 else weight.shape[1] ** -0.5
    )


class Asymmetric(torch.autograd.Function):
    """A layer whose input's gradient takes V, the gradients of W and of the bias as usual."""

    @staticmethod
    def forward(ctx, x, weight, feedback, bias, function):
        ctx.function = function
        ctx.save_for_backward(x, weight, feedback, bias)
        return function(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, feedback, bias = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            own = torch.autograd.grad(ctx.function(x, weight, bias), (weight, bias), grad)
            (sent,) = torch.autograd.grad(ctx.function(x, feedback, bias), x, grad)
        return sent, own[0], None, own[1], None


def by_hand(model: nn.Sequential, feedback: dict[str, Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss of `model`, in which these layers send errors through their V."""

    def forward(layer: nn.Module, v: Tensor, x: Tensor) -> Tensor:
        def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                return F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)
            return F.linear(x, weight, bias)

        return Asymmetric.apply(x, layer.weight, v, layer.bias, apply)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for name, layer in model.named_children():
            x = forward(layer, feedback[name], x) if name in feedback else layer(x)
        return F.cross_entropy(x, batch()[1])

    return loss


@pytest.mark.parametrize(
    ("label", "exact"),
    [
        ("--algo sign_symmetry", True),
        ("--algo sign_symmetry --last-layer-algo sign_symmetry", False),
    ],
)
def test_sign_symmetry_is_that_of_its_code(page: dict[str, object], label: str, exact: bool) -> None:
    names = WEIGHTS[:-1] if exact else WEIGHTS
    plain, model = network(), network()
    weights = {name: plain.get_submodule(name).weight.detach() for name in names}
    feedback = {name: scale_of(weight) * weight.sign() for name, weight in weights.items()}
    written(page, label, model)
    theirs = learn(plain, by_hand(plain, feedback))
    assert_equal(learn(model), theirs)
    assert_not_backprop(theirs)


def test_feedback_from_the_initial_signs_stays(page: dict[str, object]) -> None:
    plain, model = network(), network()
    initial = {name: plain.get_submodule(name).weight.detach().sign() for name in WEIGHTS[:-1]}
    feedback = {name: scale_of(sign) * sign for name, sign in initial.items()}
    written(page, "--algo feedback_alignment_signed_init", model)
    for either in (plain, model):
        with torch.no_grad():
            for name in WEIGHTS:
                either.get_submodule(name).weight.neg_()
    assert_equal(learn(model), learn(plain, by_hand(plain, feedback)))


@pytest.mark.parametrize("rule", ["feedback_alignment", "sign_symmetry_random_magnitude"])
def test_random_feedback_has_the_std_of_its_code(page: dict[str, object], rule: str) -> None:
    model = network()
    patch = written(page, f"--algo {rule}", model)
    assert [row.name for row in patch.layers] == list(WEIGHTS[:-1])
    for name in ("0", "2"):
        v, weight = patch.feedback(name), model.get_submodule(name).weight
        rms = v.square().mean().sqrt().item()
        assert rms == pytest.approx(scale_of(weight), rel=bounds.of_std(v.numel()))
        assert bool((v.sign() == weight.sign()).all()) == (rule == "sign_symmetry_random_magnitude")


def test_batch_manhattan_is_that_of_its_code() -> None:
    ours, theirs = network(), network()
    optimizer = feedbackhook.BatchManhattan(ours.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    buffers = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for _ in range(3):
        learn(ours), learn(theirs)
        optimizer.step()
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                buffers[name].mul_(0.9).add_(p.grad.sign() + 0.1 * p)
                p.sub_(0.01 * buffers[name])
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))


# --- DRTP's code, by hand --------------------------------------------------------------------------------


class Hook(torch.autograd.Function):
    """After an activation: the fixed random weight's product with the target or the error goes back."""

    @staticmethod
    def forward(ctx, x, signal, weight):
        ctx.save_for_backward(signal, weight)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        signal, weight = ctx.saved_tensors
        return (signal @ weight).view(grad.shape), None, None


class Pooled(nn.Module):
    """Their convolutional network: convolution, activation, hook, pooling; linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool = nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(64, 12), nn.Linear(12, 10)
        self.double()

    def forward(self, x: Tensor, hook: Callable[[str, Tensor], Tensor] = lambda name, x: x) -> Tensor:
        x = self.pool(hook("pool", self.conv(x).tanh())).flatten(1)
        return self.fc2(hook("fc2", self.fc1(x).tanh()))


@pytest.mark.parametrize("mode", ["DRTP", "DFA", "sDFA"])
def test_direct_rules_are_those_of_drtps_code(mode: str) -> None:
    """Theirs takes the mean of the binary cross-entropy, ours the sum: the same but for the last layer, and
    DRTP's hidden layers with either."""
    theirs, ours = Pooled(), Pooled()
    scale = {} if mode == "DRTP" else {"scale": "kaiming"}
    patch = feedbackhook.patch(ours, mode, sites=["pool", "fc2"], **scale)
    x, y = batch()
    target = F.one_hot(y, 10).double()
    with torch.no_grad():
        error = theirs(x).sigmoid() - target
    signal = {"DRTP": target, "DFA": error, "sDFA": error.sign()}[mode]

    def learn_ours(reduction: str) -> dict[str, Tensor]:
        ours.zero_grad()
        patch.targets(y)
        F.binary_cross_entropy_with_logits(ours(x), target, reduction=reduction).backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters()}

    summed, mean = learn_ours("sum"), learn_ours("mean")
    matrices = {name: patch.projection(name).T.flatten(1) for name in ("pool", "fc2")}
    output = theirs(x, lambda name, x: Hook.apply(x, signal, matrices[name])).sigmoid()
    F.binary_cross_entropy(output, target).backward()
    found = {name: p.grad for name, p in theirs.named_parameters()}
    last = {name: grad * target.numel() for name, grad in found.items() if name.startswith("fc2")}
    hidden = {name: grad for name, grad in found.items() if not name.startswith("fc2")}
    assert_equal(summed, {**hidden, **last})
    assert_equal({name: mean[name] for name in last}, {name: found[name] for name in last})
    if mode != "DFA":  # neither the target nor the error's sign has the loss's scale
        assert_equal({name: mean[name] for name in hidden}, hidden)
    bound = (6 / len(patch.projection("pool"))) ** 0.5
    assert 0.9 * bound < patch.projection("pool").abs().max() <= bound
