"""The models by name: the paper's networks, CIFAR's, timm's and torchvision's.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from feedbackhook import classifier
from feedbackhook.experiments.config import ConfigError, Frozen, ModelConfig
from feedbackhook.experiments.models import cifar, pretrained
from feedbackhook.experiments.models.batch_norm import insert_batch_norm
from feedbackhook.liao2016.networks import NETWORKS, build_network
from feedbackhook.names import nearest


def natural_size(config: ModelConfig) -> int | None:
    """The image size that a model is made for, in pixels, or None where images come as they are."""
    if config.network in cifar.NETWORKS:
        return cifar.SIZE
    network = NETWORKS.get(config.network)
    return network.input[-1] if network is not None and network.convolutions else None


def default_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images for which a model was made; of one that takes features, their
    number, 1 and 1.

    Raises:
        ConfigError: no such model.
    """
    if name in NETWORKS:
        size = (*NETWORKS[name].input, 1, 1)
        return size[0], size[1], size[2]
    if name in cifar.NETWORKS:
        return 3, cifar.SIZE, cifar.SIZE
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
        ConfigError: no such model, options that it does not have, images that it cannot take, weights that
            are missing or of another model, or nothing that would learn.
    """
    features = config.network in NETWORKS and not NETWORKS[config.network].convolutions
    if size == (1, 1) and not features:  # see `data`
        raise ConfigError(
            f"{config.network} takes images, and the data are {channels} features: set model.name to "
            "liao2016/timit"
        )
    if (given := config.options.get("num_classes", classes)) != classes:
        raise ConfigError(
            f"model.options.num_classes is {given}, and the data have {classes} classes: leave it out"
        )
    options = {name: value for name, value in config.options.items() if name != "num_classes"}
    config = replace(config, options=options)
    if config.weights is not None and not config.network.startswith("timm/"):
        raise ConfigError(
            f"model.weights are for timm's models (model.name timm/NAME), not for {config.network}"
        )
    if config.network in NETWORKS:
        model: nn.Module = _network(config, classes, channels, size)
    else:
        if config.network in cifar.NETWORKS:
            model = cifar.build(config.network, classes, channels, config.options)
        elif config.network.startswith("torchvision/"):
            model = _torchvision_model(config, classes, channels)
        else:
            model = _timm_model(_timm_name(config.network), config, classes, channels)
        if config.batch_norm != "none":
            insert_batch_norm(model, affine=config.batch_norm == "affine")
        _try_images(model, config.network, channels, size)
    if config.trainable is None:
        freeze(model, config.frozen)
    elif config.frozen is not None:
        raise ConfigError("model.trainable and model.frozen both say what learns: leave one of them out")
    else:
        _train_only(model, config.trainable)
    return model


def statistics(config: ModelConfig, channels: int) -> tuple[Tensor, Tensor] | None:
    """Mean and std of each of the C ``channels``, each (C, 1, 1), by which the images were normalised on
    which the model's weights were trained; None for a model that begins anew."""
    if config.weights is None:
        return None
    return pretrained.statistics(_timm_name(config.network), channels)


def still(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """The BatchNorm layers that `model.trainable` freezes; they stay in evaluation mode during training."""
    if config.trainable is None:
        return []
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def _train_only(model: nn.Module, pattern: str) -> None:
    """Freezes every parameter whose full name ``pattern`` does not match as a whole."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"model.trainable {pattern!r} is no regular expression: {error}") from error
    parameters = dict(model.named_parameters())
    matched = [name for name in parameters if expression.fullmatch(name)]
    if not matched:
        near = difflib.get_close_matches(re.sub(r"[^\w.]", "", pattern), parameters, n=3, cutoff=0.3)
        raise ConfigError(
            f"model.trainable {pattern!r} matches no parameter as a whole; near names: "
            f"{', '.join(near or list(parameters)[-3:])}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in matched)


def freeze(model: nn.Module, part: Frozen | None) -> None:
    """Keeps a part of the model from learning, in place: "Bottom" keeps the last layer as it was drawn and
    trains all others, "Top" trains the last layer alone (Liao et al. 2016, Experiment C2)."""
    if part is None:
        return
    last = {id(p) for name in classifier(model) for p in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in last) == (part == "Top"))


def _network(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    network = NETWORKS[config.network]
    if network.convolutions and size != network.input[1:]:
        wanted = network.input[-1]
        raise ConfigError(
            f"{config.network} takes images of {wanted}x{wanted}, not {size[0]}x{size[1]}: set data.size to "
            f"{wanted}"
        )
    if not network.convolutions and size != (1, 1):
        raise ConfigError(f"{config.network} takes features, not {channels}x{size[0]}x{size[1]} pixels")
    if config.options:
        raise ConfigError(f"{config.network} has no model.options; it was given {sorted(config.options)}")
    return build_network(config.network, classes, channels, config.batch_norm)


def _torchvision_model(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    name = config.network.partition("/")[2]
    if name not in (known := models.list_models(module=models)):
        raise ConfigError(f"torchvision has no classification model named {name!r}{nearest(name, known)}")
    if channels != 3:
        raise ConfigError(f"{config.network} takes images of 3 channels, not {channels}")
    try:
        model: nn.Module = models.get_model(name, num_classes=classes, **config.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.network} with model.options {config.options}: {error}") from error
    return model


def _timm_name(model: str) -> str:
    """NAME of timm/NAME, a model that timm has."""
    import timm

    library, _, name = model.partition("/")
    if library != "timm" or not name:
        known, wanted = [*NETWORKS, *cifar.NETWORKS], f"timm/{model}" if timm.is_model(model) else model
        near = nearest(wanted, [*known, *(f"timm/{other}" for other in timm.list_models())])
        raise ConfigError(
            f"no model is named {model!r}{near or '.'} There are {', '.join(known)}, timm/NAME and "
            "torchvision/NAME"
        )
    if not timm.is_model(name):
        near = nearest(name, timm.list_models()) or nearest(name, timm.list_models(f"*{name}*"))
        raise ConfigError(f"timm has no model named {name!r}{near}")
    return name


def _timm_model(name: str, config: ModelConfig, classes: int, channels: int) -> nn.Module:
    import timm

    if "pretrained" in config.options:
        raise ConfigError("model.options.pretrained: say model.weights hub instead")
    try:
        if config.weights is not None:
            return pretrained.build(name, config.weights, classes, channels, config.options)
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **config.options)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"timm/{name} with model.options {config.options}: {error}") from error
    return model


@torch.no_grad()
def _try_images(model: nn.Module, name: str, channels: int, size: tuple[int, int]) -> None:
    training = model.training
    try:
        model.eval()(torch.zeros(2, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot take images of {size[0]}x{size[1]} with {channels} channels ({error}): "
            f"set data.size{_made_for(name)}, or the model's own size in model.options, such as "
            f"{{img_size: {size[0]}}}"
        ) from error
    finally:
        model.train(training)


def _made_for(name: str) -> str:
    """The size of images that a model of timm's was made for, in words."""
    return f" to {default_size(name)[-1]}" if name.startswith("timm/") else ""
