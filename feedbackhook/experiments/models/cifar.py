"""Networks for images of 32x32 pixels, such as CIFAR's: (N, C, 32, 32) to logits (N, K).

Shapes: N images, C channels, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from feedbackhook.experiments.config import ConfigError
from feedbackhook.experiments.models.registry import register_network

_INPUT = (3, 32, 32)
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # maps, and convolutions before each pool


@register_network("cifar/resnet20", _INPUT)
def resnet20(classes: int, channels: int) -> nn.Module:
    """Three stages of three blocks, 16 to 64 maps (He et al. 2016, section 4.2)."""
    return _resnet((3, 3, 3), (16, 32, 64), classes, channels)


@register_network("cifar/resnet18", _INPUT)
def resnet18(classes: int, channels: int) -> nn.Module:
    """ResNet-18 whose stem is one 3x3 convolution without a pool, as usual for CIFAR."""
    return _resnet((2, 2, 2, 2), (64, 128, 256, 512), classes, channels)


def _resnet(blocks: tuple[int, ...], maps: tuple[int, ...], classes: int, channels: int) -> nn.Module:
    """Stages of basic blocks; each stage except the first halves height and width. Shortcuts are 1x1
    convolutions where the shape changes."""
    from timm.models.resnet import BasicBlock, downsample_conv

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, maps[0], 3, padding=1, bias=False)
    layers["bn1"], layers["relu"] = nn.BatchNorm2d(maps[0]), nn.ReLU()
    before = maps[0]
    for stage, (count, width) in enumerate(zip(blocks, maps, strict=True), 1):
        stride = 1 if stage == 1 else 2
        shortcut = None if before == width else downsample_conv(before, width, kernel_size=1, stride=stride)
        first = BasicBlock(before, width, stride, shortcut)
        layers[f"layer{stage}"] = nn.Sequential(first, *(BasicBlock(width, width) for _ in range(count - 1)))
        before = width
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["fc"] = nn.Linear(before, classes)
    return _drawn(nn.Sequential(layers))


@register_network("cifar/vgg16", _INPUT)
def vgg16(classes: int, channels: int, width: float = 1.0) -> nn.Module:
    """The thirteen convolutions of VGG-16 (Simonyan and Zisserman 2015, configuration D) and one fully
    connected layer, without normalization and dropout; ``width`` multiplies the number of maps."""
    if not isinstance(width, (int, float)) or not 1 / 64 <= width <= 4:
        raise ConfigError(f"model.options.width must be a factor from 1/64 to 4, not {width!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    count, before = 0, channels
    for stage, (maps, convolutions) in enumerate(_VGG16, 1):
        for _ in range(convolutions):
            count += 1
            layers[f"conv{count}"] = nn.Conv2d(before, before := round(maps * width), 3, padding=1)
            layers[f"relu{count}"] = nn.ReLU()
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(before, classes)
    return _drawn(nn.Sequential(layers))


@register_network("cifar/mixer", _INPUT)
def mixer(
    classes: int,
    channels: int,
    img_size: int = 32,
    patch_size: int = 4,
    num_blocks: int = 8,
    embed_dim: int = 128,
) -> nn.Module:
    """A small MLP-Mixer (Tolstikhin et al. 2021), built by timm; ``img_size`` is in pixels."""
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(
        num_classes=classes,
        in_chans=channels,
        img_size=img_size,
        patch_size=patch_size,
        num_blocks=num_blocks,
        embed_dim=embed_dim,
    )
    return model


def _drawn(model: nn.Module) -> nn.Module:
    """Initialize the convolutions by their number of outputs (He et al. 2015), in place; return the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
