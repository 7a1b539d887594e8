"""Builds networks by name: registered ones, timm's and torchvision's.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from feedbackhook import classifier
from feedbackhook.experiments.config import ConfigError, Frozen, ModelConfig
from feedbackhook.experiments.models import pretrained
from feedbackhook.experiments.models.batch_norm import insert_batch_norm
from feedbackhook.experiments.models.registry import NETWORKS, Network, network_name
from feedbackhook.names import nearest


def natural_size(config: ModelConfig) -> int | None:
    """Return the image size that a registered network is made for, in pixels; None for other networks and for
    features, which are not resized."""
    network = NETWORKS.get(network_name(config))
    return None if network is None or network.takes_features else network.input_size[-1]


def default_size(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images for which a network is made; the number of features, 1
    and 1 if it takes features.

    Raises:
        ConfigError: no network has this name.
    """
    if name in NETWORKS:
        return NETWORKS[name].input_size
    if name.startswith("torchvision/"):
        return 3, 224, 224
    import timm

    timm_name = _timm_name(name)
    config = timm.get_pretrained_cfg(timm_name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    return channels, height, width


def build(config: ModelConfig, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """Build the network for K ``classes`` and images of C ``channels`` and H x W = ``size``, on the CPU.

    Raises:
        ConfigError: no network has this name, it has no such options, it does not take these images, its
            weights are missing or belong to another network, or nothing would be trained.
    """
    name = network_name(config)
    network = NETWORKS.get(name)
    if size == (1, 1) and (network is None or not network.takes_features):
        fitting = [other.name for other in NETWORKS.values() if other.takes_features]
        raise ConfigError(
            f"{name} takes images, but the data are {channels} features: set model.name to "
            f"{' or '.join(fitting) or 'a network that takes features'}"
        )
    if (given := config.options.get("num_classes", classes)) != classes:
        raise ConfigError(
            f"model.options.num_classes is {given}, but the data have {classes} classes: remove it"
        )
    options = {name: value for name, value in config.options.items() if name != "num_classes"}
    config = replace(config, name=name, options=options)
    if config.weights is not None and not name.startswith("timm/"):
        raise ConfigError(f"model.weights needs a timm model (model.name timm/NAME), not {name}")
    if network is not None:
        model = _registered(network, config, classes, channels, size)
    elif name.startswith("torchvision/"):
        model = _torchvision_model(name, config, classes, channels)
    else:
        model = _timm_model(_timm_name(name), config, classes, channels)
    if config.batch_norm != "none" and (network is None or not network.has_batch_norm):
        insert_batch_norm(model, affine=config.batch_norm == "affine")
    if network is None or not network.fixed_size:
        _try_images(model, name, channels, size)
    if config.trainable is None:
        freeze(model, config.frozen)
    elif config.frozen is not None:
        raise ConfigError("model.trainable and model.frozen both say what is trained: remove one of them")
    else:
        _train_only(model, config.trainable)
    return model


def statistics(config: ModelConfig, channels: int) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of the C ``channels``, each (C, 1, 1), with which images were
    normalized when the initial weights were trained; None if there are no initial weights."""
    if config.weights is None:
        return None
    return pretrained.statistics(_timm_name(network_name(config)), channels)


def frozen_batch_norms(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """Return the BatchNorm layers that `model.trainable` freezes; they stay in evaluation mode."""
    if config.trainable is None:
        return []
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def _train_only(model: nn.Module, pattern: str) -> None:
    """Freeze every parameter whose full name ``pattern`` does not match."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"model.trainable {pattern!r} is not a regular expression: {error}") from error
    parameters = dict(model.named_parameters())
    matched = [name for name in parameters if expression.fullmatch(name)]
    if not matched:
        near = difflib.get_close_matches(re.sub(r"[^\w.]", "", pattern), parameters, n=3, cutoff=0.3)
        raise ConfigError(
            f"model.trainable {pattern!r} must match the full name of a parameter, and matches none; similar "
            f"names: {', '.join(near or list(parameters)[-3:])}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in matched)


def freeze(model: nn.Module, part: Frozen | None) -> None:
    """Freeze a part of the model, in place: `Bottom` freezes the last layer, `Top` all other layers."""
    if part is None:
        return
    last = {id(p) for name in classifier(model) for p in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in last) == (part == "Top"))


def _registered(
    network: Network, config: ModelConfig, classes: int, channels: int, size: tuple[int, int]
) -> nn.Module:
    name, (_, *made_for) = network.name, network.input_size
    if network.takes_features:
        if size != (1, 1):
            raise ConfigError(f"{name} takes features, not {channels}x{size[0]}x{size[1]} pixels")
    elif network.fixed_size and list(size) != made_for:
        raise ConfigError(
            f"{name} takes images of {made_for[0]}x{made_for[1]}, not {size[0]}x{size[1]}: set data.size to "
            f"{made_for[0]}"
        )
    parameters = inspect.signature(network.build).parameters
    if config.options and not set(parameters) - {"classes", "channels", "batch_norm"}:
        raise ConfigError(f"{name} has no model.options, but they are set: remove {sorted(config.options)}")
    given = {"batch_norm": config.batch_norm} if network.has_batch_norm else {}
    try:
        return network.build(classes=classes, channels=channels, **given, **config.options)
    except TypeError as error:
        raise ConfigError(f"{name} with model.options {config.options}: {error}") from error


def _torchvision_model(full_name: str, config: ModelConfig, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    name = full_name.partition("/")[2]
    if name not in (known := models.list_models(module=models)):
        raise ConfigError(f"torchvision has no classification model named {name!r}{nearest(name, known)}")
    if channels != 3:
        raise ConfigError(f"{full_name} takes images with 3 channels, not {channels}")
    try:
        model: nn.Module = models.get_model(name, num_classes=classes, **config.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{full_name} with model.options {config.options}: {error}") from error
    return model


def _timm_name(model: str) -> str:
    """Return NAME of timm/NAME, if timm has this model."""
    import timm

    library, _, name = model.partition("/")
    if library != "timm" or not name:
        known, wanted = list(NETWORKS), f"timm/{model}" if timm.is_model(model) else model
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
        raise ConfigError("model.options.pretrained has no effect: set model.weights to hub instead")
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
            f"set data.size{_made_for(name)}, or the image size in model.options, such as "
            f"{{img_size: {size[0]}}}"
        ) from error
    finally:
        model.train(training)


def _made_for(name: str) -> str:
    """The image size that a timm model was made for, in words."""
    return f" to {default_size(name)[-1]}" if name.startswith("timm/") else ""
