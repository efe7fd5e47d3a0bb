"""Arithmetic that plain torch has not."""

from __future__ import annotations

import torch
from torch import Tensor


def fma(x: Tensor | float, y: Tensor | float, z: Tensor | float) -> Tensor:
    """x * y + z: of float32 rounded once, as processors do it in one operation; of float64 after each operation.

    Args:
        x, y, z: float32 or float64; at least one is a tensor, and numbers count as of its dtype.

    Returns:
        That, of the same dtype. On a device that has no float64, float32 is rounded twice.
    """
    tensor = next(value for value in (x, y, z) if isinstance(value, Tensor))
    if tensor.dtype == torch.float64 or tensor.device.type == "mps":
        return torch.as_tensor(x * y + z)
    product, addend = _double(x) * _double(y), _double(z)  # exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact (Knuth's)
    # Where bits are lost, the last that is left is made odd (Boldo and Melquiond), so that rounding to float32 is as if
    # they were there.
    bits = total.view(torch.int64)
    lost = (error.abs() > 0) & (bits & 1 == 0)  # not where it is NaN
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + torch.where(lost, outwards, 0)).view(torch.float64).float()


def _double(value: Tensor | float) -> Tensor:
    """A float32, exactly."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float32, device="cpu")
    return value.double()
