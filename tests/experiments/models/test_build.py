"""The paper's MNIST network by its table, and its batch normalization by its formulas."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from torch import nn
from torch.overrides import TorchFunctionMode

import feedbackhook
from feedbackhook.experiments.config import ConfigError, ModelConfig
from feedbackhook.experiments.models.batch_norm import (
    AveragedBatchNorm,
    estimate_statistics,
    insert_batch_norm,
)
from feedbackhook.experiments.models.build import build
from feedbackhook.liao2016.networks import NETWORKS, build_network

WITHOUT_BN = 431_080


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("batch_norm", "count"), [("none", WITHOUT_BN), ("paper", WITHOUT_BN), ("affine", WITHOUT_BN + 2 * 570)]
)
def test_the_mnist_network_has_the_layers_of_table_1(batch_norm: str, count: int) -> None:
    model = build(ModelConfig(batch_norm=batch_norm), classes=10, channels=1, size=(28, 28))  # type: ignore
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: shapes.update({name: tuple(y.shape[1:])}))
    model(torch.zeros(2, 1, 28, 28))
    expected = {
        "conv1": (20, 24, 24),
        "pool1": (20, 12, 12),
        "conv2": (50, 8, 8),
        "pool2": (50, 4, 4),
        "fc1": (500,),
        "fc2": (10,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert parameters(model) == count
    order = [type(m) for m in model if not isinstance(m, nn.Flatten)]
    block = [nn.ReLU] if batch_norm == "none" else [AveragedBatchNorm, nn.ReLU]
    conv = [nn.Conv2d, *block, nn.MaxPool2d]
    assert order == [*conv, *conv, nn.Linear, *block, nn.Linear]


# Table 1: what each layer gives, and its weights and biases: kernel * kernel * maps in * maps out + maps out
TABLE_1 = {
    "liao2016/mnist": (10, 1, 431_080, {"pool1": (20, 12, 12), "pool2": (50, 4, 4), "fc1": (500,)}),
    "liao2016/cifar": (
        100,
        3,
        2_432 + 51_264 + 102_464 + 131_200 + 12_900,
        {
            "conv1": (32, 32, 32),
            "pool1": (32, 16, 16),
            "conv2": (64, 16, 16),
            "pool2": (64, 8, 8),
            "conv3": (64, 8, 8),
            "pool3": (64, 4, 4),
            "fc1": (128,),
            "fc2": (100,),
        },
    ),
    "liao2016/svhn": (
        10,
        3,
        1_520 + 502_272 + 327_720 + 410,
        {
            "conv1": (20, 28, 28),
            "pool1": (20, 14, 14),
            "conv2": (512, 8, 8),
            "pool2": (512, 4, 4),
            "fc1": (40,),
            "fc2": (10,),
        },
    ),
    "liao2016/images": (
        102,
        3,
        11_712 + 153_728 + 18_433 * 306 + 307 * 204 + 205 * 102,
        {
            "conv1": (48, 56, 56),
            "pool1": (48, 28, 28),
            "conv2": (128, 24, 24),
            "pool2": (128, 12, 12),
            "fc1": (306,),
            "fc2": (204,),
            "fc3": (102,),
        },
    ),
    "liao2016/timit": (
        80,
        1845,
        1_846 * 512 + 513 * 256 + 257 * 80,
        {"fc1": (512,), "fc2": (256,), "fc3": (80,)},
    ),
}


@pytest.mark.parametrize("name", TABLE_1)
@pytest.mark.parametrize("batch_norm", ["none", "paper"])
def test_every_network_has_the_layers_of_table_1(name: str, batch_norm: str) -> None:
    classes, channels, count, expected = TABLE_1[name]
    shape = NETWORKS[name].input
    size = shape[1:] or (1, 1)  # F features are F channels of one pixel
    model = build(ModelConfig(name, batch_norm=batch_norm), classes, channels, size)  # type: ignore[arg-type]
    shapes = {}
    for layer, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, layer=layer: shapes.update({layer: tuple(y.shape[1:])}))
    model(torch.zeros(2, *shape))
    assert {layer: shapes[layer] for layer in expected} == expected
    assert shapes[""] == (classes,)
    assert parameters(model) == count


def test_narrow_problems_have_at_least_256_units() -> None:
    assert build_network("liao2016/images", 17, 3).fc1.out_features == 256


def test_an_average_takes_no_notice_of_padding() -> None:
    pool = build_network("liao2016/cifar", 10, 3).pool2
    assert pool(torch.ones(1, 1, 16, 16)).eq(1).all()


def test_a_torchvision_model_takes_the_place() -> None:
    model = build(ModelConfig("torchvision/resnet18"), 7, 3, (64, 64))
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    for config, message in (
        (ModelConfig("torchvision/resnet19"), "resnet18"),
        (
            ModelConfig("torchvision/resnet18", batch_norm="paper"),
            "without normalization, but this one has Batch",
        ),
        (ModelConfig("torchvision/resnet18", options={"depth": 3}), "depth"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(config, 7, 3, (64, 64))


@pytest.mark.parametrize("affine", [False, True], ids=["paper", "affine"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)], ids=["features", "images"])
def test_training_normalizes_by_the_mini_batch_with_an_exact_gradient(
    affine: bool, shape: tuple[int, ...]
) -> None:
    norm = AveragedBatchNorm(3, affine=affine).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, affine=affine).double()
    if affine:
        for ours, other in zip(norm.parameters(), theirs.parameters(), strict=True):
            nn.init.normal_(ours)
            other.data.copy_(ours)
    else:
        assert parameters(norm) == 0
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    torch.testing.assert_close(norm(x), theirs(x))
    assert norm.mean.eq(0).all()
    assert norm.std.eq(1).all()


def test_the_test_statistics_are_a_moving_average_of_mean_and_standard_deviation() -> None:
    torch.manual_seed(0)
    norm = AveragedBatchNorm(2)
    batches = [torch.randn(30, 2, 4) * (1 + k) + k for k in range(20)]
    mean = std = None
    for x in batches:
        m, s = x.mean((0, 2)), (x.var((0, 2), correction=0) + norm.eps).sqrt()
        mean = m if mean is None else 0.95 * mean + 0.05 * m
        std = s if std is None else 0.95 * std + 0.05 * s
    for _ in range(2):  # taking them again starts again
        estimate_statistics(norm, batches)
        torch.testing.assert_close(norm.mean, mean)
        torch.testing.assert_close(norm.std, std)
    x = torch.randn(5, 2, 4)
    assert mean is not None
    assert std is not None
    torch.testing.assert_close(norm.eval()(x), (x - mean[:, None]) / std[:, None])


def test_on_one_mini_batch_evaluation_equals_training() -> None:
    torch.manual_seed(0)
    model = build_network("liao2016/mnist", 10, 1, "paper")
    x = torch.randn(20, 1, 28, 28)
    estimate_statistics(model, [x])
    torch.testing.assert_close(
        model.eval()(x), model.train()(x), rtol=bounds.HALF_OF_FLOAT32, atol=bounds.HALF_OF_FLOAT32
    )


class EpsOfBatchNorm(TorchFunctionMode):
    """Collects the eps of every `F.batch_norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            self.seen.append(given.arguments["eps"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["paper", "affine"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)], ids=["features", "images"])
def test_evaluation_passes_a_positive_eps_that_changes_no_bit(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    """cuDNN refuses an eps of 0."""
    torch.manual_seed(0)
    norm = AveragedBatchNorm(3, affine).to(dtype).eval()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=dtype)
    constant = torch.ones(shape, dtype=dtype)  # whose std is as small as it gets
    for batch in (x, 100 * x, constant):
        estimate_statistics(norm, [batch])
        with EpsOfBatchNorm() as eps:
            got = norm(x)
        assert len(eps.seen) == 1
        assert eps.seen[0] > 0
        variance = norm.std.square()
        assert torch.equal(got, F.batch_norm(x, norm.mean, variance, norm.weight, norm.bias, eps=0.0))


def test_taking_statistics_leaves_everything_else_as_it_was() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4),
        AveragedBatchNorm(4),
        nn.BatchNorm1d(4),
        nn.Dropout(),
        nn.Linear(4, 2),
        AveragedBatchNorm(2),
    )
    model[4].eval()
    modes = [m.training for m in model]
    other = model[2].running_mean.clone()
    state = torch.get_rng_state()
    estimate_statistics(model, [torch.randn(8, 3)])
    with pytest.raises(RuntimeError):
        estimate_statistics(model, [torch.randn(8, 99)])
    assert [m.training for m in model] == modes
    assert torch.equal(model[2].running_mean, other)
    assert not any(m._forward_pre_hooks for m in model)
    assert not model[1].mean.eq(0).any()
    assert not torch.equal(torch.get_rng_state(), state)  # randn above
    state = torch.get_rng_state()
    estimate_statistics(model, [torch.ones(8, 3)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_it_is_left_alone() -> None:
    estimate_statistics(nn.Linear(1, 1), iter(lambda: pytest.fail("a batch was drawn"), None))


def test_a_timm_model_is_built_for_the_data() -> None:
    config = ModelConfig("timm/resnet18", options={"drop_rate": 0.5})
    model = build(config, classes=7, channels=1, size=(32, 32))
    assert model.drop_rate == 0.5
    assert model.training
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (ModelConfig("lenet"), 28, "no model is named 'lenet'"),
        (ModelConfig("timm/"), 28, "no model is named 'timm/'"),
        (ModelConfig(), 8, "takes images of 28x28, not 8x8: set data.size to 28"),
        (
            ModelConfig(options={"width": 2}),
            28,
            r"has no model.options, but .*: remove \['width'\]",
        ),
        (ModelConfig("timm/resnet81"), 28, "no model named 'resnet81'; did you mean 'resnet"),
        (ModelConfig("timm/resnet18", batch_norm="affine"), 28, "normalization, but this one has Batch"),
        (ModelConfig("timm/resnet18", options={"wings": 2}), 28, "timm/resnet18 with model.options.*wings"),
        (ModelConfig("timm/vit_tiny_patch16_224"), 28, "cannot take images of 28x28 with 1 channels"),
    ],
    ids=lambda value: "" if isinstance(value, (str, int)) else f"{value.name}",
)
def test_what_cannot_be_built_is_one_clear_error(config: ModelConfig, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config, classes=10, channels=1, size=(size, size))


@pytest.mark.parametrize(
    ("name", "parameters", "weights"),
    [("cifar/resnet20", 269_722, 20), ("cifar/resnet18", 11_173_962, 18), ("cifar/vgg16", 14_719_818, 14)],
)
def test_the_networks_for_cifar_are_those_of_their_papers(name: str, parameters: int, weights: int) -> None:
    """Without shortcuts ResNet-20 has the 0.27 million of He et al. 2016, whose own have no parameters."""
    model = build(ModelConfig(name), 10, 3, (32, 32))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    on_the_path = [n for n in layers if "downsample" not in n]
    assert len(on_the_path) == weights
    shortcuts = sum(p.numel() for n, p in model.named_parameters() if "downsample" in n)
    extra = shortcuts if name == "cifar/resnet20" else 0
    assert sum(p.numel() for p in model.parameters()) - extra == parameters
    feedbackhook.patch(model, "sign")


def test_a_mixer_takes_images_of_the_size_that_it_is_told() -> None:
    model = build(ModelConfig("cifar/mixer", options={"img_size": 16}), 10, 1, (16, 16))
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(ConfigError, match=r"cannot take images of 16x16"):
        build(ModelConfig("cifar/mixer"), 10, 1, (16, 16))


def test_a_vggs_width_is_a_factor_and_other_options_are_refused() -> None:
    narrow = build(ModelConfig("cifar/vgg16", options={"width": 0.125}), 10, 3, (32, 32))
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)][-1] == 64
    for name, options, message in (
        ("cifar/vgg16", {"width": 0}, "width must be"),
        ("cifar/vgg16", {"depth": 3}, "depth"),
        ("cifar/resnet20", {"width": 2}, "width"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(ModelConfig(name, options=options), 10, 3, (32, 32))


@pytest.mark.parametrize("affine", [False, True], ids=["paper", "affine"])
def test_batch_norm_goes_behind_each_convolution_of_a_model_without(affine: bool) -> None:
    torch.manual_seed(0)
    plain = build(ModelConfig("cifar/vgg16", options={"width": 0.125}), 10, 3, (32, 32))
    torch.manual_seed(0)
    config = ModelConfig("cifar/vgg16", "affine" if affine else "paper", options={"width": 0.125})
    model = build(config, 10, 3, (32, 32))
    norms = [m for m in model.modules() if isinstance(m, AveragedBatchNorm)]
    assert len(norms) == 13
    assert all((norm.weight is not None) == affine for norm in norms)
    for name, weight in plain.named_parameters():
        place = name.replace(".", ".conv.", 1) if name.startswith("conv") else name
        assert torch.equal(model.get_parameter(place), weight)
    x = torch.randn(8, 3, 32, 32)
    seen = model[0].norm(plain[0](x))  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(model[0](x), seen)  # type: ignore[index, operator]
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(8), atol=bounds.HALF_OF_FLOAT32, rtol=0)
    with pytest.raises(ConfigError, match="but this one has none"):
        insert_batch_norm(nn.Sequential(nn.Linear(2, 2)))
