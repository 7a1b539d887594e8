"""Counter-based random numbers: a hash of seed, layer, stream, draw count and index, in tensor operations.

There is no generator state. A draw is the same on every device and rank and after every resume, can be traced
by `torch.compile`, and leaves the global generators of torch and numpy alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo

_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)

# Multipliers and shifts of a 32-bit finalizer found by search for low avalanche bias (Wellons' hash
# prospector, 2018, and TheIronBorn's follow-up). Both multipliers are below 2**31.
_ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1))
_MASK = 0xFFFFFFFF
_BLOCK = 1 << 18  # numbers hashed at a time: two int32 buffers of 1 MiB stay in cache
_TILE = 1 << 10  # numbers in a row of the fused kernel
_MANTISSA_BITS = 23  # with half a step added, each value is exact in float32 and strictly inside (0, 1)


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of one layer's `count`-th draw.

    Args:
        seed: the patch's seed.
        layer: the layer to draw for; its name is part of the key.
        count: how often this layer has been redrawn; an int, or an int64 tensor without dimensions.
        fused: whether to compute the same numbers with one kernel made by `torch.compile`.
    """

    seed: int
    layer: LayerInfo
    count: int | Tensor = 0
    fused: bool = False
    # Keys by stream. `torch.compile` can trace their lookup, but not their computation.
    _made: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def uniform(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers from U(0, 1), float32, in the shape and on the device of `weight`.

        `stream` names one of several independent draws for the same weight (magnitudes, signs).
        """
        n, device, keys = weight.numel(), weight.device, self._keys(stream)
        if not self.fused or torch.compiler.is_compiling():
            return _uniform(n, *keys, device).view(weight.shape)
        # A tensor, since numbers would be constants of the kernel, and each would need another kernel.
        key_tensor = torch.tensor([_as_int32(key) for key in keys], dtype=torch.int32, device=device)
        tiles = _fused_tiles()(-(-n // _TILE), key_tensor)
        return tiles.view(-1)[:n].view(weight.shape)

    def normal(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers from N(0, 1), float32, in the shape and on the device of `weight`.

        They come from the inverse of the cumulative distribution. Each has 23 random bits, which limits it to
        about 5.3 standard deviations.
        """
        uniform = self.uniform(weight, stream)
        return uniform.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))

    def _keys(self, stream: str) -> tuple[int, int | Tensor]:
        if stream not in self._made:
            text = f"{self.seed}\0{self.layer.name}\0{stream}".encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            self._made[stream] = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        first, second = self._made[stream]
        count = cast(int, self.count)  # a tensor takes the same arithmetic
        return first, _mix(second ^ _mix(count & _MASK))


def _mix(x: _IntOrTensor) -> _IntOrTensor:
    """Apply the finalizer to a Python int or an int64 tensor in [0, 2**32); no product exceeds 63 bits."""
    for shift, multiplier in _ROUNDS:
        x = ((x ^ (x >> shift)) * multiplier) & _MASK
    return x


def _mix_(x: Tensor, scratch: Tensor) -> None:
    """Apply the same finalizer in place to an int32 tensor, whose products wrap."""
    for shift, multiplier in _ROUNDS:
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))  # the mask makes the shift logical
        if multiplier != 1:
            x.mul_(multiplier)


def _uniform(n: int, first: int | Tensor, second: int | Tensor, device: torch.device) -> Tensor:
    """Return n numbers from U(0, 1)."""
    return _as_uniform_(_hash(n, first, second, device))


def _uniform_tiles(rows: int, keys: Tensor) -> Tensor:
    """Return the first rows * _TILE of the same numbers as a matrix. A kernel for a length known only at run
    time would spend half its time dividing by it."""
    starts = torch.arange(rows, dtype=torch.int32, device=keys.device).mul_(_TILE)
    bits = starts.unsqueeze(1) + torch.arange(_TILE, dtype=torch.int32, device=keys.device)
    _scramble_(bits, (keys[0], keys[1]), torch.empty_like(bits))
    return _as_uniform_(bits)


def _as_uniform_(bits: Tensor) -> Tensor:
    """Map the highest bits of int32 numbers to steps between 0 and 1, overwriting `bits`."""
    steps = bits.bitwise_right_shift_(32 - _MANTISSA_BITS).bitwise_and_((1 << _MANTISSA_BITS) - 1)
    return steps.to(torch.float32).add_(0.5).mul_(2.0**-_MANTISSA_BITS)


@cache
def _fused_tiles() -> Callable[..., Tensor]:
    return torch.compile(_uniform_tiles, dynamic=True, fullgraph=True)


def _hash(n: int, first: int | Tensor, second: int | Tensor, device: torch.device) -> Tensor:
    """Return `mix(mix(index ^ first) ^ second)` for the indices 0 to n - 1, as bits of int32 numbers."""
    bits = torch.arange(n, dtype=torch.int32, device=device)
    keys = _as_int32(first), _as_int32(second)
    if torch.compiler.is_compiling() or device.type != "cpu":
        _scramble_(bits, keys, torch.empty_like(bits))
        return bits
    scratch = torch.empty(min(n, _BLOCK), dtype=torch.int32)
    for start in range(0, n, _BLOCK):
        part = bits[start : start + _BLOCK]
        _scramble_(part, keys, scratch[: len(part)])
    return bits


def _scramble_(bits: Tensor, keys: Iterable[int | Tensor], scratch: Tensor) -> None:
    for key in keys:
        bits.bitwise_xor_(key)
        _mix_(bits, scratch)


def _as_int32(key: int | Tensor) -> int | Tensor:
    if isinstance(key, Tensor):
        return key.to(torch.int32)
    return key - (1 << 32) if key >= 1 << 31 else key
