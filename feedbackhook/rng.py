"""Counter-based random numbers: a hash of seed, layer, stream, draw count and index, in tensor operations.

There is no generator state. A draw is the same on every device and rank and after every resume, can be traced
by `torch.compile`, and leaves the global generators of torch and numpy alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo

_Key = int | Tensor

STREAM = 2
"""The number of the stream: versions with the same number draw the same V from a seed. States hold it."""

# Shifts and multipliers of a 32-bit finalizer with three products, found by search for low avalanche bias
# (triple32 of Wellons' hash prospector, 2018). One with two products fails PractRand within 64 MiB.
_SHIFTS, _MULTIPLIERS = (17, 11, 15, 14), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
# How far each key moves with the count: 2**32 over the plastic number and over its square, as odd numbers:
# their multiples spread pairs of keys evenly (the R2 sequence of Roberts, 2018), and no key comes twice.
_STEPS = (0xC13FA9A9, 0x91E10DA5)
_MASK = 0xFFFFFFFF
_BLOCK = 1 << 17  # words hashed at a time, a power of 2: three int32 buffers of 512 KiB stay in cache
_TILE = 1 << 10  # numbers in a row of the fused kernel
# With half a step added, each value is exact in float32 and strictly inside (0, 1).
_WHOLE, _HALF = 23, 16  # random bits of a number, if it has a word of its own and if two share one


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

        Each has 23 random bits. `stream` names one of several independent draws for the same weight.
        """
        return self._drawn(weight, stream, halves=False)

    def uniform16(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers like those of `uniform`, but with 16 random bits, in about half the time.

        They are the 65536 values (k + 0.5) / 65536, so a share that is chosen by comparing them is off by up
        to 2**-17.
        """
        return self._drawn(weight, stream, halves=True)

    def normal(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers from N(0, 1), float32, in the shape and on the device of `weight`.

        They come from the inverse of the cumulative distribution. Each has 23 random bits, which limits it to
        about 5.3 standard deviations.
        """
        uniform = self.uniform(weight, stream)
        return uniform.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))

    def _drawn(self, weight: Tensor, stream: str, halves: bool) -> Tensor:
        n, device, keys = weight.numel(), weight.device, self._keys(stream)
        if torch.compiler.is_compiling():
            index = torch.arange(n, dtype=torch.int32, device=device)
            return _numbers(index, _as_int32(keys[0]), _as_int32(keys[1]), halves).view(weight.shape)
        if not self.fused:
            return _by_blocks(n, keys, halves, device)[:n].view(weight.shape)
        # Tensors, since numbers would be constants of the kernel, and each would need another kernel.
        start, middle = (_scalar(_as_int32(key), torch.int32, device) for key in keys)
        tiles = _fused_tiles()(-(-n // _TILE), start, middle, halves)
        return tiles.view(-1)[:n].view(weight.shape)

    def _keys(self, stream: str) -> tuple[_Key, _Key]:
        """Return the keys of `_numbers`, in [0, 2**32)."""
        if stream not in self._made:
            text = f"{self.seed}\0{self.layer.name}\0{stream}".encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            self._made[stream] = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        count = cast(int, self.count) & _MASK  # a tensor takes the same arithmetic; each product fits int64
        start, middle = (
            (key + count * _signed(step)) & _MASK
            for key, step in zip(self._made[stream], _STEPS, strict=True)
        )
        return start, middle


def check_stream(state: Mapping[str, Any]) -> None:
    """Check that a state's seeds and draw counts stand for the numbers that this version draws.

    Raises:
        ValueError: they stand for others.
    """
    if (found := state.get("stream", 1)) != STREAM:
        raise ValueError(
            f"this state of a patch is of stream {found} of random numbers, and this version of feedbackhook "
            f"draws by stream {STREAM}, which gives another V for the same seed: load it with the version "
            "that saved it (config.yaml names that of a run), or start anew"
        )


def _numbers(index: Tensor, start: _Key, middle: _Key, halves: bool) -> Tensor:
    """Return the numbers from U(0, 1) at these indices, int32. The keys are int32 too, and products wrap.

    A word is the finalizer of index ^ start, with the key `middle` added after its first product. (An index
    times a large constant would not do: Inductor computes it in int32 of C++, whose overflow is undefined.)
    A number is made of the 23 highest bits of the word of its index. If two share a word, its lower half is
    that at an even index, and the upper half the next one. Since keys that differ in `start` alone would give
    the same words at another index, all of a draw's keys change with each count.
    """
    x = (index >> 1 if halves else index) ^ start
    x = (x ^ _shifted(x, _SHIFTS[0])) * _signed(_MULTIPLIERS[0]) + middle
    x = (x ^ _shifted(x, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    x = (x ^ _shifted(x, _SHIFTS[2])) * _signed(_MULTIPLIERS[2])
    x = x ^ _shifted(x, _SHIFTS[3])
    bits = _HALF if halves else _WHOLE
    x = torch.where((index & 1).bool(), x, x << 16) >> 16 if halves else x >> (32 - bits)
    return x.to(torch.float32) * 2.0**-bits + _offset(bits)


def _by_blocks(n: int, keys: tuple[_Key, _Key], halves: bool, device: torch.device) -> Tensor:
    """Return the same n numbers, or one more. On the CPU each block stays in cache until they are made."""
    per_word, bits = (2, _HALF) if halves else (1, _WHOLE)
    words = -(-n // per_word)
    block = max(1, min(words, _BLOCK) if device.type == "cpu" else words)
    start, middle = keys
    index = torch.arange(min(words, block), dtype=torch.int32, device=device)
    whole, scratch = index if words <= block else torch.empty_like(index), torch.empty_like(index)
    added = _scalar(_as_int32(middle), torch.int32, device)
    numbers = torch.empty(words * per_word, dtype=torch.float32, device=device)
    offset = _scalar(_offset(bits), torch.float32, device)
    for first in range(0, words, block):
        size = min(block, words - first)
        x, y = whole[:size], scratch[:size]
        torch.bitwise_xor(index[:size], _scalar(_as_int32(start ^ first), torch.int32, device), out=x)
        x.bitwise_xor_(_shifted(x, _SHIFTS[0], y))
        torch.add(added, x, alpha=_signed(_MULTIPLIERS[0]), out=x)
        x.bitwise_xor_(_shifted(x, _SHIFTS[1], y)).mul_(_signed(_MULTIPLIERS[1]))
        x.bitwise_xor_(_shifted(x, _SHIFTS[2], y)).mul_(_signed(_MULTIPLIERS[2]))
        x.bitwise_xor_(_shifted(x, _SHIFTS[3], y))
        made = numbers[first * per_word : (first + size) * per_word]
        made.copy_(x.view(torch.int16) if halves else x.bitwise_right_shift_(32 - bits))
        torch.add(offset, made, alpha=2.0**-bits, out=made)
    return numbers


def _shifted(x: Tensor, shift: int, out: Tensor | None = None) -> Tensor:
    """Shift int32 numbers to the right, filling with zeros."""
    return torch.bitwise_right_shift(x, shift, out=out).bitwise_and_((1 << (32 - shift)) - 1)


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor without dimensions, on a GPU without waiting for it."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _offset(bits: int) -> float:
    """Return what makes steps of 2**-bits that are symmetric around 0, less half a step, those of U(0, 1)."""
    return 0.5 + 2.0 ** -(bits + 1)


def _tiles(rows: int, start: Tensor, middle: Tensor, halves: bool) -> Tensor:
    """Return the first rows * _TILE numbers as a matrix. A kernel for a length known only at run time would
    spend half its time dividing by it."""
    row = torch.arange(rows, dtype=torch.int32, device=start.device).mul_(_TILE)
    index = row.unsqueeze(1) + torch.arange(_TILE, dtype=torch.int32, device=start.device)
    return _numbers(index, start, middle, halves)


@cache
def _fused_tiles() -> Callable[..., Tensor]:
    return torch.compile(_tiles, dynamic=True, fullgraph=True)


def _as_int32(key: _Key) -> _Key:
    if isinstance(key, Tensor):
        return key.to(torch.int32)
    return _signed(key)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
