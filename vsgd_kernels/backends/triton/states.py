"""How states are stored, for Triton (``vsgd_kernels/state_formats.py`` says what the formats are).

A format is a pair of functions that the kernel takes as constexpr: one loads the states of a block of elements, as
numbers, the other stores them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...noise import CODES, GOLDEN, MASTER_NOISE, STATE_NOISE
from ...state_formats import MEAN_SHIFT, SPAN
from . import access
from .access import entry, load, offsets_of, pointer, store
from .formats import bits_of_bf16
from .rules import divide

_STATE_NOISE, _MASTER_NOISE, _GOLDEN = tl.constexpr(STATE_NOISE), tl.constexpr(MASTER_NOISE), tl.constexpr(GOLDEN)
_CODES, _SPAN, _MEAN_SHIFT = tl.constexpr(CODES), tl.constexpr(SPAN), tl.constexpr(MEAN_SHIFT)


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
    x = number.to(tl.uint32) + (number >> 32).to(tl.uint32) * _GOLDEN + a
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ b) * 0x846CA68B
    x = x ^ (x >> 16)
    return x + (index - block * _CODES).to(tl.uint32) * _GOLDEN


@triton.jit
def master_noise(noise, index):
    """32 random bits for each element's master."""
    return _random_bits(noise, index, _MASTER_NOISE)


@triton.jit
def _at(row, layouts, index, k: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr):
    """Where elements of state k are."""
    offsets = offsets_of(row, layouts, index, access.OPERAND_STATE + k, STRIDED)
    return pointer(entry(row + access.STATE + k), dtype, ALIGN) + offsets


