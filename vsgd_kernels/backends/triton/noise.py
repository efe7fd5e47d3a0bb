"""Random bits for rounding, for Triton (``vsgd_kernels/noise.py`` says what they are)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import MASTER_NOISE, SPREAD, STATE_NOISE
from . import access
from .access import entry
from .blocks import CODES, blocks_from, each_of

_STATE_NOISE, _MASTER_NOISE = tl.constexpr(STATE_NOISE), tl.constexpr(MASTER_NOISE)
_SPREAD = tl.constexpr(SPREAD)


@triton.jit
def noise_of(row, t):
    """What is random in step t of a parameter: two uint32 (noise.py's Noise)."""
    key = entry(row + access.KEY)
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    a = _mix(low ^ t.to(tl.int32).to(tl.uint32, bitcast=True))
    return a, _mix(high + a)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_bits(noise, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """32 random bits for each of BLOCK elements from `first` on, of which the uppermost count most."""
    a, b = noise
    number = blocks_from(first, BLOCK) * 2 + STREAM
    x = number.to(tl.uint32) + (number >> 32).to(tl.uint32) * _SPREAD + a
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ b) * 0x846CA68B
    x = x ^ (x >> 16)
    return each_of(x, BLOCK) ^ (tl.arange(0, BLOCK) % CODES).to(tl.uint32) * _SPREAD


@triton.jit
def master_noise(noise, first, BLOCK: tl.constexpr):
    """32 random bits for each element's master."""
    return _random_bits(noise, first, _MASTER_NOISE, BLOCK)


@triton.jit
def state_noise(noise, first, BLOCK: tl.constexpr):
    """32 random bits for each element's states."""
    return _random_bits(noise, first, _STATE_NOISE, BLOCK)


@triton.jit
def other_bits(random):
    """Other ones of elements' random bits: the lower half, for what must not be rounded as something else is."""
    return random << 16
