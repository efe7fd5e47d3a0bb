"""How parameters are stored, in plain torch (``csrc/formats.h`` is the same in C++).

A 16-bit parameter has a companion ``low``, 16 bits of what its rounding to 16 bits left over, so that it trains as the
float32 master that both make up: a small update is kept until it adds up to a visible one. Whoever overwrites the
parameter overwrites the master with it, to half a unit in the parameter's last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: dtype of `low`
LOW_DTYPE = torch.int16


def has_low(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype have a `low`."""
    return dtype in (torch.bfloat16, torch.float16)


def empty_low(param: Tensor) -> Tensor:
    """An uninitialised `low` of a 16-bit parameter: its shape, layout and device, int16."""
    return torch.empty_like(param, dtype=LOW_DTYPE, requires_grad=False)


def load_param(param: Tensor, low: Tensor | None) -> Tensor:
    """The master of a parameter, in arithmetic dtype."""
    if low is None:
        return param
    if param.dtype == torch.bfloat16:
        # bf16 is the upper half of a float32, and low the signed distance of the bits; from a zero that somebody has
        # written there is none to take.
        bits = param.view(torch.int16).to(torch.int32) << 16
        magnitude = (bits & 0x7FFFFFFF) + torch.where(param.isfinite(), low.int(), 0)
        return magnitude.clamp(min=0).view(torch.float32).copysign(param.float())
    return param.float() + torch.where(param.isfinite(), low * _fraction_of_ulp(param), 0.0)


def store_param(param: Tensor, low: Tensor | None, master: Tensor) -> None:
    """Writes a master to a parameter and its `low`, in place."""
    if low is None:
        param.copy_(master)
    elif param.dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        # Ties go up, for the distance then fits 16 bits: -32768 ... 32767.
        high = torch.where(master.isnan(), bits | 0x400000, bits + 0x8000) >> 16
        low.copy_(torch.where(master.isnan(), 0, bits - (high << 16)))
        param.copy_(high.to(torch.int16).view(torch.bfloat16))
    else:
        # low counts 65,536ths of the unit in the last place. From 2^-14 on that holds every float32 exactly; below, it
        # is a fixed point of 2^-40.
        param.copy_(master)
        rest = ((master - param.float()) / _fraction_of_ulp(param)).clamp(max=32767.0).round()
        low.copy_(torch.where(param.isfinite(), rest, 0.0))


def _fraction_of_ulp(param: Tensor) -> Tensor:
    """2^-16 of the unit in the last place of each fp16 element."""
    exponent = (param.view(torch.int16).to(torch.int32) >> 10 & 31).clamp(min=1)
    return ((exponent + 86) << 23).view(torch.float32)
