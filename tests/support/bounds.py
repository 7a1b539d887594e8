"""Bounds that follow from sampling and from number formats, the same on every machine.

Five standard errors are left to sampling, which one seed in two million exceeds.
"""

import math

ROUNDING = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}  # of a number, by half a last place
HALF_OF_FLOAT64 = 2.0**-26  # half of its digits: kernels add in orders of their own
HALF_OF_FLOAT32 = 2.0**-12  # half of its digits, where some steps of training multiply what is rounded

HANG = 1800.0  # seconds: ends what hangs, and is no bound on what a slow machine may take

ANGLE = math.degrees(4 * HALF_OF_FLOAT64)
"""Of an angle in degrees whose sums are in float64: near 0 it is the root of what cancels, a few eps."""


def of_mean(std: float, n: int) -> float:
    """Of a mean of n independent draws."""
    return 5 * std / math.sqrt(n)


def of_share(p: float, n: int) -> float:
    """Of the share of n independent draws that come true with probability p."""
    return of_mean(math.sqrt(p * (1 - p)), n)


def of_std(n: int) -> float:
    """Of a standard deviation of n normal draws, relative; uniform draws vary less."""
    return of_mean(math.sqrt(1 / 2), n)


def of_angle(n: int) -> float:
    """Of the angle in degrees between n independent pairs, whose standard error is sin(angle) / sqrt(n)."""
    return math.degrees(of_mean(1, n))


def of_autocast(layers: int, dtype: str) -> float:
    """Of a gradient under autocast to `dtype`, relative: forward and backward each round a layer's two
    factors and its product, and each rounding is taken to go the same way."""
    return 6 * layers * ROUNDING[dtype]
