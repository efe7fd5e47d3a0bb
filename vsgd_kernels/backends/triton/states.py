"""How states are stored, for Triton (``vsgd_kernels/state_formats.py`` says what the formats are).

A format is a pair of functions that the kernel takes as constexpr: one loads the states of a block of elements, as
numbers, the other stores them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import packed16, q8
from .access import load, state_at, store
from .formats import bits_of_bf16
from .noise import state_noise


@triton.jit
def load_fp32(
    row, layouts, first, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in arithmetic dtype."""
    index = first + tl.arange(0, BLOCK)
    state = ()
    for k in tl.static_range(STATES):
        at = state_at(row, layouts, index, k, ARITHMETIC, ALIGN, STRIDED)
        state = state + (load(at, index < numel, MASKED),)
    return state


@triton.jit
def store_fp32(
    row, layouts, first, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States in arithmetic dtype."""
    index = first + tl.arange(0, BLOCK)
    for k in tl.static_range(STATES):
        store(state_at(row, layouts, index, k, ARITHMETIC, ALIGN, STRIDED), state[k], index < numel, MASKED)


@triton.jit
def load_bf16(
    row, layouts, first, numel, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States that are the upper half of a float32."""
    index = first + tl.arange(0, BLOCK)
    state = ()
    for k in tl.static_range(STATES):
        stored = load(state_at(row, layouts, index, k, tl.bfloat16, ALIGN, STRIDED), index < numel, MASKED)
        state = state + (bits_of_bf16(stored).to(tl.float32, bitcast=True),)
    return state


@triton.jit
def store_bf16(
    row, layouts, first, numel, state, noise, MASKED: tl.constexpr, RATES: tl.constexpr, STATES: tl.constexpr,
    ARITHMETIC: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States that are the upper half of a float32, rounded stochastically."""
    index = first + tl.arange(0, BLOCK)
    random = state_noise(noise, first, BLOCK) >> 16
    for k in tl.static_range(STATES):
        bits = state[k].to(tl.uint32, bitcast=True)
        code = tl.where(state[k] != state[k], 0x7FC0, (bits + random) >> 16)
        stored = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        store(state_at(row, layouts, index, k, tl.bfloat16, ALIGN, STRIDED), stored, index < numel, MASKED)


#: format -> (load, store)
FORMATS = {
    "fp32": (load_fp32, store_fp32),
    "bf16": (load_bf16, store_bf16),
    "q8": (q8.load_states, q8.store_states),
    "packed16": (packed16.load_states, packed16.store_states),
}
