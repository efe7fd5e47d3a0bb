"""The Triton kernel that adds samples to their means and variances: all tensors of a launch, a dtype at a time.

As in kernel.py, a program takes one chunk of one tensor, and only a tensor's last block is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..table import SAMPLE_COLUMNS
from .access import entry, load, offsets_in, pointer, store
from .formats import widen
from .rules import bounded, fma

WIDTH = tl.constexpr(len(SAMPLE_COLUMNS))
MEAN, VARIANCE, NUMEL, LAYOUT, SAMPLES, STRIDE = (
    tl.constexpr(SAMPLE_COLUMNS.index(name)) for name in ("mean", "variance", "numel", "layout", "added", "stride")
)


@triton.jit
def add_kernel(
    rows,  # [tensors, SAMPLE_COLUMNS] int64: see table.py
    samples,  # [tensors] int64: addresses of the first of them
    counts,  # [tensors] int64: how many there were before
    layouts,  # int64 records, for STRIDED
    chunk_tensor,  # [programs] int32: the tensor that a program's chunk belongs to
    first_chunk,  # [tensors] int64: the number of the tensor's first chunk
    SAMPLE: tl.constexpr,  # dtype of the samples
    ARITHMETIC: tl.constexpr,  # dtype of means and variances
    BIG: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes; what every address is a multiple of
    STRIDED: tl.constexpr,  # whether samples run over memory in another order than their means
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds the samples to chunk `program_id` of all tensors' chunks."""
    program = tl.program_id(0)
    tensor = entry(chunk_tensor + program).to(tl.int64)
    row = rows + tensor * WIDTH
    first_sample = entry(samples + tensor)
    count = entry(counts + tensor)
    numel = entry(row + NUMEL)
    start = (program - entry(first_chunk + tensor)) * CHUNK
    end = tl.minimum(start + CHUNK, numel)
    for i in range((end - start) // BLOCK):
        _block(row, first_sample, count, layouts, start + i * BLOCK, numel, False, SAMPLE, ARITHMETIC, BIG, ALIGN,
               STRIDED, BLOCK)  # fmt: skip
    if (end - start) % BLOCK != 0:
        _block(row, first_sample, count, layouts, end // BLOCK * BLOCK, numel, True, SAMPLE, ARITHMETIC, BIG, ALIGN,
               STRIDED, BLOCK)  # fmt: skip


@triton.jit
def _block(
    row, first_sample, count, layouts, first, numel, MASKED: tl.constexpr, SAMPLE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BIG: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds samples to elements [first, first + BLOCK) of a tensor, as far as there are any."""
    index = first + tl.arange(0, BLOCK)
    mask = index < numel
    at_mean = pointer(entry(row + MEAN), ARITHMETIC, ALIGN) + index
    at_variance = pointer(entry(row + VARIANCE), ARITHMETIC, ALIGN) + index
    offsets = index
    if STRIDED:
        offsets = offsets_in(layouts + entry(row + LAYOUT), index, 1)
    mean = tl.zeros([BLOCK], ARITHMETIC)
    variance = tl.zeros([BLOCK], ARITHMETIC)
    if count > 0:
        mean = load(at_mean, mask, MASKED)
    if count > 1:
        variance = load(at_variance, mask, MASKED)
    stride = entry(row + STRIDE) * (SAMPLE.primitive_bitwidth // 8)
    added = entry(row + SAMPLES)
    for k in range(added):
        at = pointer(first_sample + k * stride, SAMPLE, ALIGN) + offsets
        ghat = bounded(widen(load(at, mask, MASKED), ARITHMETIC), BIG)
        mean, variance = add_sample(mean, variance, ghat, count + k + 1, ARITHMETIC)
    store(at_mean, mean, mask, MASKED)
    if count + added > 1:
        store(at_variance, variance, mask, MASKED)


@triton.jit
def add_sample(mean, variance, ghat, n, ARITHMETIC: tl.constexpr):
    """Mean and variance of n samples, of which ghat is the last and the others have these (Welford); of none, 0."""
    own = (1.0 / n.to(tl.float64)).to(ARITHMETIC)
    kept = (1.0 - own.to(tl.float64)).to(ARITHMETIC)
    d = ghat - mean
    new_mean = fma(own, d, mean)
    new_variance = kept * fma(own * d, d, variance)
    return tl.where(n == 1, ghat, new_mean), tl.where(n == 1, 0.0, new_variance)
