"""Random numbers without a state: number j of sample i depends on the seed, i and j alone.

So any batch can be made at any time, on any device and in any order, and a run that was killed and resumed sees what it
would have seen. The mixing is splitmix64's (https://prng.di.unimi.it/splitmix64.c).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BITS = 21


def mixed(x: Tensor) -> Tensor:
    """Scrambles int64 numbers, one to one."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draws(seed: int, samples: Tensor, count: int) -> Tensor:
    """``count`` random int64 numbers of each sample: ``[B]`` → ``[B, count]``.

    Args:
        seed: seed of the stream, from 0.
        samples: sample numbers, int64, from 0.
        count: number of random numbers per sample.
    """
    stream = int(mixed(torch.tensor(seed + 1) * _GOLDEN))
    key = mixed(samples + stream)
    return mixed(key[:, None] + torch.arange(1, count + 1, device=samples.device) * _GOLDEN)


def uniform(drawn: Tensor) -> Tensor:
    """Random int64 numbers → float32 in [0, 1), with 24 bits."""
    return ((drawn >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def normal(drawn: Tensor) -> Tensor:
    """Random int64 numbers → float32 of mean 0 and variance 1: the sum of three uniform ones, at most 3.

    Sums round alike on all devices, which logarithms and cosines do not.
    """
    mask = (1 << _BITS) - 1
    total = (drawn & mask) + ((drawn >> _BITS) & mask) + ((drawn >> (2 * _BITS)) & mask)
    return total.float() * (2.0 / (1 << _BITS)) - 3.0
