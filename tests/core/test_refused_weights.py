"""Uses of a weight that cannot be rerouted are refused by name, and changes after patching are noticed."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import feedbackhook


class Mixed(nn.Module):
    """Uses a layer as it should be used, and its weight again by `use`."""

    def __init__(self, use):
        super().__init__()
        self.first, self.layer, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.layer(x) + self.use(x, self.layer.weight)


NOT_REROUTED = {
    "matrix product": lambda x, w: x @ w.T,
    "torch.mm": lambda x, w: torch.mm(x, w.t()),
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "bilinear": lambda x, w: F.bilinear(x, x, w[None].expand(4, 4, 4)),
    "a scaled weight": lambda x, w: F.linear(x, 2 * w),
    "a standardized weight": lambda x, w: F.linear(x, (w - w.mean()) / w.std()),
}


@pytest.mark.parametrize("use", NOT_REROUTED.values(), ids=NOT_REROUTED.keys())
def test_a_use_that_cannot_be_rerouted_is_an_error_also_beside_one_that_is(use):
    model, x = Mixed(use), torch.randn(3, 4)
    patch = feedbackhook.patch(model)
    with pytest.raises(feedbackhook.ExactGradientError, match=r"'layer'.*exclude=\['layer'\]"):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    patch.enabled = False
    model(x).sum().backward()
    patch.remove()
    with feedbackhook.patch(model, exclude=["layer"]):
        model(x).sum().backward()


def test_products_of_weights_alone_are_no_error():
    def penalty(x, w):
        return (w @ w.T).sum() + torch.mv(w, torch.ones(4)).sum()

    model, x = Mixed(penalty), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    plain(x).sum().backward()
    with feedbackhook.patch(model) as patch:
        model(x).sum().backward()
        assert [row.rerouted for row in patch.layers] == [0, 1]
    assert torch.equal(model.layer.weight.grad, plain.layer.weight.grad)
    assert not torch.allclose(model.first.weight.grad, plain.first.weight.grad)


def test_todays_derived_weight_is_shown_after_a_step():
    model = nn.Sequential(nn.Linear(4, 5), parametrizations.weight_norm(nn.Linear(5, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with feedbackhook.patch(model, "symmetric") as patch:
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert torch.equal(patch.weight("1"), model[1].weight)


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match="the weight of '0' is complex"):
        feedbackhook.patch(nn.Sequential(nn.Linear(3, 4, dtype=torch.cfloat)))


def test_a_layer_replaced_after_patching_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    feedbackhook.patch(model)
    model[1] = nn.Linear(4, 5)
    with pytest.raises(
        RuntimeError, match=r"'1' was replaced after patching.*remove the patch, then patch again"
    ):
        model(torch.randn(2, 4))


def test_a_layer_wrapped_after_patching_is_still_rerouted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    patch = feedbackhook.patch(model)
    model[1] = nn.Sequential(model[1])
    model(torch.randn(2, 4)).sum().backward()
    assert [row.rerouted for row in patch.layers] == [0, 1]


def test_parameters_of_the_past_are_let_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    feedbackhook.patch(model)
    old = []
    for _ in range(3):
        old.append(weakref.ref(model[1].weight))
        model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
        model(torch.randn(2, 4)).sum().backward()
    gc.collect()
    assert [reference() for reference in old] == [None] * 3


def test_numbers_of_numpy_are_numbers():
    x, conv = torch.randn(1, 2, 8, 8, requires_grad=True), nn.Conv2d(2, 2, 3)
    conv.stride = (np.int64(2), np.int64(2))
    with feedbackhook.patch(conv, "sign", concordance=np.float32(0.5), seed=np.int64(3)):
        conv(x).sum().backward()
    assert x.grad.abs().sum() > 0


class Mixture(nn.Module):
    """A layer of no known kind, whose weight is a mixture of its parameter's rows."""

    def __init__(self):
        super().__init__()
        self.experts, self.shares = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return F.linear(x, (self.shares @ self.experts).view(4, 4))


def test_a_weight_that_no_layer_holds_is_warned_of_once():
    model = nn.Sequential(nn.Linear(4, 4), Mixture(), nn.Linear(4, 2))
    with feedbackhook.patch(model):
        with pytest.warns(UserWarning, match=r"belong to no layer .*: '1.experts' \(MmBackward0\)"):
            model(torch.randn(2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(2, 4)).sum().backward()


def test_a_layer_that_was_excluded_is_not_warned_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with feedbackhook.patch(model, exclude=["1"]) as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4)).sum().backward()
        assert [(row.name, row.rerouted) for row in patch.layers] == [("0", 0), ("2", 1)]


def test_another_model_inside_the_forward_is_not_warned_of():
    inner, layer = nn.Linear(4, 4), nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return inner(self.layer(x))

    with feedbackhook.patch(Outer()) as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.model(torch.randn(2, 4)).sum().backward()
        assert [(row.name, row.calls) for row in patch.layers] == [("layer", 1)]
    assert inner.weight.grad.any()
    assert layer.weight.grad.any()
