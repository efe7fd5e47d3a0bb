"""q8's codes, for Triton (``csrc/states.h`` says what they mean), and what the formats in blocks share."""

from __future__ import annotations

import triton
import triton.language as tl

from ...q8 import FIRST_RATE, MEAN_SHIFT, SPAN
from ...q8 import TINY_BITS as _TINY_BITS
from . import access
from .access import entry, load, state_at, store
from .blocks import CODES, blocks_from, each_of, max_of_blocks, min_of_blocks
from .noise import other_bits, state_noise
from .rules import divide, fma

_SPAN, _MEAN_SHIFT, _FIRST_RATE = tl.constexpr(SPAN), tl.constexpr(MEAN_SHIFT), tl.constexpr(FIRST_RATE)
TINY_BITS = tl.constexpr(_TINY_BITS)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def words_at(row, first, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Where the words of the blocks from `first` on are, for the first state."""
    return entry(row + access.BLOCKS).to(tl.pointer_type(tl.int32)) + blocks_from(first, BLOCK) * STATES


@triton.jit
def load_words(words, first, numel, other, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """A word of each block, and `other` for blocks that lie beyond the tensor."""
    if MASKED:
        return tl.load(words, mask=blocks_from(first, BLOCK) * CODES < numel, other=other)
    else:
        return tl.load(words)


@triton.jit
def store_words(words, value, first, numel, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a word of each block."""
    if MASKED:
        tl.store(words, value, mask=blocks_from(first, BLOCK) * CODES < numel)
    else:
        tl.store(words, value)


@triton.jit
def load_states(
    row, layouts, first, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes; RATES has a bit for each state that is a rate."""
    index = first + tl.arange(0, BLOCK)
    words = words_at(row, first, STATES, BLOCK)
    # All that is asked for before any of it is waited for: the branches below would keep later loads back.
    codes = ()
    word = ()
    for k in tl.static_range(STATES):
        at = state_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED)
        codes = codes + (load(at, index < numel, MASKED),)
        word = word + (load_words(words + k, first, numel, TINY_BITS + 5, MASKED, BLOCK),)
    state = ()
    for k in tl.static_range(STATES):
        if (RATES >> k) & 1:
            code = codes[k].to(tl.int32)
            bits = each_of(word[k] & 0x7FFFFFE0, BLOCK) + (code << each_of(word[k] & 31, BLOCK))
            value = bits.to(tl.float32, bitcast=True)
        else:
            value = mean_of(codes[k].to(tl.int32) << 24, word[k], _SPAN, 24 - _MEAN_SHIFT, BLOCK)
        if tl.min(word[k], 0) < 0:  # a block is marked
            is_nan = (codes[k] == (255 if (RATES >> k) & 1 else 128)) & (each_of(word[k], BLOCK) < 0)
            value = tl.where(is_nan, float("nan"), value)
        state = state + (value,)
    return state


@triton.jit
def store_states(
    row, layouts, first, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes, rounded stochastically; RATES has a bit for each state that is a rate."""
    index = first + tl.arange(0, BLOCK)
    there = index < numel
    random = state_noise(noise, first, BLOCK)
    # Few blocks have NaN, and the others need not look at each element. Tails are treated as if they had, and strided
    # operands, for whose code in both forms registers do not suffice.
    if MASKED or STRIDED or has_nan(state, RATES, STATES):
        codes, word = _coded(state, random, there, MASKED, RATES, STATES, BLOCK, True)
    else:
        codes, word = _coded(state, random, there, MASKED, RATES, STATES, BLOCK, False)
    words = words_at(row, first, STATES, BLOCK)
    for k in tl.static_range(STATES):
        store(state_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED), codes[k], there, MASKED)
        store_words(words + k, word[k], first, numel, MASKED, BLOCK)


@triton.jit
def _coded(
    state, random, there, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    NAN: tl.constexpr,
):  # fmt: skip
    """Each state's codes, and the words of its blocks. NAN: whether any can be no number."""
    codes = ()
    words = ()
    for k in tl.static_range(STATES):
        own = other_bits(random) if k == _FIRST_RATE else random
        bits = state[k].to(tl.int32, bitcast=True)
        number = state[k] == state[k]
        if (RATES >> k) & 1:
            low, high = rate_range(bits, number, there, MASKED, NAN, BLOCK)
            word = _rate_word(low, high)
            step = each_of(word & 31, BLOCK)
            raised = bits - each_of(word & -32, BLOCK) + (own >> (32 - step).to(tl.uint32)).to(tl.int32)
            code = raised >> step
        else:
            magnitude = bits & 0x7FFFFFFF
            word = tl.maximum(highest(magnitude, number, there, MASKED, NAN, BLOCK), TINY_BITS)
            code = magnitude_codes(magnitude.to(tl.float32, bitcast=True), word, own, _SPAN, _MEAN_SHIFT, BLOCK)
            code = tl.where(bits < 0, -code, code)
        code, word = marked(code, word, 255 if (RATES >> k) & 1 else 128, number, there, NAN, BLOCK)
        codes = codes + (code.to(tl.uint8),)
        words = words + (word,)
    return codes, words


@triton.jit
def has_nan(state, RATES: tl.constexpr, STATES: tl.constexpr):
    """Whether any element has NaN for a state."""
    most = _above_numbers(state[0], RATES & 1)
    for k in tl.static_range(1, STATES):
        most = tl.maximum(most, _above_numbers(state[k], (RATES >> k) & 1))
    return tl.max(most, 0) > _INFINITY


@triton.jit
def _above_numbers(state, RATE: tl.constexpr):
    """Bits that are larger for NaN than for any number, as what is unsigned; numbers that are rates have no sign."""
    bits = state.to(tl.uint32, bitcast=True)
    return bits if RATE else bits & 0x7FFFFFFF


@triton.jit
def highest(x, number, there, MASKED: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr):
    """The largest x of each block's elements that are there and are numbers; at least 0."""
    return max_of_blocks(_counting(x, 0, number, there, MASKED, NAN), BLOCK)


@triton.jit
def _counting(x, other, number, there, MASKED: tl.constexpr, NAN: tl.constexpr):
    """x of elements that are there and are numbers, and `other` of others."""
    if MASKED:
        return tl.where(number & there, x, other)
    elif NAN:
        return tl.where(number, x, other)
    else:
        return x


@triton.jit
def marked(code, word, MARK: tl.constexpr, number, there, NAN: tl.constexpr, BLOCK: tl.constexpr):
    """Codes with MARK for what is no number, and the words of blocks that have such codes with their sign bits set."""
    if NAN:
        code = tl.where(number, code, MARK)
        word = word | (max_of_blocks(tl.where(there & (number == 0), 1, 0), BLOCK) << 31)
    return code, word


@triton.jit
def magnitude_codes(x, word, random, SPAN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of magnitudes, for words that are the bits of their blocks' largest."""
    span = tl.full(word.shape, SPAN, tl.float32)
    y = fma(x, each_of(divide(span, word.to(tl.float32, bitcast=True)), BLOCK), 1.0)
    return (y.to(tl.int32, bitcast=True) - 0x3F800000 + (random >> (32 - SHIFT)).to(tl.int32)) >> SHIFT


@triton.jit
def mean_of(upper, word, SPAN: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of which `magnitude_codes` are the codes, with signs; these are the uppermost bits of `upper`.

    DOWN: by how many bits they stand above where codes are shifted to. Words may be marked.
    """
    span = tl.full(word.shape, SPAN, tl.float32)
    unit = each_of(divide((word & 0x7FFFFFFF).to(tl.float32, bitcast=True), span), BLOCK)
    y = 0x3F800000 + (tl.abs(upper).to(tl.uint32, bitcast=True) >> DOWN).to(tl.int32)
    magnitude = (y.to(tl.float32, bitcast=True) - 1.0) * unit
    return (magnitude.to(tl.int32, bitcast=True) | (upper & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def rate_range(rates, number, there, MASKED: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest and highest bits of each block's rates; where none counts, those of the least rate there is."""
    high = tl.maximum(highest(rates, number, there, MASKED, NAN, BLOCK), TINY_BITS)
    low = min_of_blocks(_counting(rates, 0x7FFFFFFF, number, there, MASKED, NAN), BLOCK)
    return tl.minimum(low, high), high


@triton.jit
def highest_code(low, high, step):
    """Each block's highest code of a rate, rounded up, in steps of 2^step."""
    return ((high - 1) >> step) - (low >> step) + 1


@triton.jit
def bit_length(x):
    """How many bits integers below 2^24 have, from their highest set one on."""
    # By the exponent of a float32.
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _rate_word(low, high):
    """The finest steps of 2^k in which a block's range fits, even rounded up, and its base."""
    k = 5 + bit_length((high - low) >> 13)
    k = tl.where(highest_code(low, high, k) > 254, k + 1, k)
    return ((low >> k) << k) | k
