"""Random bits for rounding, for Triton (``vsgd_kernels/noise.py`` says what they are)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES, MASTER_NOISE, SPREAD, STATE_NOISE
from . import access
from .access import entry

_STATE_NOISE, _MASTER_NOISE = tl.constexpr(STATE_NOISE), tl.constexpr(MASTER_NOISE)
_SPREAD, _CODES = tl.constexpr(SPREAD), tl.constexpr(CODES)


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
def _random_bits(noise, index, STREAM: tl.constexpr):
    """32 random bits for each element, of which the uppermost count most."""
    a, b = noise
    block = index // _CODES
    number = block * 2 + STREAM
    x = number.to(tl.uint32) + (number >> 32).to(tl.uint32) * _SPREAD + a
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ b) * 0x846CA68B
    x = x ^ (x >> 16)
    return x ^ (index - block * _CODES).to(tl.uint32) * _SPREAD


@triton.jit
def master_noise(noise, index):
    """32 random bits for each element's master."""
    return _random_bits(noise, index, _MASTER_NOISE)


@triton.jit
def state_noise(noise, index):
    """32 random bits for each element's states."""
    return _random_bits(noise, index, _STATE_NOISE)
