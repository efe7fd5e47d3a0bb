"""q8's codes, for Triton (``csrc/states.h`` says what they mean), and what the formats in blocks share."""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES
from ...q8 import MEAN_SHIFT, SPAN
from ...q8 import TINY_BITS as _TINY_BITS
from . import access
from .access import entry, load, state_at, store
from .noise import state_noise
from .rules import divide, fma

_CODES, _SPAN, _MEAN_SHIFT = tl.constexpr(CODES), tl.constexpr(SPAN), tl.constexpr(MEAN_SHIFT)
TINY_BITS = tl.constexpr(_TINY_BITS)


@triton.jit
def words_at(row, index, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Where the words of the blocks of these elements are, for the first state; and the blocks' numbers."""
    block = tl.min(index, 0) // _CODES + tl.arange(0, BLOCK // _CODES)
    return entry(row + access.BLOCKS).to(tl.pointer_type(tl.int32)) + block * STATES, block


@triton.jit
def each_word(word, BLOCK: tl.constexpr):
    """Each element's word."""
    return tl.reshape(tl.broadcast_to(word[:, None], (BLOCK // _CODES, _CODES)), (BLOCK,))


@triton.jit
def load_states(
    row, layouts, index, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes; RATES has a bit for each state that is a rate."""
    words, block = words_at(row, index, STATES, BLOCK)
    state = ()
    for k in tl.static_range(STATES):
        word = tl.load(words + k, mask=block * _CODES < numel, other=TINY_BITS + 5)
        if (RATES >> k) & 1:
            code = load(state_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
            each = each_word(word, BLOCK)
            bits = (each & 0x7FFFFFE0) + (code << (each & 31))
            bits = tl.where((code == 255) & (each < 0), 0x7FC00000, bits)
            state = state + (bits.to(tl.float32, bitcast=True),)
        else:
            code = load(state_at(row, layouts, index, k, tl.int8, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
            value = magnitudes(tl.abs(code), word, _SPAN, _MEAN_SHIFT, BLOCK)
            value = tl.where(code < 0, -value, value)
            state = state + (tl.where((code == -128) & (each_word(word, BLOCK) < 0), float("nan"), value),)
    return state


@triton.jit
def store_states(
    row, layouts, index, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes, rounded stochastically; RATES has a bit for each state that is a rate."""
    words, block = words_at(row, index, STATES, BLOCK)
    random = state_noise(noise, index)
    for k in tl.static_range(STATES):
        bits = state[k].to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        number = state[k] == state[k]
        counts = number & (index < numel)
        if (RATES >> k) & 1:
            low, high = rate_range(magnitude, counts, BLOCK)
            word = _rate_word(low, high)
            each = each_word(word, BLOCK)
            step = each & 31
            raised = bits - (each & -32) + (random >> (32 - step).to(tl.uint32)).to(tl.int32)
            code = tl.where(number, raised >> step, 255).to(tl.uint8)
            store(state_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED), code, index < numel, MASKED)
        else:
            word = tl.maximum(max_of_blocks(tl.where(counts, magnitude, 0), BLOCK), TINY_BITS)
            x = tl.where(number, magnitude, 0).to(tl.float32, bitcast=True)
            c = magnitude_codes(x, word, random, _SPAN, _MEAN_SHIFT, BLOCK)
            code = tl.where(number, tl.where(bits < 0, -c, c), -128).to(tl.int8)
            store(state_at(row, layouts, index, k, tl.int8, ALIGN, STRIDED), code, index < numel, MASKED)
        tl.store(words + k, word | nan_mark(number, index, numel, BLOCK), mask=block * _CODES < numel)


@triton.jit
def max_of_blocks(x, BLOCK: tl.constexpr):
    """The largest of each block's elements."""
    return tl.max(tl.reshape(x, (BLOCK // _CODES, _CODES)), axis=1)


@triton.jit
def nan_mark(number, index, numel, BLOCK: tl.constexpr):
    """The sign bit for blocks not all of whose elements are numbers."""
    return max_of_blocks(tl.where(number | (index >= numel), 0, 1), BLOCK) << 31


@triton.jit
def magnitude_codes(x, word, random, SPAN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of magnitudes, for words that are the bits of their blocks' largest."""
    span = tl.full(word.shape, SPAN, tl.float32)
    y = fma(x, each_word(divide(span, word.to(tl.float32, bitcast=True)), BLOCK), 1.0)
    return (y.to(tl.int32, bitcast=True) - 0x3F800000 + (random >> (32 - SHIFT)).to(tl.int32)) >> SHIFT


@triton.jit
def magnitudes(code, word, SPAN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The magnitudes of `magnitude_codes`; words may be marked."""
    span = tl.full(word.shape, SPAN, tl.float32)
    unit = each_word(divide((word & 0x7FFFFFFF).to(tl.float32, bitcast=True), span), BLOCK)
    return ((0x3F800000 + (code << SHIFT)).to(tl.float32, bitcast=True) - 1.0) * unit


@triton.jit
def rate_range(rates, counts, BLOCK: tl.constexpr):
    """The lowest and highest bits of each block's rates; where none counts, those of the least rate there is."""
    high = tl.maximum(max_of_blocks(tl.where(counts, rates, 0), BLOCK), TINY_BITS)
    low = 0x7FFFFFFF - max_of_blocks(tl.where(counts, 0x7FFFFFFF - rates, 0), BLOCK)
    return tl.minimum(low, high), high


@triton.jit
def highest_code(low, high, step):
    """Each block's highest code of a rate, rounded up, in steps of 2^step."""
    one = tl.full(step.shape, 1, tl.int32)
    return (high - ((low >> step) << step) + (one << step) - 1) >> step


@triton.jit
def bit_length(x):
    """How many bits integers have, from their highest set one on."""
    # By the exponent of a float32; without the bits that follow the first, for rounding would carry into it.
    return tl.maximum(((x & ~(x >> 1)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _rate_word(low, high):
    """The finest steps of 2^k in which a block's range fits, even rounded up, and its base."""
    k = 5 + bit_length((high - low) >> 13)
    k = tl.where(highest_code(low, high, k) > 254, k + 1, k)
    return ((low >> k) << k) | k
