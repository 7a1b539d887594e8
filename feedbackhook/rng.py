"""Counter-based random numbers: a hash of seed, layer, stream, draw count and index, in tensor operations.

There is no generator state. A draw is the same on every device and rank and after every resume, can be traced
by `torch.compile`, and leaves the global generators of torch and numpy alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo

_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)
_Key = int | Tensor
_Keys = tuple[_Key, _Key, _Key]

STREAM = 2
"""The number of the stream: versions with the same number draw the same V from a seed. States hold it."""

# Shifts and multipliers of a 32-bit finalizer with three products, found by search for low avalanche bias
# (triple32 of Wellons' hash prospector, 2018). One with two products fails PractRand within 64 MiB.
_SHIFTS, _MULTIPLIERS = (17, 11, 15, 14), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
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
    _made: dict[str, tuple[int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def uniform(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers from U(0, 1), float32, in the shape and on the device of `weight`.

        Each has 23 random bits. `stream` names one of several independent draws for the same weight.
        """
        return self._drawn(weight, stream, halves=False)

    def uniform16(self, weight: Tensor, stream: str = "") -> Tensor:
        """Return numbers like those of `uniform`, but with 16 random bits, in about half the time unless
        compiled.

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
            return _numbers(index, _as_int32(keys), halves).view(weight.shape)
        if not self.fused:
            return _by_blocks(n, keys, halves, device)[:n].view(weight.shape)
        # Tensors, since numbers would be constants of the kernel, and each would need another kernel.
        key_tensors = [_scalar(key, torch.int32, device) for key in _as_int32(keys)]
        tiles = _fused_tiles()(-(-n // _TILE), key_tensors, halves)
        return tiles.view(-1)[:n].view(weight.shape)

    def _keys(self, stream: str) -> _Keys:
        """Return the keys of `_numbers`, in [0, 2**32)."""
        if stream not in self._made:
            text = f"{self.seed}\0{self.layer.name}\0{stream}".encode()
            digest = hashlib.blake2b(text, digest_size=12).digest()
            first, second, third = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
            self._made[stream] = first, second, third
        count = _mix(cast(int, self.count) & _MASK)  # a tensor takes the same arithmetic
        first, second, third = self._made[stream]
        return first ^ count, second ^ count, (third + count) & _MASK


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


def _mix(x: _IntOrTensor) -> _IntOrTensor:
    """Apply the finalizer to a Python int or an int64 tensor, in [0, 2**32); each product fits int64."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = ((x ^ (x >> shift)) * _signed(multiplier)) & _MASK
    return x


def _numbers(index: Tensor, keys: Sequence[_Key], halves: bool) -> Tensor:
    """Return the numbers from U(0, 1) at these indices, int32. The keys are int32 too, and products wrap.

    A word is the finalizer of the index XOR the first key, with the second and third key added after the
    first and second product. (An index times a large constant would not do: Inductor computes it in int32
    of C++, whose overflow is undefined.) A number is made of the 23 highest bits of the word of its index.
    If two share a word, its lower half is that at an even index, and the upper half the next one. All keys
    change with each count: draws that differ in the first alone would have the same words at other indices,
    and with only two keys one draw in a thousand would have the words of another, shifted.
    """
    first, second, third = keys
    x = (index >> 1 if halves else index) ^ first
    x = (x ^ _shifted(x, _SHIFTS[0])) * _signed(_MULTIPLIERS[0]) + second
    x = (x ^ _shifted(x, _SHIFTS[1])) * _signed(_MULTIPLIERS[1]) + third
    x = (x ^ _shifted(x, _SHIFTS[2])) * _signed(_MULTIPLIERS[2])
    x = x ^ _shifted(x, _SHIFTS[3])
    bits = _HALF if halves else _WHOLE
    x = torch.where((index & 1).bool(), x, x << 16) >> 16 if halves else x >> (32 - bits)
    return x.to(torch.float32) * 2.0**-bits + _offset(bits)


def _by_blocks(n: int, keys: _Keys, halves: bool, device: torch.device) -> Tensor:
    """Return the same n numbers, or one more. On the CPU each block stays in cache until they are made."""
    per_word, bits = (2, _HALF) if halves else (1, _WHOLE)
    words = -(-n // per_word)
    block = max(1, min(words, _BLOCK) if device.type == "cpu" else words)
    index = torch.arange(min(words, block), dtype=torch.int32, device=device)
    whole, scratch = index if words <= block else torch.empty_like(index), torch.empty_like(index)
    _, second, third = (_scalar(key, torch.int32, device) for key in _as_int32(keys))
    numbers = torch.empty(words * per_word, dtype=torch.float32, device=device)
    offset = _scalar(_offset(bits), torch.float32, device)
    for begin in range(0, words, block):
        size = min(block, words - begin)
        x, y = whole[:size], scratch[:size]
        (first,) = _as_int32([keys[0] ^ begin])
        torch.bitwise_xor(index[:size], _scalar(first, torch.int32, device), out=x)
        for added, shift, multiplier in zip((second, third), _SHIFTS, _MULTIPLIERS, strict=False):
            x.bitwise_xor_(_shifted(x, shift, y))
            torch.add(added, x, alpha=_signed(multiplier), out=x)
        x.bitwise_xor_(_shifted(x, _SHIFTS[2], y)).mul_(_signed(_MULTIPLIERS[2]))
        x.bitwise_xor_(_shifted(x, _SHIFTS[3], y))
        made = numbers[begin * per_word : (begin + size) * per_word]
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


def _tiles(rows: int, keys: Sequence[Tensor], halves: bool) -> Tensor:
    """Return the first rows * _TILE numbers as a matrix. A kernel for a length known only at run time would
    spend half its time dividing by it."""
    device = keys[0].device
    row = torch.arange(rows, dtype=torch.int32, device=device).mul_(_TILE)
    index = row.unsqueeze(1) + torch.arange(_TILE, dtype=torch.int32, device=device)
    return _numbers(index, keys, halves)


@cache
def _fused_tiles() -> Callable[..., Tensor]:
    return torch.compile(_tiles, dynamic=True, fullgraph=True)


def _as_int32(keys: Iterable[_Key]) -> list[_Key]:
    return [key.to(torch.int32) if isinstance(key, Tensor) else _signed(key) for key in keys]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
