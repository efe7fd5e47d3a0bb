"""Arithmetic that plain torch does not promise."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def fma(x: Tensor | float, y: Tensor | float, z: Tensor | float) -> Tensor:
    """x * y + z: of float32 rounded once, as processors do it in one operation; of float64 after each operation.

    Args:
        x, y, z: float32 or float64; at least one is a tensor, and numbers count as of its dtype.

    Returns:
        That, of the same dtype. Where torch does not fuse, and has no float64 to do it with, float32 is rounded twice.
    """
    tensor = next(value for value in (x, y, z) if isinstance(value, Tensor))
    x, y, z = (_as_tensor(value, tensor) for value in (x, y, z))
    if tensor.dtype == torch.float64:
        return x * y + z
    if isinstance(tensor, FakeTensor) or _is_fused(tensor.device):  # the former have no values, maybe no device
        return torch.addcmul(z, x, y)
    return x * y + z if tensor.device.type == "mps" else fma_of_float64(x, y, z)


def fma_of_float64(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z of float32, rounded once, by arithmetic in float64."""
    product, addend = x.double() * y.double(), z.double()  # exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact (Knuth's)
    # Where bits are lost, the last that is left is made odd (Boldo and Melquiond), so that rounding to float32 is as if
    # they were there.
    bits = total.view(torch.int64)
    lost = (error.abs() > 0) & (bits & 1 == 0)  # not where it is NaN
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + torch.where(lost, outwards, 0)).view(torch.float64).float()


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


@lru_cache
def _is_fused(device: torch.device) -> bool:
    """Whether torch.addcmul rounds once there, whatever strides: with FMA it does, but torch says so nowhere."""
    # 1 - i^2 has more digits than float32.
    i = torch.arange(1, 135, 2, dtype=torch.float32, device="cpu") * 2.0**-13
    x, y, z = ((1 + i).to(device), (1 - i).to(device), torch.full_like(i, -1.0).to(device))
    wanted = -i * i
    apart = torch.addcmul(z[::2], x[::2], y[::2])
    return torch.equal(torch.addcmul(z, x, y).cpu(), wanted) and torch.equal(apart.cpu(), wanted[::2])
