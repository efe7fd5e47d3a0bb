"""The Triton kernels: all tensors of a launch, a rule and a dtype at a time.

A program of `step_kernel` steps one chunk of one tensor. Blocks that lie wholly inside the tensor take a path without
masks, whose addresses are known to be aligned, so that it compiles to 128-bit loads and stores; only a tensor's last
block is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import access
from .access import entry, load, offsets_of, pointer, store
from .formats import load_param, stored_param, widen
from .noise import master_noise, noise_of
from .philox import random_words
from .rules import bounded, bounded_variance


@triton.jit
def count_kernel(
    rows,  # [tensors, COLUMNS] int64: see table.py
    hyper,  # [groups, HYPERS] float64
    scalars,  # [tensors, SCALARS] of ARITHMETIC, written
    found_inf,  # [1] float32, or None; where it is not 0, no step is counted
    tensors,
    SCALARS_OF: tl.constexpr,  # the rule's scalars
    HYPERS: tl.constexpr,
    SCALARS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TINY: tl.constexpr,
    BIG: tl.constexpr,
    TENSORS: tl.constexpr,  # that a program counts
):
    """Counts a step of every tensor, and computes its scalars."""
    tensor = tl.program_id(0).to(tl.int64) * TENSORS + tl.arange(0, TENSORS)
    mask = tensor < tensors
    row = rows + tensor * access.WIDTH
    step = tl.load(row + access.STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    taken = tl.load(step, mask=mask, other=0.0)
    t = taken + 1.0
    group = tl.load(row + access.GROUP, mask=mask, other=0)
    h = ()
    for i in tl.static_range(HYPERS):
        h = h + (tl.load(hyper + group * HYPERS + i, mask=mask, other=1.0),)
    s = SCALARS_OF(t.to(tl.float64), h, TINY, BIG, ARITHMETIC)
    for i in tl.static_range(SCALARS):
        tl.store(scalars + tensor * SCALARS + i, s[i].to(ARITHMETIC), mask=mask)
    if found_inf is not None:
        t = tl.where(tl.load(found_inf) != 0.0, taken, t)
    tl.store(step, t, mask=mask)


# A step's scalars follow those of the step before, wherever these end.
@triton.jit(do_not_specialize_on_alignment=["scalars"])
def step_kernel(
    rows,  # [tensors, COLUMNS] int64: see table.py
    grads,  # [tensors] int64: addresses of the gradients
    layouts,  # int64 records, for STRIDED
    chunk_tensor,  # [programs] int32: the tensor that a program's chunk belongs to
    first_chunk,  # [tensors] int64: the number of the tensor's first chunk
    scalar_row,  # [tensors] int64: the tensor's row of `scalars`
    scalars,  # [rows, SCALARS] of ARITHMETIC: the scalars of the step; the last is the gradient's sign
    grad_scale,  # [1] float32 that the gradients are divided by, or None
    found_inf,  # [1] float32, or None; where it is not 0, nothing is stepped
    UPDATE: tl.constexpr,  # the rule
    LOAD: tl.constexpr,  # the states' format: see states.py
    STORE: tl.constexpr,
    STATES: tl.constexpr,
    STORED: tl.constexpr,  # tensors that hold the states
    RATES: tl.constexpr,  # a bit for each state that is a rate
    DRAWS: tl.constexpr,  # whether the rule takes random bits
    SAMPLES: tl.constexpr,  # whether the rule takes a variance of samples
    SCALARS: tl.constexpr,
    EXTRA: tl.constexpr,  # bits of `low`: 16, 8, or 0 where there is none
    PARAM: tl.constexpr,  # dtype of parameters and gradients
    ARITHMETIC: tl.constexpr,  # dtype of scalars, and of what is computed
    TINY: tl.constexpr,
    BIG: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes; what every address is a multiple of
    STRIDED: tl.constexpr,  # whether the operands run over memory in different orders
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Steps chunk `program_id` of all tensors' chunks."""
    if found_inf is not None:  # noqa: SIM102 (known when it is compiled; what follows is not)
        if entry(found_inf) != 0.0:
            return
    program = tl.program_id(0)
    tensor = entry(chunk_tensor + program).to(tl.int64)
    row = rows + tensor * access.WIDTH
    gradient = entry(grads + tensor)
    s = ()
    for i in tl.static_range(SCALARS):
        s = s + (entry(scalars + entry(scalar_row + tensor) * SCALARS + i),)
    factor = s[SCALARS - 1]
    if grad_scale is not None:
        factor = factor / entry(grad_scale).to(ARITHMETIC)
    t = s[SCALARS - 2]
    noise = noise_of(row, t)
    numel = entry(row + access.NUMEL)
    start = (program - entry(first_chunk + tensor)) * CHUNK
    end = tl.minimum(start + CHUNK, numel)
    # Apart, so that the one path's registers do not add to the other's.
    for i in range((end - start) // BLOCK):
        _block(row, gradient, layouts, start + i * BLOCK, numel, s, t, factor, noise, False, UPDATE, LOAD, STORE,
               STATES, STORED, RATES, DRAWS, SAMPLES, EXTRA, PARAM, ARITHMETIC, TINY, BIG, ALIGN, STRIDED,
               BLOCK)  # fmt: skip
    if (end - start) % BLOCK != 0:
        _block(row, gradient, layouts, end // BLOCK * BLOCK, numel, s, t, factor, noise, True, UPDATE, LOAD, STORE,
               STATES, STORED, RATES, DRAWS, SAMPLES, EXTRA, PARAM, ARITHMETIC, TINY, BIG, ALIGN, STRIDED,
               BLOCK)  # fmt: skip


@triton.jit
def _block(
    row, gradient, layouts, first, numel, s, t, factor, noise, MASKED: tl.constexpr,
    UPDATE: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr,
    RATES: tl.constexpr, DRAWS: tl.constexpr, SAMPLES: tl.constexpr, EXTRA: tl.constexpr, PARAM: tl.constexpr,
    ARITHMETIC: tl.constexpr, TINY: tl.constexpr, BIG: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps elements [first, first + BLOCK) of a tensor, as far as there are any."""
    index = first + tl.arange(0, BLOCK)
    mask = index < numel
    LOW: tl.constexpr = tl.int8 if EXTRA == 8 else tl.int16

    param = pointer(entry(row + access.PARAM), PARAM, ALIGN) + offsets_of(row, layouts, index, 0, STRIDED)
    grad = pointer(gradient, PARAM, ALIGN) + offsets_of(row, layouts, index, 1, STRIDED)
    stored = load(param, mask, MASKED)
    ghat = bounded(widen(load(grad, mask, MASKED), ARITHMETIC) * factor, BIG)
    rest = 0
    if EXTRA != 0:
        low = pointer(entry(row + access.LOW), LOW, ALIGN) + offsets_of(row, layouts, index, 2, STRIDED)
        rest = load(low, mask, MASKED).to(tl.int32) << (16 - EXTRA)
    theta = load_param(stored, rest)
    state = LOAD(row, layouts, first, numel, MASKED, RATES, STATES, ARITHMETIC, ALIGN, STRIDED, BLOCK)

    if DRAWS:
        extra = random_words(row, first, t, BLOCK)
    elif SAMPLES:
        offsets = offsets_of(row, layouts, index, access.OPERAND_STATE + STORED, STRIDED)
        at = pointer(entry(row + access.VARIANCE), ARITHMETIC, ALIGN) + offsets
        extra = bounded_variance(load(at, mask, MASKED) * factor * factor, BIG)
    else:
        extra = None
    theta, state = UPDATE(theta, ghat, state, s, extra, TINY)

    random = 0
    if (PARAM == tl.bfloat16 or PARAM == tl.float16) and EXTRA < 16:
        random = master_noise(noise, first, BLOCK)
    stored, rest = stored_param(theta, random, PARAM, EXTRA)
    store(param, stored, mask, MASKED)
    if EXTRA != 0:
        store(low, (rest >> (16 - EXTRA)).to(LOW), mask, MASKED)
    STORE(row, layouts, first, numel, state, noise, MASKED, RATES, STATES, ARITHMETIC, ALIGN, STRIDED, BLOCK)
