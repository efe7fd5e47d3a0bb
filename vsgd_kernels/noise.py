"""Random bits for stochastic rounding, in plain torch (``csrc/noise.h`` is the same in C++).

The same on every backend, whatever block, thread or order an element is stepped in, and the same again in a run that
is resumed: each `CODES` elements of a tensor share a hash of (seed, parameter, step, their number), in which each flips
bits of its own. Each element's bits are uniform, and new at every step; those of neighbours are evenly spread, so that
their roundings cancel rather than add up. An element's states are rounded by the same bits, but for packed16's means
and q8's first rates, which take `other_bits`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
#: Element i of a block flips the bits of i SPREAD: the seven uppermost of either half are another number for each.
SPREAD = 0x9E00CE00
#: Elements that share a hash, and in q8 and packed16 the words of their codes.
CODES = 128
#: What is rounded by bits of its own.
STATE_NOISE, MASTER_NOISE = 0, 1


def tensor_key(seed: int, index: int) -> int:
    """64 bits, as a signed integer, for a parameter's number in its optimizer (SplitMix64)."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    x ^= x >> 31
    return x - (x >> 63 << 64)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


class Noise(NamedTuple):
    """What is random in one step of one parameter."""

    a: int
    b: int

    @classmethod
    def of(cls, key: int, t: int) -> Noise:
        """That of step `t` of the parameter with this `tensor_key`."""
        a = _mix((key ^ t) & _MASK32)
        return cls(a, _mix(((key >> 32) + a) & _MASK32))

    def bits(self, numel: int, device: torch.device, stream: int) -> Tensor:
        """[numel] int64, 32 random bits of each element; the uppermost count most."""
        number = torch.arange(-(-numel // CODES), device=device) * 2 + stream
        x = (number + (number >> 32) * SPREAD + self.a) & _MASK32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
        x = ((x ^ (x >> 15) ^ self.b) * 0x846CA68B) & _MASK32
        start = x ^ (x >> 16)
        flips = torch.arange(CODES, device=device) * SPREAD & _MASK32
        return (start[:, None] ^ flips).view(-1)[:numel]


def other_bits(random: Tensor) -> Tensor:
    """Other ones of an element's random bits: the lower half, for what must not be rounded as something else is."""
    return random << 16 & _MASK32