@triton.jit
def load_fp32(
    row, layouts, index, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in arithmetic dtype."""
    state = ()
    for k in tl.static_range(STATES):
        at = _at(row, layouts, index, k, ARITHMETIC, ALIGN, STRIDED)
        state = state + (load(at, index < numel, MASKED),)
    return state


@triton.jit
def store_fp32(
    row, layouts, index, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in arithmetic dtype."""
    for k in tl.static_range(STATES):
        store(_at(row, layouts, index, k, ARITHMETIC, ALIGN, STRIDED), state[k], index < numel, MASKED)


@triton.jit
def load_bf16(
    row, layouts, index, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States that are the upper half of a float32."""
    state = ()
    for k in tl.static_range(STATES):
        stored = load(_at(row, layouts, index, k, tl.bfloat16, ALIGN, STRIDED), index < numel, MASKED)
        state = state + (bits_of_bf16(stored).to(tl.float32, bitcast=True),)
    return state


@triton.jit
def store_bf16(
    row, layouts, index, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States that are the upper half of a float32, rounded stochastically."""
    random = _random_bits(noise, index, _STATE_NOISE) >> 16
    for k in tl.static_range(STATES):
        bits = state[k].to(tl.uint32, bitcast=True)
        code = tl.where(state[k] != state[k], 0x7FC0, (bits + random) >> 16)
        stored = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        store(_at(row, layouts, index, k, tl.bfloat16, ALIGN, STRIDED), stored, index < numel, MASKED)


@triton.jit
def _words_at(row, index, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Where q8's words of the blocks of these elements are, for the first state; and the blocks' numbers."""
    block = tl.min(index, 0) // _CODES + tl.arange(0, BLOCK // _CODES)
    return entry(row + access.BLOCKS).to(tl.pointer_type(tl.int32)) + block * STATES, block


@triton.jit
def _each(word, BLOCK: tl.constexpr):
    """Each element's word."""
    return tl.reshape(tl.broadcast_to(word[:, None], (BLOCK // _CODES, _CODES)), (BLOCK,))


@triton.jit
def load_q8(
    row, layouts, index, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes; RATES has a bit for each state that is a rate."""
    words, block = _words_at(row, index, STATES, BLOCK)
    state = ()
    for k in tl.static_range(STATES):
        word = tl.load(words + k, mask=block * _CODES < numel, other=5)
        if (RATES >> k) & 1:
            code = load(_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
            each = _each(word, BLOCK)
            bits = (each & 0x7FFFFFE0) + (code << (each & 31))
            bits = tl.where((code == 255) & (each < 0), 0x7FC00000, bits)
            state = state + (bits.to(tl.float32, bitcast=True),)
        else:
            code = load(_at(row, layouts, index, k, tl.int8, ALIGN, STRIDED), index < numel, MASKED).to(tl.int32)
            span = tl.full(word.shape, _SPAN, tl.float32)
            unit = _each(divide((word & 0x7FFFFFFF).to(tl.float32, bitcast=True), span), BLOCK)
            y = (0x3F800000 + (tl.abs(code) << _MEAN_SHIFT)).to(tl.float32, bitcast=True)
            value = (y - 1.0) * unit
            value = tl.where(code < 0, -value, value)
            state = state + (tl.where((code == -128) & (_each(word, BLOCK) < 0), float("nan"), value),)
    return state


@triton.jit
def store_q8(
    row, layouts, index, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in 8-bit codes, rounded stochastically; RATES has a bit for each state that is a rate."""
    words, block = _words_at(row, index, STATES, BLOCK)
    random = _random_bits(noise, index, _STATE_NOISE)
    for k in tl.static_range(STATES):
        bits = state[k].to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        number = state[k] == state[k]
        counts = number & (index < numel)
        high = _max_of_blocks(tl.where(counts, magnitude, 0), BLOCK)
        has_nan = _max_of_blocks(tl.where(number | (index >= numel), 0, 1), BLOCK) << 31
        if (RATES >> k) & 1:
            low = 0x7FFFFFFF - _max_of_blocks(tl.where(counts, 0x7FFFFFFF - magnitude, 0), BLOCK)
            word = _rate_word(tl.minimum(low, high), high)
            each = _each(word, BLOCK)
            step = each & 31
            raised = bits - (each & -32) + (random >> (32 - step).to(tl.uint32)).to(tl.int32)
            code = tl.where(number, raised >> step, 255).to(tl.uint8)
            store(_at(row, layouts, index, k, tl.uint8, ALIGN, STRIDED), code, index < numel, MASKED)
        else:
            word = tl.maximum(high, 0x0D800000)  # 2^-100
            span = tl.full(word.shape, _SPAN, tl.float32)
            per_unit = _each(divide(span, word.to(tl.float32, bitcast=True)), BLOCK)
            y = tl.where(number, magnitude, 0).to(tl.float32, bitcast=True) * per_unit + 1.0
            raised = y.to(tl.int32, bitcast=True) - 0x3F800000 + (random >> (32 - _MEAN_SHIFT)).to(tl.int32)
            c = raised >> _MEAN_SHIFT
            code = tl.where(number, tl.where(bits < 0, -c, c), -128).to(tl.int8)
            store(_at(row, layouts, index, k, tl.int8, ALIGN, STRIDED), code, index < numel, MASKED)
        tl.store(words + k, word | has_nan, mask=block * _CODES < numel)


@triton.jit
def _max_of_blocks(x, BLOCK: tl.constexpr):
    return tl.max(tl.reshape(x, (BLOCK // _CODES, _CODES)), axis=1)


@triton.jit
def _rate_word(low, high):
    """The finest steps of 2^k in which a block's range fits, even rounded up, and its base."""
    # The length in bits, by the exponent of a float32 that holds them exactly.
    length = tl.maximum((((high - low) >> 13).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)
    k = 5 + length
    one = tl.full(k.shape, 1, tl.int32)
    k = tl.where(((high - ((low >> k) << k) + (one << k) - 1) >> k) > 254, k + 1, k)
    return ((low >> k) << k) | k


#: format -> (load, store)
FORMATS = {"fp32": (load_fp32, store_fp32), "bf16": (load_bf16, store_bf16), "q8": (load_q8, store_q8)}
