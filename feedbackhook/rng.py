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
from typing import Any, NamedTuple, TypeVar, cast

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
_TILE = 1 << 10  # numbers in a row, of one layer
_PLANS = 16  # plans kept: one or two for each part of a model that is called on its own
_AT_ONCE = 1 << 26  # numbers drawn at once, which bounds the memory that this takes to 1 GiB
# With half a step added, each value is exact in float32 and strictly inside (0, 1).
_WHOLE, _HALF = 23, 16  # random bits of a number, if it has a word of its own and if two share one


@dataclass
class Streams:
    """What one layer's draws have in common.

    Attributes:
        keys: by stream, before the draw count is mixed in. `torch.compile` can trace their lookup, but not
            their computation.
        asked: how many numbers the last draw asked for, by stream and whether two share a word.
        ready: those that `Together` has drawn for the next one.
    """

    keys: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    asked: dict[tuple[str, bool], int] = field(default_factory=dict)
    ready: dict[tuple[str, bool], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of one layer's `count`-th draw.

    Args:
        seed: the patch's seed.
        layer: the layer to draw for; its name is part of the key.
        count: how often this layer has been redrawn; an int, or an int64 tensor without dimensions.
        fused: whether to compute the same numbers with one kernel made by `torch.compile`.
        streams: what the layer's draws have in common.
    """

    seed: int
    layer: LayerInfo
    count: int | Tensor = 0
    fused: bool = False
    streams: Streams = field(default_factory=Streams, compare=False, repr=False)

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
        n, device = weight.numel(), weight.device
        if torch.compiler.is_compiling():
            index = torch.arange(n, dtype=torch.int32, device=device)
            return _numbers(index, _as_int32(self._keys(stream)), halves).view(weight.shape)
        self.streams.asked[stream, halves] = n
        ready = self.streams.ready.pop((stream, halves), None)
        if ready is not None and ready.numel() == n and ready.device == device:
            return ready.view(weight.shape)
        if not self.fused:
            return _by_blocks(n, self._keys(stream), halves, device)[:n].view(weight.shape)
        # Tensors, since numbers would be constants of the kernel, and each would need another kernel.
        keys = [_scalar(key, torch.int32, device) for key in _as_int32(self._keys(stream))]
        rows = torch.arange(_rows(n), dtype=torch.int32, device=device).unsqueeze(1)
        return _fused(rows, keys, halves).view(-1)[:n].view(weight.shape)

    def _keys(self, stream: str) -> _Keys:
        """Return the keys of a stream's numbers in this draw, in [0, 2**32)."""
        return _with_count(_base_keys(self, stream), self.count)


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


# --- many layers at once -----------------------------------------------------------------------------------


class Together:
    """Draws the numbers of many layers at once.

    On a GPU, and with the fused kernel everywhere, starting a kernel for each layer costs more than drawing
    its numbers. A row of `_TILE` numbers belongs to one layer and has its keys.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}

    @torch.no_grad()
    def draw(self, rngs: Iterable[CounterRNG], device: torch.device) -> None:
        """Make ready, for each layer, the numbers that its last draw asked for.

        Args:
            rngs: the layers' next draws; their counts are ints.
            device: where the weights are.
        """
        groups: dict[tuple[bool, bool, int], list[list[_Wanted]]] = {}
        for rng in rngs:
            for (stream, halves), n in list(rng.streams.asked.items()):  # another thread may draw
                parts = groups.setdefault((halves, rng.fused, cast(int, rng.count)), [[]])
                if parts[-1] and sum(wanted.n for wanted in parts[-1]) + n > _AT_ONCE:
                    parts.append([])
                parts[-1].append(_Wanted(rng, stream, n))
        for (halves, fused, count), parts in groups.items():
            for part in parts:
                if len(part) > 1:
                    numbers = self._plan(part, device).draw(count, halves, fused)
                    for wanted, drawn in zip(part, numbers, strict=True):
                        wanted.rng.streams.ready[wanted.stream, halves] = drawn

    def _plan(self, part: Sequence[_Wanted], device: torch.device) -> _Plan:
        key = (device, *((w.rng.seed, w.rng.layer.name, w.stream, w.n) for w in part))
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()  # the model changes all the time
            self._plans[key] = _Plan(part, device)
        return self._plans[key]


class _Wanted(NamedTuple):
    """The numbers of one stream of one layer."""

    rng: CounterRNG
    stream: str
    n: int


class _Plan:
    """Where the numbers of each stream are in one draw, and the keys of each row before the count."""

    def __init__(self, wanted: Sequence[_Wanted], device: torch.device) -> None:
        self._lengths = [each.n for each in wanted]
        rows = torch.tensor([_rows(n) for n in self._lengths])
        owners = torch.repeat_interleave(rows)
        self._starts = (_TILE * (rows.cumsum(0) - rows)).tolist()
        places = torch.arange(len(owners)) - (rows.cumsum(0) - rows)[owners]
        keys = torch.tensor([_as_int32(_base_keys(each.rng, each.stream)) for each in wanted])
        self._rows = places.to(device, torch.int32).unsqueeze(1)
        self._keys = tuple(keys[owners].to(device, torch.int32).split(1, dim=1))

    def draw(self, count: int, halves: bool, fused: bool) -> list[Tensor]:
        """Return the numbers of each stream."""
        first, second, third = self._keys
        mixed = _signed(_mix(count & _MASK))
        keys = [first ^ mixed, second ^ mixed, third + mixed]
        numbers = (_fused if fused else _eager_tiles)(self._rows, keys, halves).view(-1)
        return [numbers[i : i + n] for i, n in zip(self._starts, self._lengths, strict=True)]


# --- words and numbers -----------------------------------------------------------------------------------


def _mix(x: _IntOrTensor) -> _IntOrTensor:
    """Apply the finalizer to a Python int or an int64 tensor, in [0, 2**32); each product fits int64."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = ((x ^ (x >> shift)) * _signed(multiplier)) & _MASK
    return x


def _base_keys(rng: CounterRNG, stream: str) -> tuple[int, int, int]:
    """Return the keys of a stream, without the draw count."""
    made = rng.streams.keys
    if stream not in made:
        text = f"{rng.seed}\0{rng.layer.name}\0{stream}".encode()
        digest = hashlib.blake2b(text, digest_size=12).digest()
        first, second, third = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
        made[stream] = first, second, third
    return made[stream]


def _with_count(keys: tuple[int, int, int], count: int | Tensor) -> _Keys:
    mixed = _mix(cast(int, count) & _MASK)  # a tensor takes the same arithmetic
    first, second, third = keys
    return first ^ mixed, second ^ mixed, (third + mixed) & _MASK


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
    per_word = 2 if halves else 1
    words = -(-n // per_word)
    block = max(1, min(words, _BLOCK) if device.type == "cpu" else words)
    index = torch.arange(min(words, block), dtype=torch.int32, device=device)
    whole, scratch = index if words <= block else torch.empty_like(index), torch.empty_like(index)
    _, second, third = (_scalar(key, torch.int32, device) for key in _as_int32(keys))
    numbers = torch.empty(words * per_word, dtype=torch.float32, device=device)
    for begin in range(0, words, block):
        size = min(block, words - begin)
        x = whole[:size]
        (first,) = _as_int32([keys[0] ^ begin])
        torch.bitwise_xor(index[:size], _scalar(first, torch.int32, device), out=x)
        made = numbers[begin * per_word : (begin + size) * per_word]
        _hash_into(made, x, scratch[:size], second, third, halves)
    return numbers


def _eager_tiles(rows: Tensor, keys: Sequence[Tensor], halves: bool) -> Tensor:
    """Return the same numbers as `_tiles`."""
    words, device = _TILE // 2 if halves else _TILE, rows.device
    x = rows * words + torch.arange(words, dtype=torch.int32, device=device)
    x.bitwise_xor_(keys[0])
    numbers = torch.empty(len(rows), _TILE, dtype=torch.float32, device=device)
    _hash_into(numbers, x, torch.empty_like(x), keys[1], keys[2], halves)
    return numbers


def _hash_into(
    numbers: Tensor, x: Tensor, scratch: Tensor, second: Tensor, third: Tensor, halves: bool
) -> None:
    """Make numbers of `x`, the index XOR the first key, which is overwritten."""
    for added, shift, multiplier in zip((second, third), _SHIFTS, _MULTIPLIERS, strict=False):
        x.bitwise_xor_(_shifted(x, shift, scratch))
        torch.add(added, x, alpha=_signed(multiplier), out=x)
    x.bitwise_xor_(_shifted(x, _SHIFTS[2], scratch)).mul_(_signed(_MULTIPLIERS[2]))
    x.bitwise_xor_(_shifted(x, _SHIFTS[3], scratch))
    bits = _HALF if halves else _WHOLE
    numbers.copy_(x.view(torch.int16) if halves else x.bitwise_right_shift_(32 - bits))
    torch.add(_scalar(_offset(bits), torch.float32, x.device), numbers, alpha=2.0**-bits, out=numbers)


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


def _tiles(rows: Tensor, keys: Sequence[Tensor], halves: bool) -> Tensor:
    """Return numbers, `_TILE` in a row.

    A kernel for a length known only at run time would spend half its time dividing by it.

    Args:
        rows: the number of each row among its stream's, shape (n, 1).
        keys: one for all rows, or one for each.
        halves: whether two numbers share a word.
    """
    index = rows * _TILE + torch.arange(_TILE, dtype=torch.int32, device=rows.device)
    return _numbers(index, keys, halves)


def _rows(n: int) -> int:
    """Return the number of rows for n numbers: two at least, since one or none would need a kernel of its
    own."""
    return max(2, -(-n // _TILE))


@torch.no_grad()
def _fused(rows: Tensor, keys: list[Tensor], halves: bool) -> Tensor:
    return _fused_tiles()(rows, keys, halves)


@cache
def _fused_tiles() -> Callable[..., Tensor]:
    return torch.compile(_tiles, dynamic=True, fullgraph=True)


def _as_int32(keys: Iterable[_Key]) -> list[_Key]:
    return [key.to(torch.int32) if isinstance(key, Tensor) else _signed(key) for key in keys]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
