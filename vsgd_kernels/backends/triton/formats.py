"""How parameters are stored, for Triton (``vsgd_kernels/formats.py`` says what the formats are)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x, ARITHMETIC: tl.constexpr):
    """A parameter or gradient in arithmetic dtype, exactly; Triton's interpreter loses bf16's subnormals."""
    if x.dtype == tl.bfloat16:
        return bits_of_bf16(x).to(tl.float32, bitcast=True)
    else:
        return x.to(ARITHMETIC)


@triton.jit
def load_param(stored, low):
    """The master of a parameter, in arithmetic dtype; `low` counts for 16-bit parameters only."""
    if stored.dtype == tl.bfloat16:
        bits = bits_of_bf16(stored)
        high = bits & 0x7FFFFFFF
        # From a zero that somebody has written there is none to take.
        magnitude = tl.maximum(high + tl.where(high < 0x7F800000, low, 0), 0)
        return (magnitude | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.float16:
        rest = low.to(tl.float32) * _fraction_of_ulp(stored)
        return stored.to(tl.float32) + tl.where(_finite(stored), rest, 0.0)
    else:
        return stored


@triton.jit
def stored_param(master, PARAM: tl.constexpr):
    """The parameter, of dtype PARAM, that is stored of a master; `low_of` is the rest."""
    if PARAM == tl.bfloat16:
        bits = master.to(tl.int32, bitcast=True)
        high = tl.where(master != master, bits | 0x400000, bits + 0x8000) >> 16
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return master.to(PARAM)


@triton.jit
def low_of(master, stored):
    """What the rounding of a master to a 16-bit parameter left over."""
    if stored.dtype == tl.bfloat16:
        rest = master.to(tl.int32, bitcast=True) - bits_of_bf16(stored)
        return tl.where(master != master, 0, rest).to(tl.int16)
    else:
        # Exact, and 2^16 of the fractions are one unit: dividing by a power of two is exact too.
        rest = tl.minimum((master - stored.to(tl.float32)) / _fraction_of_ulp(stored), 32767.0)
        # To nearest, by the last place of 1.5 2^23.
        low = (rest + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        return tl.where(_finite(stored), low, 0).to(tl.int16)


@triton.jit
def bits_of_bf16(x):
    """The float32 of which a bf16 is the upper half, as int32."""
    return x.to(tl.uint16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _finite(stored):
    return (stored.to(tl.uint16, bitcast=True) & 0x7C00) != 0x7C00


@triton.jit
def _fraction_of_ulp(stored):
    """2^-16 of the unit in the last place of each fp16 element."""
    exponent = (stored.to(tl.uint16, bitcast=True).to(tl.int32) >> 10) & 31
    return ((tl.maximum(exponent, 1) + 86) << 23).to(tl.float32, bitcast=True)
