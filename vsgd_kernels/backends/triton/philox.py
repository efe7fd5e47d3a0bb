"""The random numbers of rules that draw, for Triton (``vsgd_kernels/philox.py`` says which they are)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import access
from .access import entry


@triton.jit
def random_words(row, first, t, BLOCK: tl.constexpr):
    """32 random bits, as uint32, of each of BLOCK elements from `first` on, in step t; 4 divides `first`."""
    seed = entry(row + access.SEED)
    key = (t.to(tl.int64) << 32) | (seed & 0xFFFFFFFF)
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros_like(quad).to(tl.uint32)
    place = zero + entry(row + access.PLACE).to(tl.uint32)
    seed_high = zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, quad.to(tl.uint32), (quad >> 32).to(tl.uint32), place, seed_high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
