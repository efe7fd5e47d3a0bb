"""How the kernels reach memory: tables, and the elements of a tensor on each path."""

from __future__ import annotations

import triton
import triton.language as tl

from ..table import COLUMNS, FIRST_STATE

WIDTH = tl.constexpr(len(COLUMNS))
OPERAND_STATE = tl.constexpr(FIRST_STATE)
PARAM, LOW, STEP, NUMEL, GROUP, LAYOUT, BLOCKS, KEY, SEED, PLACE, VARIANCE, STATE = (
    tl.constexpr(COLUMNS.index(name))
    for name in (
        *("param", "low", "step", "numel", "group", "layout", "blocks", "key"),
        *("seed", "place", "variance", "state0"),
    )
)


@triton.jit
def entry(at):
    """An entry of a table: unlike a tensor's elements, many programs read it."""
    # Addresses are read anew for each block: kept from block to block, they take the registers of eight warps.
    return tl.load(at, eviction_policy="evict_last")


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer to an address of which it is known that ALIGN divides it."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGN)


@triton.jit
def offsets_of(row, layouts, index, operand: tl.constexpr, STRIDED: tl.constexpr):
    """Where elements `index` of an operand are: there, or where its strides in the layout record say."""
    if STRIDED:
        return offsets_in(layouts + entry(row + LAYOUT), index, operand)
    else:
        return index


@triton.jit
def offsets_in(record, index, operand: tl.constexpr):
    """Where elements `index` of an operand are by the strides in a layout record."""
    dims = entry(record)
    offsets = tl.zeros_like(index)
    d = dims
    while d > 0:
        size = entry(record + d)
        offsets += index % size * entry(record + d + dims * (operand + 1))
        index = index // size
        d -= 1
    return offsets


# The hint on the masked path changes next to nothing at run time; it tells the paths apart in the machine code.
@triton.jit
def load(at, mask, MASKED: tl.constexpr):
    """Elements of a tensor; where they are masked out, 1."""
    if MASKED:
        return tl.load(at, mask=mask, other=1.0, eviction_policy="evict_first")
    else:
        return tl.load(at)


@triton.jit
def store(at, value, mask, MASKED: tl.constexpr):
    """Writes elements of a tensor."""
    if MASKED:
        tl.store(at, value, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(at, value)


@triton.jit
def state_at(row, layouts, index, k: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr, STRIDED: tl.constexpr):
    """Where elements of the k-th of the tensors are that hold the states."""
    offsets = offsets_of(row, layouts, index, OPERAND_STATE + k, STRIDED)
    return pointer(entry(row + STATE + k), dtype, ALIGN) + offsets
