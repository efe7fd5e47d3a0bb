"""How parameters are stored, in plain torch (``csrc/formats.h`` is the same in C++).

A 16-bit parameter trains as the float32 master of which it is the visible part, so that a small update is kept until it
adds up to a visible one. A master is a sign and a code of 31 bits. For bf16 the code is float32's own bits; for fp16 it
is fp16's bits with 16 more of fraction, which holds every float32 exactly from 2^-14 on and is a fixed point of 2^-40
below. The parameter is the nearest upper 16 bits, and its companion ``low`` the signed rest, in as many bits as
`master_weights` keeps: 16 ("exact"), 8 ("split8"), or none. The bits below those are rounded stochastically, without
bias, so that small updates add up on average. Inf is where the nearest 16-bit value is: random bits make none.

Whoever overwrites the parameter overwrites the master with it, to half a unit in the parameter's last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MASTER_NOISE, Noise
from .state_formats import from_memory_order


class _Unasked(str):
    """A value that can be told from the same value that somebody has asked for."""

    __slots__ = ()


#: What `master_weights` may be, with the dtype of `low`.
MASTER_WEIGHTS: dict[str | None, torch.dtype | None] = {"exact": torch.int16, "split8": torch.int8, None: None}
#: `master_weights` where nobody asks for it; not refused where no parameter has 16 bits.
DEFAULT_MASTER_WEIGHTS = _Unasked("exact")

#: Of the upper 16 bits, without the sign.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def is_16_bit(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype have masters of more bits than their own."""
    return dtype in _INFINITY


def low_dtype(master_weights: str | None, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the `low` of parameters of `dtype`, or None where they have none."""
    return MASTER_WEIGHTS[master_weights] if is_16_bit(dtype) else None


def extra_bits(low: Tensor | None) -> int:
    """By how many bits a master is longer than its parameter."""
    return 0 if low is None else 8 * low.element_size()


def converted_low(param: Tensor, low: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A `low` of another dtype, for the parameter as it is: rounded to nearest where bits are lost, 0 where none were.

    It has the parameter's shape, layout and device, whatever those of `low`, and shares nothing with it.
    """
    if dtype is None:
        return None
    new = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if low is None:
        return new.zero_()
    shift = extra_bits(new) - extra_bits(low)
    wide = low.int() << shift if shift >= 0 else (low.int() + (1 << -shift >> 1)) >> -shift
    return new.copy_(wide.clamp(max=torch.iinfo(dtype).max))


def master_noise(noise: Noise, states: tuple[Tensor, ...]) -> Tensor:
    """32 random bits for each element's master, int64, of the states' shape."""
    flat = noise.bits(states[0].numel(), states[0].device, MASTER_NOISE)
    return from_memory_order(flat, states[0])


def load_param(param: Tensor, low: Tensor | None) -> Tensor:
    """The master of a parameter, in arithmetic dtype."""
    if not is_16_bit(param.dtype):
        return param
    bits = param.view(torch.int16).int()
    high = (bits & 0x7FFF) << 16
    if low is not None:
        # Of a zero that somebody has written, low takes nothing away.
        rest = low.int() << (16 - extra_bits(low))
        high = (high + torch.where(param.isfinite(), rest, 0)).clamp(min=0)
    return (_magnitude(param.dtype, high) | (bits & ~0x7FFF) << 16).view(torch.float32)


def store_param(param: Tensor, low: Tensor | None, master: Tensor, random: Tensor | None) -> None:
    """Writes a master to a parameter and its `low`, in place.

    Args:
        param: a parameter.
        low: its `low`, or None where there is none.
        master: its new value, in arithmetic dtype.
        random: `master_noise`, used where bits are lost.
    """
    if not is_16_bit(param.dtype):
        param.copy_(master)
        return
    extra = extra_bits(low)
    infinity = _INFINITY[param.dtype]
    overflow = (infinity << 16) - 0x8000  # half a unit beyond the largest number
    code = _code(param.dtype, master)
    up = 0 if random is None else (random >> 16 >> extra).int()
    rounded = (code + up).clamp(max=overflow - 1) & -(1 << (16 - extra))
    # Ties go up, for the rest then fits its bits: -32768 ... 32767.
    high = (rounded + 0x8000) & -0x10000
    rest = rounded - high
    beyond = torch.where(master.isnan(), _NAN[param.dtype], infinity) << 16
    bits = torch.where(code < overflow, high, beyond) | (master.view(torch.int32) & ~0x7FFFFFFF)
    param.copy_((bits >> 16).to(torch.int16).view(param.dtype))
    if low is not None:
        low.copy_(torch.where(code < overflow, rest, 0) >> (16 - extra))


def _code(dtype: torch.dtype, master: Tensor) -> Tensor:
    """The code of a float32's magnitude, int32; for NaN and all beyond that of Inf."""
    magnitude = master.view(torch.int32) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        return magnitude.clamp(max=0x7F800000)
    small = magnitude < 0x38800000  # 2^-14
    fixed = torch.where(small, magnitude, 0).view(torch.float32) * 2.0**40
    fixed = fixed + torch.where(fixed < 2.0**23, 0.5, 0.0)  # to nearest; what is larger is whole
    return torch.where(small, fixed.int(), (magnitude.clamp(max=0x47800000) - 0x38000000) << 3)


def _magnitude(dtype: torch.dtype, code: Tensor) -> Tensor:
    """The bits of the float32 that a code stands for, int32."""
    if dtype == torch.bfloat16:
        return code
    fixed = (code.float() * 2.0**-40).view(torch.int32)
    number = torch.where(code < 0x04000000, fixed, (code >> 3) + 0x38000000)
    return torch.where(code < 0x7C000000, number, (code >> 3) | 0x7F800000)
