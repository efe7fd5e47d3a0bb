"""packed16's codes, for Triton (``csrc/packed.h`` says what they mean)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...packed16 import MEAN_BITS, MOST_RATE, SPANS
from .access import load, state_at, store
from .blocks import each_of
from .noise import other_bits, state_noise
from .q8 import (
    TINY_BITS,
    bit_length,
    has_nan,
    highest,
    highest_code,
    load_words,
    magnitude_codes,
    marked,
    mean_of,
    rate_range,
    store_words,
    words_at,
)

_MOST_RATE = tl.constexpr(MOST_RATE)
#: Of rules of two states, and of three.
_SPAN_2, _SPAN_3 = tl.constexpr(SPANS[2]), tl.constexpr(SPANS[3])
assert MEAN_BITS == {2: 7, 3: 5}, "the kernels compute these"


@triton.jit
def load_states(
    row, layouts, first, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All states of an element in 16 bits."""
    MEAN: tl.constexpr = 5 if STATES == 3 else 7
    index = first + tl.arange(0, BLOCK)
    words = words_at(row, first, STATES, BLOCK)
    packed = load(state_at(row, layouts, index, 0, tl.int16, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
    codes = (packed & 0xFFFF) >> MEAN
    word = load_words(words + 1, first, numel, TINY_BITS + 5, MASKED, BLOCK)
    step = each_of(word & 31, BLOCK)
    first_code = codes
    if STATES == 3:
        other = load_words(words + 2, first, numel, TINY_BITS, MASKED, BLOCK)
        length = other & 31
        one = tl.full(length.shape, 1, tl.int32)
        first_code = codes & each_of((one << length) - 1, BLOCK)
        second = each_of(other & -32, BLOCK) + ((codes >> each_of(length, BLOCK)) << step)
    rate = each_of(word & -32, BLOCK) + (first_code << step)

    mean_word = load_words(words, first, numel, _MOST_RATE, MASKED, BLOCK)
    code = packed << (32 - MEAN)
    scale = (((rate >> 24) + 64) << 23).to(tl.float32, bitcast=True)
    SPAN: tl.constexpr = _SPAN_3 if STATES == 3 else _SPAN_2
    DOWN: tl.constexpr = (32 - MEAN) - (25 - MEAN)
    mean = (mean_of(code, mean_word, SPAN, DOWN, BLOCK) * scale).to(tl.int32, bitcast=True)

    if tl.min(mean_word, 0) < 0:  # a block is marked
        is_nan = (code == -0x80000000) & (each_of(mean_word, BLOCK) < 0)
        mean = tl.where(is_nan, 0x7FC00000, mean)
        rate = tl.where(is_nan, 0x7FC00000, rate)
        if STATES == 3:
            second = tl.where(is_nan, 0x7FC00000, second)
    state = (mean.to(tl.float32, bitcast=True), rate.to(tl.float32, bitcast=True))
    if STATES == 3:
        state = state + (second.to(tl.float32, bitcast=True),)
    return state


@triton.jit
def store_states(
    row, layouts, first, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All states of an element in 16 bits, rounded stochastically."""
    index = first + tl.arange(0, BLOCK)
    there = index < numel
    random = state_noise(noise, first, BLOCK)
    # Few blocks have NaN, and the others need not look at each element. Tails are treated as if they had, and strided
    # operands, for whose code in both forms registers do not suffice.
    if MASKED or STRIDED or has_nan(state, RATES, STATES):
        packed, word = _coded(state, random, there, MASKED, STATES, BLOCK, True)
    else:
        packed, word = _coded(state, random, there, MASKED, STATES, BLOCK, False)
    store(state_at(row, layouts, index, 0, tl.int16, ALIGN, STRIDED), packed, there, MASKED)
    words = words_at(row, first, STATES, BLOCK)
    for k in tl.static_range(STATES):
        store_words(words + k, word[k], first, numel, MASKED, BLOCK)


@triton.jit
def _coded(
    state, random, there, MASKED: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, NAN: tl.constexpr
):  # fmt: skip
    """All states' codes together, and the words of the blocks. NAN: whether any can be no number."""
    MEAN: tl.constexpr = 5 if STATES == 3 else 7
    number = state[0] == state[0]
    for k in tl.static_range(1, STATES):
        number = number & (state[k] == state[k])
    mean_bits = state[0].to(tl.int32, bitcast=True)
    rates = state[1].to(tl.int32, bitcast=True)
    others = state[STATES - 1].to(tl.int32, bitcast=True)

    low, high = _kept_range(rates, number, there, MASKED, NAN, BLOCK)
    other_low, other_high = _kept_range(others, number, there, MASKED, NAN, BLOCK)
    step = _step(low, high, other_low, other_high, STATES)
    base = (low >> step) << step
    words = (base | step,)
    steps = each_of(step, BLOCK)
    raise_by = (random >> (32 - steps).to(tl.uint32)).to(tl.int32)
    bases = each_of(base, BLOCK)
    code = (tl.minimum(rates, _MOST_RATE) - bases + raise_by) >> steps
    packed = code << MEAN
    if STATES == 3:
        length = bit_length(highest_code(low, high, step))
        other_base = (other_low >> step) << step
        words = words + (other_base | length,)
        second = (tl.minimum(others, _MOST_RATE) - each_of(other_base, BLOCK) + raise_by) >> steps
        packed = packed | (second << each_of(MEAN + length, BLOCK))

    per_root_scale = ((190 - ((bases + (code << steps)) >> 24)) << 23).to(tl.float32, bitcast=True)
    in_units = (mean_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * per_root_scale
    largest = highest(in_units.to(tl.int32, bitcast=True), number, there, MASKED, NAN, BLOCK)
    largest = tl.maximum(largest, TINY_BITS)
    SPAN: tl.constexpr = _SPAN_3 if STATES == 3 else _SPAN_2
    # By bits that did not round the rate, which decides on the mean's units.
    code = magnitude_codes(in_units, largest, other_bits(random), SPAN, 25 - MEAN, BLOCK)
    packed = packed | (tl.where(mean_bits < 0, -code, code) & ((1 << MEAN) - 1))
    packed, largest = marked(packed, largest, 1 << (MEAN - 1), number, there, NAN, BLOCK)
    return packed.to(tl.int16), (largest,) + words


@triton.jit
def _kept_range(rates, number, there, MASKED: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr):
    low, high = rate_range(rates, number, there, MASKED, NAN, BLOCK)
    return tl.minimum(low, _MOST_RATE), tl.minimum(high, _MOST_RATE)


@triton.jit
def _bit_length_of_31(x):
    """How many bits integers below 2^31 have."""
    # Without the bits that follow the first, for rounding would carry into it.
    return bit_length(x & ~(x >> 1))


@triton.jit
def _step(low, high, other_low, other_high, STATES: tl.constexpr):
    """The finest steps of 2^k in which the codes of each block's rates have no more bits than there are."""
    BITS: tl.constexpr = 11 if STATES == 3 else 9
    a = _bit_length_of_31(high - low)
    finest = a - BITS
    if STATES == 3:
        b = _bit_length_of_31(other_high - other_low)
        finest = tl.maximum(tl.maximum(finest, b - BITS), (a + b - BITS + 1) >> 1)
    step = tl.maximum(finest, 5)
    bits = _code_bits(low, high, other_low, other_high, step, STATES)
    if tl.max(bits, 0) > BITS:  # one of 15 to 30 blocks
        for _ in tl.static_range(3):
            step += tl.where(bits > BITS, 1, 0)
            bits = _code_bits(low, high, other_low, other_high, step, STATES)
    return step


@triton.jit
def _code_bits(low, high, other_low, other_high, step, STATES: tl.constexpr):
    """How many bits the codes of each block's rates have together, in steps of 2^step."""
    bits = bit_length(highest_code(low, high, step))
    if STATES == 3:
        bits += bit_length(highest_code(other_low, other_high, step))
    return bits
