"""Gradients on a GPU for every rule and every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import bounds
from support.coverage.models import prepared
from support.gpu import DEVICE, RULES, assert_follows, feedback_of, home, moved
from support.oracle import ORACLES, assert_same_gradients, by_backprop, by_saved_tensors, gradients
from support.problems import PROBLEMS, InPlaceNet, Net, Problem, draw, random_feedback, redrawn
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.before(x))
        return self.attention(x, x, x, need_weights=False)[0]


class Embedded(nn.Module):
    """The embedding has no V itself; the error signal that reaches it has passed the layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(self.embedding(x))))


def between(layer: Callable[[], nn.Module], *shape: int) -> tuple[Callable[[], nn.Module], Tensor, list[str]]:
    problem = Problem(layer, "", shape)
    return problem.model, problem.input(), ["input", "upstream.weight", "layer.weight"]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "linear": between(lambda: nn.Linear(5, 4), 3, 2),
    "linear on sequences": between(lambda: nn.Linear(5, 4), 3, 6, 2),
    "conv1d": between(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 3, 2, 9),
    "conv2d": between(lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), 3, 2, 7, 8),
    "grouped conv2d": between(lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), 3, 2, 7, 8),
    "depthwise conv2d": between(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), 3, 2, 7, 8),
    "conv3d": between(lambda: nn.Conv3d(3, 4, 2, stride=2), 2, 2, 4, 5, 6),
    "transposed conv1d": between(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 3, 2, 5),
    "transposed conv2d": between(lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, groups=2), 3, 2, 5, 4),
    "attention": (lambda: redrawn(Attention()), draw(2, 3, 8), ["input", "before.weight"]),
    "encoder layer": (
        lambda: redrawn(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)),
        draw(2, 3, 8),
        ["input", "linear1.weight"],
    ),
    "residual network": (lambda: redrawn(Net()), draw(2, 2, 9, 9), ["input", "stem.weight"]),
    "activations in place": (lambda: redrawn(InPlaceNet()), draw(2, 2, 9, 9), ["input", "stem.0.weight"]),
    "embedding": (lambda: redrawn(Embedded()), torch.tensor([[1, 2, 6], [0, 2, 3]]), ["embedding.weight"]),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", RULES)
def test_every_rule_sends_errors_through_the_v_that_it_shows(mode, network):
    build, x, unlike = NETWORKS[network]
    options = {"input_requires_grad": x.is_floating_point()}
    plain = build()
    model, patch = moved(plain, mode, **RULES[mode])
    got, feedback = gradients(model, x.to(DEVICE), **options), feedback_of(patch)
    assert all(v.isfinite().all() for v in feedback.values())
    if mode == "symmetric":
        exact = by_backprop(plain, x, **options)
        assert_same_gradients(home(got), exact, bounds.HALF_OF_FLOAT64)
    else:
        assert_follows(got, plain, feedback, x, unlike=unlike, **options)


@pytest.mark.parametrize("kind", PROBLEMS)
@given(data=st.data())
def test_every_kind_of_layer_follows_both_oracles_until_removed(kind, data):
    problem = data.draw(PROBLEMS[kind])
    plain, x = problem.model(), problem.input()
    model, patch = moved(plain, feedback=random_feedback(plain))
    with patch:
        got, feedback = gradients(model, x.to(DEVICE)), feedback_of(patch)
    assert_follows(got, plain, feedback, x, unlike=["input", "layer.weight"], oracles=ORACLES)
    after = gradients(model, x.to(DEVICE))
    assert_same_gradients(home(after), by_backprop(plain, x), bounds.HALF_OF_FLOAT64)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    plain = prepared(timm.create_model(name, pretrained=False, num_classes=10))
    x = draw(2, 3, *[160 if "vit" in name else 64] * 2)
    model, patch = moved(plain, "brSF", concordance=0.7)
    assert_follows(gradients(model, x.to(DEVICE)), plain, feedback_of(patch), x, unlike=["input"])


@pytest.mark.parametrize("mode", ["tensor", "brSF"])
def test_training_follows_the_oracle_step_by_step(mode):
    """Take ten steps, and the same steps with the oracle's gradients on an unpatched model on the CPU."""
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    model, patch = moved(plain, mode)
    nets = (model, plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in nets]
    for _ in range(10):
        want = by_saved_tensors(plain, feedback_of(patch), x)
        for name, parameter in plain.named_parameters():
            parameter.grad = want.parameters[name]
        assert_same_gradients(home(gradients(model, x.to(DEVICE))), want, bounds.HALF_OF_FLOAT64)
        for optimizer in optimizers:
            optimizer.step()
