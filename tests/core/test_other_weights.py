"""Weights and inputs that are no plain dense tensors: rerouted where V can follow, else refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.oracle import assert_matches_oracle, by_saved_tensors, gradients, probe
from support.problems import draw, mlp, patched_copy, redrawn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import feedbackhook


class Quantized(nn.Linear):
    """Keeps its weight as integers and makes it anew in each forward."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out)
        self.scale = self.weight.detach().abs().max() / 127
        integers = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def full(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.full(x.dtype), self.bias)


class Kernel(torch.autograd.Function):
    """Computes with integers where nobody sees it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.full = layer.full(x.dtype)
        return x @ ctx.full.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.full, None


class InAKernel(Quantized):
    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(x, self)


class Packed(Quantized):
    """Two entries a byte."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out)
        packed = torch.zeros(features_in * features_out // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def with_middle(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("rule", ["random", "sign", "frSF", "brSF"])
def test_integers_that_become_a_weight_in_the_forward_are_rerouted(rule):
    model, x = with_middle(Quantized(4, 4)), draw(3, 4)
    model[0].double()
    model[2].bias.data = model[2].bias.data.double()
    model[4].double()
    patch = feedbackhook.patch(model, rule)
    got = gradients(model, x)
    assert [row.rerouted for row in patch.layers] == [1, 1, 1]
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    assert feedback["2"].dtype == torch.float64
    plain = copy.deepcopy(model)
    feedbackhook.unpatch(plain)
    full = plain[2].full(torch.float64)
    plain[2] = nn.Linear(4, 4).double()
    plain[2].weight = nn.Parameter(full, requires_grad=False)
    plain[2].bias = nn.Parameter(model[2].bias.detach().clone())
    assert_matches_oracle(got, plain, feedback, x, unlike=["input", "0.weight"])
    assert {row.layer for row in feedbackhook.measure(patch)} >= {"0", "2", "4"}


@pytest.mark.parametrize("ask", ["feedback", "measure"])
def test_before_the_first_forward_integers_are_no_weight(ask):
    model = with_middle(Quantized(4, 4))
    patch = feedbackhook.patch(model, "frSF")
    patch.redraw()
    with pytest.raises(RuntimeError, match=r"weight of '2' is stored as torch\.int8.*run a forward"):
        patch.feedback("2") if ask == "feedback" else feedbackhook.measure(patch)


def test_integers_in_a_kernel_are_refused_after_the_forward_unless_excluded():
    model, x = with_middle(InAKernel(4, 4)), torch.randn(3, 4, requires_grad=True)
    patch = feedbackhook.patch(model)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"'2' ran without.*exclude=\['2'\]"):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
    with torch.no_grad():
        model(x)
    patch.enabled = False
    model(x).sum().backward()
    patch.remove()
    with feedbackhook.patch(model, exclude=["2"]):
        model(x).sum().backward()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Packed(4, 4), r"'2' keeps its weight packed, as torch\.uint8 of shape \(8, 1\)"),
        ("to_sparse", r"weight of '2' is sparse \(torch\.sparse_coo\)"),
        ("to_sparse_csr", r"weight of '2' is sparse \(torch\.sparse_csr\)"),
    ],
    ids=["packed", "sparse COO", "sparse CSR"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("later", [False, True], ids=["when patching", "in the next forward"])
def test_packed_and_sparse_weights_are_refused_with_the_way_out(layer, message, later):
    model = with_middle(nn.Linear(4, 4))
    weight = layer.weight if isinstance(layer, nn.Module) else getattr(model[2].weight.detach(), layer)()
    if later:
        feedbackhook.patch(model)
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match=message + r".*exclude=\['2'\] to feedbackhook\.patch"):
        model(torch.randn(2, 4)) if later else feedbackhook.patch(model)
    assert torch._C._len_torch_function_stack() == 0


def test_a_sparse_input_is_data_as_any():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    probe(model(x.to_sparse())).backward()
    want = by_saved_tensors(plain, feedback, x, input_requires_grad=False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want.parameters[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("upstream", [False, True], ids=["data", "what requires a gradient"])
def test_nested_tensors_of_the_jagged_layout(upstream):
    plain = redrawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    model, feedback = patched_copy(plain)
    parts = [draw(2, 4), draw(3, 4, seed=1)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=upstream)
    told = []
    feedbackhook.get_patch(model).on_error_signal(
        "0", lambda grad_input, grad_output: told.append(grad_input)
    )
    probe(model(jagged).values()).backward()
    want = by_saved_tensors(plain, feedback, torch.cat(parts), input_requires_grad=upstream)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want.parameters[name], rtol=1e-9, atol=1e-12)
    assert len(told) == 1
    assert (told[0] is None) is not upstream
    if upstream:
        torch.testing.assert_close(jagged.grad.values(), want.input, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("upstream", [False, True], ids=["data", "what requires a gradient"])
def test_nested_tensors_of_the_strided_layout_are_refused(upstream):
    model = redrawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    feedbackhook.patch(model)
    strided = torch.nested.nested_tensor([draw(2, 4), draw(3, 4)], requires_grad=upstream)
    with pytest.raises(RuntimeError, match=r"input of '0' is a nested tensor.*layout=torch\.jagged"):
        model(strided)
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("later", [False, True], ids=["when patched", "after patching"])
def test_weights_that_tensor_parallelism_has_sharded_are_refused_in_the_forward(mesh, later):
    model, x = mlp(), draw(3, 4)
    shard = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if not later:
        parallelize_module(model, mesh, shard)
    patch = feedbackhook.patch(model)
    if later:
        parallelize_module(model, mesh, shard)
    with pytest.raises(RuntimeError, match=r"weight of '0' is sharded.*DTensor.*exclude=\['0'\]"):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    patch.remove()
    with feedbackhook.patch(model, "random", exclude=["0", "2"]) as patch:
        gradients(model, x)
        assert [(row.name, row.rerouted) for row in patch.layers] == [("4", 1)]
