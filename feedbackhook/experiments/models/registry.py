"""The networks that are known by name, beside timm's and torchvision's.

A package that brings networks registers them when it is imported, as `feedbackhook.liao2016` does.
Shapes: C channels, H x W pixels, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from feedbackhook.experiments.config import ConfigError, ModelConfig


@dataclass(frozen=True)
class Network:
    """A network that `model.name` can name.

    Args:
        name: the value of `model.name`.
        build: called with the number of classes, the number of channels, and `model.options` as keyword
            arguments; returns the network.
        input_size: C, H and W of the images that it is made for; F, 1 and 1 if it takes features.
        fixed_size: whether it takes no images of another size.
        has_batch_norm: whether `build` takes `batch_norm` (`none`, `paper` or `affine`) as a keyword
            argument. Otherwise batch normalization is inserted after each convolution.
        classes: number of classes to build it with if there are no data, as in `feedbackhook inspect`.
    """

    name: str
    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]
    fixed_size: bool = False
    has_batch_norm: bool = False
    classes: int = 1000

    @property
    def takes_features(self) -> bool:
        """Whether it takes features instead of images."""
        return self.input_size[1:] == (1, 1)


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

NETWORKS: dict[str, Network] = {}
"""The registered networks by name; see :func:`register_network`."""

_FALLBACK: list[str] = []


def register_network(
    name: str,
    input_size: tuple[int, int, int],
    *,
    fixed_size: bool = False,
    has_batch_norm: bool = False,
    classes: int = 1000,
) -> Callable[[Builder], Builder]:
    """Decorate a function that builds a network, to make it known as `model.name`; see :class:`Network`.

    Example::

        @register_network("mine/small", input_size=(3, 32, 32))
        def small(classes: int, channels: int, width: int = 64) -> nn.Module: ...

    Raises:
        ValueError: another network has this name.
    """

    def register(build: Builder) -> Builder:
        if name in NETWORKS:
            raise ValueError(f"a network named {name!r} is already registered: choose another name")
        NETWORKS[name] = Network(name, build, input_size, fixed_size, has_batch_norm, classes)
        return build

    return register


def set_fallback_network(name: str) -> None:
    """Set the network for data for which no network is registered, when `model.name` is null."""
    _FALLBACK[:] = [name]


def network_name(config: ModelConfig) -> str:
    """Return `model.name`, or the fallback network's if it is null.

    Raises:
        ConfigError: it is null, and no fallback is set.
    """
    if config.name is not None:
        return config.name
    if not _FALLBACK:
        raise ConfigError("model.name is null, and no network is registered for these data: set model.name")
    return _FALLBACK[0]
