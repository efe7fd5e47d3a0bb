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
    """The master of a parameter, in arithmetic dtype; `low` is the rest, in 65,536ths of a unit in the last place."""
    if stored.dtype == tl.bfloat16 or stored.dtype == tl.float16:
        BF16: tl.constexpr = stored.dtype == tl.bfloat16
        INFINITY: tl.constexpr = 0x7F800000 if BF16 else 0x7C000000
        bits = stored.to(tl.uint16, bitcast=True).to(tl.int32)
        high = (bits & 0x7FFF) << 16
        # Of a zero that somebody has written, low takes nothing away.
        code = tl.maximum(high + tl.where(high < INFINITY, low, 0), 0)
        return (_magnitude(code, BF16) | ((bits & 0x8000) << 16)).to(tl.float32, bitcast=True)
    else:
        return stored


@triton.jit
def stored_param(master, random, PARAM: tl.constexpr, EXTRA: tl.constexpr):
    """The parameter, of dtype PARAM, that is stored of a master, and the rest, of which `low` keeps EXTRA bits."""
    if PARAM == tl.bfloat16 or PARAM == tl.float16:
        BF16: tl.constexpr = PARAM == tl.bfloat16
        INFINITY: tl.constexpr = 0x7F800000 if BF16 else 0x7C000000
        NAN: tl.constexpr = 0x7FC00000 if BF16 else 0x7E000000
        OVERFLOW: tl.constexpr = INFINITY - 0x8000  # half a unit beyond the largest number
        bits = master.to(tl.int32, bitcast=True)
        code = _code(bits & 0x7FFFFFFF, BF16)
        rounded = code
        if EXTRA < 16:
            rounded = code + (random >> (16 + EXTRA)).to(tl.int32)
        rounded = tl.minimum(rounded, OVERFLOW - 1) & -(1 << (16 - EXTRA))
        # Ties go up, for the rest then fits its bits: -32768 ... 32767.
        high = (rounded + 0x8000) & -0x10000
        rest = rounded - high
        finite = code < OVERFLOW
        bits = tl.where(finite, high, tl.where(master == master, INFINITY, NAN)) | (bits & -0x80000000)
        return (bits >> 16).to(tl.uint16).to(PARAM, bitcast=True), tl.where(finite, rest, 0)
    else:
        return master, 0


@triton.jit
def _code(magnitude, BF16: tl.constexpr):
    """The code of a float32's magnitude; for NaN and all beyond that of Inf."""
    if BF16:
        return tl.minimum(magnitude, 0x7F800000)
    else:
        small = magnitude < 0x38800000  # 2^-14
        fixed = tl.where(small, magnitude, 0).to(tl.float32, bitcast=True) * 1099511627776.0  # 2^40
        fixed = fixed + tl.where(fixed < 8388608.0, 0.5, 0.0)  # to nearest; what is larger is whole
        return tl.where(small, fixed.to(tl.int32), (tl.minimum(magnitude, 0x47800000) - 0x38000000) << 3)


@triton.jit
def _magnitude(code, BF16: tl.constexpr):
    """The bits of the float32 that a code stands for."""
    if BF16:
        return code
    else:
        fixed = (code.to(tl.float32) * 9.094947017729282e-13).to(tl.int32, bitcast=True)  # 2^-40
        number = tl.where(code < 0x04000000, fixed, (code >> 3) + 0x38000000)
        return tl.where(code < 0x7C000000, number, (code >> 3) | 0x7F800000)


@triton.jit
def bits_of_bf16(x):
    """The float32 of which a bf16 is the upper half, as int32."""
    return x.to(tl.uint16, bitcast=True).to(tl.int32) << 16
