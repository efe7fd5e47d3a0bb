"""packed16's codes, for Triton (``csrc/packed.h`` says what they mean)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES
from ...packed16 import MEAN_BITS, MOST_RATE, SPANS
from .access import load, state_at, store
from .noise import state_noise
from .q8 import TINY_BITS, each_word, max_of_blocks, words_at
from .rules import divide

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
    largest = (mean_word & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    unit = each_word(divide(largest, tl.full(largest.shape, _span(STATES), tl.float32)), BLOCK)
    code = (packed << (32 - MEAN)) >> (32 - MEAN)
    y = (0x3F800000 + (tl.abs(code) << (25 - MEAN))).to(tl.float32, bitcast=True)
    scale = (((first >> 24) + 64) << 23).to(tl.float32, bitcast=True)
    mean = (y - 1.0) * unit * scale
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

    low, high = _range(rates, counts, BLOCK)
    other_low, other_high = _range(others, counts, BLOCK)
    step = _step(low, high, other_low, other_high, STATES)
    base = (low >> step) << step
    tl.store(words + 1, base | step, mask=there)
    steps = each_word(step, BLOCK)
    raise_by = (random >> (32 - steps).to(tl.uint32)).to(tl.int32)
    bases = each_word(base, BLOCK)
    first = (tl.minimum(rates, _MOST_RATE) - bases + raise_by) >> steps
    packed = first << MEAN
    if STATES == 3:
        length = _bit_length(_highest_code(low, high, step))
        other_base = (other_low >> step) << step
        tl.store(words + 2, other_base | length, mask=there)
        second = (tl.minimum(others, _MOST_RATE) - each_word(other_base, BLOCK) + raise_by) >> steps
        packed = packed | (second << (MEAN + each_word(length, BLOCK)))

    per_root_scale = ((190 - ((bases + (first << steps)) >> 24)) << 23).to(tl.float32, bitcast=True)
    in_units = (mean_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * per_root_scale
    largest = max_of_blocks(tl.where(counts, in_units.to(tl.int32, bitcast=True), 0), BLOCK)
    largest = tl.maximum(largest, TINY_BITS)
    has_nan = max_of_blocks(tl.where(number | (index >= numel), 0, 1), BLOCK) << 31
    tl.store(words, largest | has_nan, mask=there)
    span = tl.full(largest.shape, _span(STATES), tl.float32)
    y = in_units * each_word(divide(span, largest.to(tl.float32, bitcast=True)), BLOCK) + 1.0
    SHIFT: tl.constexpr = 25 - MEAN
    # By bits that did not round the rate, which decides on the mean's units.
    code = (y.to(tl.int32, bitcast=True) - 0x3F800000 + ((random << 16) >> (32 - SHIFT)).to(tl.int32)) >> SHIFT
    code = tl.where(mean_bits < 0, -code, code) & ((1 << MEAN) - 1)
    packed = tl.where(number, packed | code, 1 << (MEAN - 1)).to(tl.int16)
    store(state_at(row, layouts, index, 0, tl.int16, ALIGN, STRIDED), packed, index < numel, MASKED)


@triton.jit
def _span(STATES: tl.constexpr):
    return _SPAN_3 if STATES == 3 else _SPAN_2


@triton.jit
def _number(is_nan, bits):
    return tl.where(is_nan, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _range(rates, counts, BLOCK: tl.constexpr):
    """The lowest and the highest bits of each block's rates."""
    high = tl.maximum(max_of_blocks(tl.where(counts, rates, 0), BLOCK), TINY_BITS)  # where all are NaN
    low = 0x7FFFFFFF - max_of_blocks(tl.where(counts, 0x7FFFFFFF - rates, 0), BLOCK)
    high = tl.minimum(high, _MOST_RATE)
    return tl.minimum(low, high), high


@triton.jit
def _step(low, high, other_low, other_high, STATES: tl.constexpr):
    """The finest steps of 2^k in which the codes of each block's rates have no more bits than there are."""
    BITS: tl.constexpr = 11 if STATES == 3 else 9
    a = _bit_length(high - low)
    finest = a - BITS
    if STATES == 3:
        b = _bit_length(other_high - other_low)
        finest = tl.maximum(tl.maximum(finest, b - BITS), (a + b - BITS + 1) >> 1)
    step = tl.maximum(finest, 5)
    for _ in tl.static_range(3):
        bits = _bit_length(_highest_code(low, high, step))
        if STATES == 3:
            bits += _bit_length(_highest_code(other_low, other_high, step))
        step += tl.where(bits > BITS, 1, 0)
    return step


@triton.jit
def _highest_code(low, high, step):
    one = tl.full(step.shape, 1, tl.int32)
    return (high - ((low >> step) << step) + (one << step) - 1) >> step


@triton.jit
def _bit_length(x):
    # By the exponent of a float32; without the bits that follow the first, for rounding would carry into it.
    return tl.maximum(((x & ~(x >> 1)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)
