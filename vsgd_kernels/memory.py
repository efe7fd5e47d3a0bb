"""What training takes in bytes: `python -m vsgd_kernels memory --params 7e9 --dtype bf16`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from .formats import MASTER_WEIGHTS, is_16_bit, low_dtype
from .rules import VSGD, Rule, arithmetic_dtype
from .state_formats import FORMATS, SMALLEST, bytes_of, format_for


class Usage(NamedTuple):
    """Bytes of one optimizer on one model.

    Attributes:
        optimizer: what it is called.
        params, grads: of the parameters and their gradients.
        states: of the optimizer's states, their blocks included; and of the variance of samples, but not
            of their mean, which `SampleVSGD.accumulate` keeps.
        masters: of what completes 16-bit parameters to masters.
    """

    optimizer: str
    params: float
    grads: float
    states: float
    masters: float

    @property
    def total(self) -> float:
        """Of all."""
        return self.params + self.grads + self.states + self.masters


def usage(model: Module | Iterable[Tensor], rule: Rule = VSGD) -> list[Usage]:
    """What a model takes with this package's optimizers, by state format and masters, and with AdamW.

    Args:
        model: the model or its parameters; those on the meta device count too, and of frozen ones only the parameters.
        rule: of the optimizer.

    Returns:
        A `Usage` for each state format, and where parameters have 16 bits each `master_weights`; for AdamW with states
        in the parameters' dtype, as torch keeps them, and where parameters have 16 bits for one of float32 masters; and
        for AdamW with 8-bit states in blocks of 256 (bitsandbytes' layout: 1 byte, and a float32 each block and state).
    """
    params = list(model.parameters() if isinstance(model, Module) else model)
    frozen = sum(param.numel() * param.itemsize for param in params if not param.requires_grad)
    rows = _usage([(param.dtype, param.numel()) for param in params if param.requires_grad], rule)
    return [row._replace(params=row.params + frozen) for row in rows]


def usage_of_count(params: float, dtype: torch.dtype, rule: Rule = VSGD) -> list[Usage]:
    """As `usage`, for a number of parameters of one dtype, in one tensor."""
    return _usage([(dtype, params)], rule)


def _usage(tensors: list[tuple[torch.dtype, float]], rule: Rule) -> list[Usage]:
    own = sum(dtype.itemsize * n for dtype, n in tensors)
    rows = []
    for name in FORMATS:
        states = sum(_state_bytes(name, rule, dtype, n) * n for dtype, n in tensors)
        if rule.samples:
            states += sum(arithmetic_dtype(dtype).itemsize * n for dtype, n in tensors)
        for kind, masters in _masters(tensors).items():
            rows.append(Usage(f"{rule.title}, {name}{kind}", own, own, states, masters))
    eight_bit = sum(2 * (1 + 4 / 256 if n >= SMALLEST else dtype.itemsize) * n for dtype, n in tensors)
    rows.append(Usage("AdamW", own, own, 2 * own, 0))
    if any(is_16_bit(dtype) for dtype, _ in tensors):
        wide = sum(arithmetic_dtype(dtype).itemsize * n for dtype, n in tensors)
        rows.append(Usage("AdamW, fp32 masters", own, own, 2 * wide, sum(4 * n for d, n in tensors if is_16_bit(d))))
    return [*rows, Usage("AdamW, 8-bit", own, own, eight_bit, 0)]


def _masters(tensors: list[tuple[torch.dtype, float]]) -> dict[str, float]:
    """Bytes by `master_weights`; one entry where there are none to choose from."""
    sizes: dict[str, float] = {}
    for kind in MASTER_WEIGHTS:
        lows = [(low_dtype(kind, dtype), n) for dtype, n in tensors]
        sizes[f", {kind}"] = sum(dtype.itemsize * n for dtype, n in lows if dtype)
    return sizes if any(sizes.values()) else {"": 0.0}


def _state_bytes(name: str, rule: Rule, dtype: torch.dtype, n: float) -> float:
    coded = format_for(name, dtype, n) != "fp32"
    return bytes_of(name, rule) if coded else len(rule.states) * arithmetic_dtype(dtype).itemsize


def as_text(rows: list[Usage]) -> str:
    """The rows as a table, in GB of 10^9 bytes, or for small models MB or kB."""
    largest = max(row.total for row in rows)
    unit, size_of_unit = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= s or u == "kB")
    total = f"total {unit}"
    lines = [f"{'':24}{'parameters':>12}{'gradients':>12}{'states':>12}{'masters':>12}{total:>12}"]
    for row in rows:
        sizes = (row.params, row.grads, row.states, row.masters, row.total)
        lines.append(f"{row.optimizer:24}" + "".join(f"{size / size_of_unit:12.3f}" for size in sizes))
    return "\n".join(lines)
