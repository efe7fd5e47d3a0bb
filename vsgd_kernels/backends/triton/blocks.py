"""Blocks of elements that share random bits, and in q8 and packed16 the words of their codes, for Triton.

A program steps `BLOCK` elements at a time, which are one or several of these blocks. What all elements of one share is
computed once for each: a tensor of BLOCK // CODES values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES as _CODES_OF_A_BLOCK

CODES = tl.constexpr(_CODES_OF_A_BLOCK)


@triton.jit
def blocks_from(first, BLOCK: tl.constexpr):
    """The numbers of the blocks of BLOCK elements from `first` on."""
    return first // CODES + tl.arange(0, BLOCK // CODES)


@triton.jit
def each_of(shared, BLOCK: tl.constexpr):
    """What blocks share, for each of their elements."""
    return tl.reshape(tl.broadcast_to(shared[:, None], (BLOCK // CODES, CODES)), (BLOCK,))


@triton.jit
def max_of_blocks(x, BLOCK: tl.constexpr):
    """The largest of each block's elements."""
    return tl.max(tl.reshape(x, (BLOCK // CODES, CODES)), axis=1)


@triton.jit
def min_of_blocks(x, BLOCK: tl.constexpr):
    """The least of each block's elements."""
    return tl.min(tl.reshape(x, (BLOCK // CODES, CODES)), axis=1)
