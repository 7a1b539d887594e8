"""The rule whose V the user provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.registry import register_rule


@register_rule("tensor")
@dataclass(frozen=True, eq=False)
class Given:
    """V as the user provides it.

    Args:
        tensors: the option `feedback`: a tensor for each patched layer, by the layer's full name, in the
            layout of its weight.
    """

    # In `patch` the option has the name of the method below, so the field needs another name.
    tensors: Mapping[str, Tensor] = field(metadata={"option": "feedback"})

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping):
            raise TypeError(f"feedback must map layer names to tensors, not {type(self.tensors).__name__}")
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"feedback[{name!r}] must be a tensor, not {type(tensor).__name__}")

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Check that there is a tensor of the right shape for each layer, and no other.

        Raises:
            ValueError: there is not.
        """
        shapes = {layer.name: layer.shape for layer in layers}
        missing, unknown = shapes.keys() - self.tensors.keys(), self.tensors.keys() - shapes.keys()
        if missing:
            raise ValueError(f"feedback has no tensor for: {', '.join(sorted(missing))}")
        if unknown:
            raise ValueError(f"feedback names layers that are not patched: {', '.join(sorted(unknown))}")
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                found = tuple(self.tensors[name].shape)
                raise ValueError(f"feedback[{name!r}] has shape {found}, but the weight has shape {shape}")

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return the layer's tensor in the dtype and on the device of its weight."""
        return {"V": self.tensors[rng.layer.name].detach().to(weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor."""
        return parts["V"]
