"""The table of addresses by which a native kernel sees a batch (``csrc/chunks.h`` reads it)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import DTYPES, Batch

#: Columns of a row, all int64: addresses, sizes, indices.
COLUMNS = ("param", "grad", "step", "numel", "dtype", "group", "layout", "state0", "state1", "state2", "state3")
_GRAD = COLUMNS.index("grad")
_STATES = COLUMNS.index("state0")


class Table:
    """A batch as rows of addresses.

    Attributes:
        batch: the batch; it keeps the tensors alive.
        rows: [tensors, COLUMNS] int64 on the CPU.
        layouts: int64 records of those tensors whose operands do not run over the same dense memory; a row's `layout` is
            its record's offset, or -1.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        rows, layouts = array("q"), array("q")
        columns = zip(batch.params, batch.grads, batch.states, batch.steps, batch.groups, strict=True)
        for param, grad, states, step, group in columns:
            record = layout_record(param.shape, [t.stride() for t in (param, grad, *states)])
            rows.extend((param.data_ptr(), grad.data_ptr(), step.data_ptr(), param.numel()))
            rows.extend((DTYPES.index(param.dtype), group, len(layouts) if record else -1))
            rows.extend(state.data_ptr() for state in states)
            rows.extend([0] * (len(COLUMNS) - _STATES - len(states)))
            layouts.extend(record)
        self.rows = _to_tensor(rows).view(-1, len(COLUMNS))
        self.layouts = _to_tensor(layouts)

    def set_grads(self, grads: list[Tensor]) -> None:
        """Takes gradients of the same dtypes, shapes and strides at other addresses."""
        self.batch.grads = grads
        self.rows[:, _GRAD] = _to_tensor(array("q", map(Tensor.data_ptr, grads)))


def layout_record(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The common iteration of several operands of one shape: dimensions, sizes, then each operand's strides.

    Dimensions are ordered by the first operand's strides, the largest first, and merged where all operands allow it.
    Empty where nothing is left but to run over the same dense memory.
    """
    dims = [(size, *steps) for size, *steps in zip(shape, *strides, strict=True) if size != 1]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    merged: list[tuple[int, ...]] = []
    for inner in dims:
        if merged and all(o == i * inner[0] for o, i in zip(merged[-1][1:], inner[1:], strict=True)):
            merged[-1] = (merged[-1][0] * inner[0], *inner[1:])
        else:
            merged.append(inner)
    if not merged or merged == [(merged[0][0], *(1 for _ in strides))]:
        return []
    return [len(merged), *(value for column in zip(*merged, strict=True) for value in column)]


def _to_tensor(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64).clone() if values else torch.empty(0, dtype=torch.int64)
