"""The models by name: the paper's networks, timm's and torchvision's.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import difflib

import torch
from torch import nn

from feedbackhook import classifier
from feedbackhook.experiments.config import ConfigError, Frozen, ModelConfig
from feedbackhook.experiments.networks import NETWORKS, build_network


def natural_size(config: ModelConfig) -> int | None:
    """The image size that a model is made for, in pixels, or None where images come as they are."""
    network = NETWORKS.get(config.name)
    return network.input[-1] if network is not None and network.convolutions else None


def default_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images for which a model was made.

    Raises:
        ConfigError: no such model.
    """
    if name in NETWORKS:
        size = NETWORKS[name].input
        if len(size) != 3:
            raise ConfigError(f"{name} takes features, not images")
        return size[0], size[1], size[2]
    if name.startswith("torchvision/"):
        return 3, 224, 224
    import timm

    timm_name = _timm_name(name)
    config = timm.get_pretrained_cfg(timm_name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    return channels, height, width


def build(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """The model for K ``classes`` and images of C ``channels`` and H x W = ``size``, on the CPU.

    Raises:
        ConfigError: no such model, options that it does not have, or images that it cannot take.
    """
    if config.name in NETWORKS:
        model: nn.Module = _network(config, classes, channels, size)
    elif config.name.startswith("torchvision/"):
        model = _torchvision_model(config, classes, channels, size)
    else:
        model = _timm_model(_timm_name(config.name), config, classes, channels, size)
    freeze(model, config.frozen)
    return model


def freeze(model: nn.Module, part: Frozen | None) -> None:
    """Keeps a part of the model from learning, in place: "Bottom" keeps the last layer as it was drawn and
    trains all others, "Top" trains the last layer alone (Liao et al. 2016, Experiment C2)."""
    if part is None:
        return
    last = {id(p) for name in classifier(model) for p in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in last) == (part == "Top"))


def _network(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    network = NETWORKS[config.name]
    if network.convolutions and size != network.input[1:]:
        wanted = network.input[-1]
        raise ConfigError(
            f"{config.name} takes images of {wanted}x{wanted}, not {size[0]}x{size[1]}: set data.size to "
            f"{wanted}"
        )
    if not network.convolutions and channels * size[0] * size[1] != network.input[0]:
        raise ConfigError(
            f"{config.name} takes {network.input[0]} features, not {channels}x{size[0]}x{size[1]} pixels"
        )
    if config.options:
        raise ConfigError(f"{config.name} has no model.options; it was given {sorted(config.options)}")
    return build_network(config.name, classes, channels, config.batch_norm)


def _torchvision_model(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    from torchvision import models

    name = config.name.partition("/")[2]
    if name not in (known := models.list_models(module=models)):
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"torchvision has no classification model named {name!r}{hint}")
    if channels != 3:
        raise ConfigError(f"{config.name} takes images of 3 channels, not {channels}")
    _refuse_batch_norm(config)
    try:
        model: nn.Module = models.get_model(name, num_classes=classes, **config.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.name} with model.options {config.options}: {error}") from error
    _try_images(model, config.name, channels, size)
    return model


def _refuse_batch_norm(config: ModelConfig) -> None:
    if config.batch_norm != "none":
        raise ConfigError(f"model.batch_norm is for the paper's networks; {config.name} brings its own")


def _timm_name(model: str) -> str:
    """NAME of timm/NAME, a model that timm has."""
    import timm

    library, _, name = model.partition("/")
    if library != "timm" or not name:
        known = ", ".join(NETWORKS)
        raise ConfigError(f"no model is named {model!r}: it is one of {known}, timm/NAME or torchvision/NAME")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models(f"*{name}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model named {name!r}{hint}")
    return name


def _timm_model(
    name: str, config: ModelConfig, classes: int, channels: int, size: tuple[int, int]
) -> nn.Module:
    import timm

    _refuse_batch_norm(config)
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **config.options)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"timm/{name} with model.options {config.options}: {error}") from error
    _try_images(model, f"timm/{name}", channels, size)
    return model


@torch.no_grad()
def _try_images(model: nn.Module, name: str, channels: int, size: tuple[int, int]) -> None:
    training = model.training
    try:
        model.eval()(torch.zeros(2, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot take images of {size[0]}x{size[1]} with {channels} channels ({error}): "
            "set data.size, or the model's own size in model.options"
        ) from error
    finally:
        model.train(training)
