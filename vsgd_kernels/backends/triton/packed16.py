"""packed16's codes, for Triton (``csrc/packed.h`` says what they mean)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES
from ...packed16 import MEAN_BITS, MOST_RATE, SPANS
from .access import load, state_at, store
from .noise import state_noise
from .q8 import (
    TINY_BITS,
    bit_length,
    each_word,
    highest_code,
    magnitude_codes,
    magnitudes,
    max_of_blocks,
    nan_mark,
    rate_range,
    words_at,
)

_CODES, _MOST_RATE = tl.constexpr(CODES), tl.constexpr(MOST_RATE)
#: Of rules of two states, and of three.
_SPAN_2, _SPAN_3 = tl.constexpr(SPANS[2]), tl.constexpr(SPANS[3])
assert MEAN_BITS == {2: 7, 3: 5}, "the kernels compute these"


@triton.jit
def load_states(
    row, layouts, index, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All states of an element in 16 bits."""
    MEAN: tl.constexpr = 5 if STATES == 3 else 7
    words, block = words_at(row, index, STATES, BLOCK)
    there = block * _CODES < numel
    packed = load(state_at(row, layouts, index, 0, tl.int16, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
    codes = (packed & 0xFFFF) >> MEAN
    word = each_word(tl.load(words + 1, mask=there, other=TINY_BITS + 5), BLOCK)
    step = word & 31
    first = codes
    second = codes
    if STATES == 3:
        other = each_word(tl.load(words + 2, mask=there, other=TINY_BITS), BLOCK)
        length = other & 31
        one = tl.full(length.shape, 1, tl.int32)
        first = codes & ((one << length) - 1)
        second = (other & -32) + ((codes >> length) << step)
    first = (word & -32) + (first << step)

    mean_word = tl.load(words, mask=there, other=_MOST_RATE)
    code = (packed << (32 - MEAN)) >> (32 - MEAN)
    scale = (((first >> 24) + 64) << 23).to(tl.float32, bitcast=True)
    SPAN: tl.constexpr = _SPAN_3 if STATES == 3 else _SPAN_2
    mean = magnitudes(tl.abs(code), mean_word, SPAN, 25 - MEAN, BLOCK) * scale
    mean = tl.where(code < 0, -mean, mean)

    is_nan = (code == -(1 << (MEAN - 1))) & (each_word(mean_word, BLOCK) < 0)
    state = (tl.where(is_nan, float("nan"), mean), _number(is_nan, first))
    if STATES == 3:
        state = state + (_number(is_nan, second),)
    return state


@triton.jit
def store_states(
    row, layouts, index, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All states of an element in 16 bits, rounded stochastically."""
    MEAN: tl.constexpr = 5 if STATES == 3 else 7
    words, block = words_at(row, index, STATES, BLOCK)
    there = block * _CODES < numel
    random = state_noise(noise, index)
    number = state[0] == state[0]
    for k in tl.static_range(1, STATES):
        number = number & (state[k] == state[k])
    counts = number & (index < numel)
    mean_bits = state[0].to(tl.int32, bitcast=True)
    rates = state[1].to(tl.int32, bitcast=True)
    others = state[STATES - 1].to(tl.int32, bitcast=True)

    low, high = _kept_range(rates, counts, BLOCK)
    other_low, other_high = _kept_range(others, counts, BLOCK)
    step = _step(low, high, other_low, other_high, STATES)
    base = (low >> step) << step
    tl.store(words + 1, base | step, mask=there)
    steps = each_word(step, BLOCK)
    raise_by = (random >> (32 - steps).to(tl.uint32)).to(tl.int32)
    bases = each_word(base, BLOCK)
    first = (tl.minimum(rates, _MOST_RATE) - bases + raise_by) >> steps
    packed = first << MEAN
    if STATES == 3:
        length = bit_length(highest_code(low, high, step))
        other_base = (other_low >> step) << step
        tl.store(words + 2, other_base | length, mask=there)
        second = (tl.minimum(others, _MOST_RATE) - each_word(other_base, BLOCK) + raise_by) >> steps
        packed = packed | (second << (MEAN + each_word(length, BLOCK)))

    per_root_scale = ((190 - ((bases + (first << steps)) >> 24)) << 23).to(tl.float32, bitcast=True)
    in_units = (mean_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * per_root_scale
    largest = max_of_blocks(tl.where(counts, in_units.to(tl.int32, bitcast=True), 0), BLOCK)
    largest = tl.maximum(largest, TINY_BITS)
    tl.store(words, largest | nan_mark(number, index, numel, BLOCK), mask=there)
    SPAN: tl.constexpr = _SPAN_3 if STATES == 3 else _SPAN_2
    # By bits that did not round the rate, which decides on the mean's units.
    code = magnitude_codes(in_units, largest, random << 16, SPAN, 25 - MEAN, BLOCK)
    code = tl.where(mean_bits < 0, -code, code) & ((1 << MEAN) - 1)
    packed = tl.where(number, packed | code, 1 << (MEAN - 1)).to(tl.int16)
    store(state_at(row, layouts, index, 0, tl.int16, ALIGN, STRIDED), packed, index < numel, MASKED)


@triton.jit
def _number(is_nan, bits):
    return tl.where(is_nan, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _kept_range(rates, counts, BLOCK: tl.constexpr):
    low, high = rate_range(rates, counts, BLOCK)
    return tl.minimum(low, _MOST_RATE), tl.minimum(high, _MOST_RATE)


@triton.jit
def _step(low, high, other_low, other_high, STATES: tl.constexpr):
    """The finest steps of 2^k in which the codes of each block's rates have no more bits than there are."""
    BITS: tl.constexpr = 11 if STATES == 3 else 9
    a = bit_length(high - low)
    finest = a - BITS
    if STATES == 3:
        b = bit_length(other_high - other_low)
        finest = tl.maximum(tl.maximum(finest, b - BITS), (a + b - BITS + 1) >> 1)
    step = tl.maximum(finest, 5)
    for _ in tl.static_range(3):
        bits = bit_length(highest_code(low, high, step))
        if STATES == 3:
            bits += bit_length(highest_code(other_low, other_high, step))
        step += tl.where(bits > BITS, 1, 0)
    return step
