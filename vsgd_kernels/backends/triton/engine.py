"""Launches of the Triton kernel: one for all tensors of a dtype, whatever their group, step or shape."""

from __future__ import annotations

from array import array
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...batch import Batch
from ...rules import BOUNDS, Rule, arithmetic_dtype
from ..table import COLUMNS, Table, to_tensor
from .kernel import step_kernel
from .rules import RULES

WARPS = 4
ALIGNMENT = 16  # bytes of the widest access
CHUNK = 4096  # elements that a program steps, a block after the other

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_NUMEL, _LAYOUT, _GRAD = (COLUMNS.index(name) for name in ("numel", "layout", "grad"))
_ADDRESSES = [COLUMNS.index(name) for name in ("param", "low", "grad", "state0", "state1", "state2", "state3")]


def constants(rule: Rule, dtype: torch.dtype, aligned: bool, strided: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel for one rule, dtype of parameters, and path."""
    arithmetic = arithmetic_dtype(dtype)
    return {
        "UPDATE": RULES[rule.name],
        "STATES": len(rule.states),
        "SCALARS": rule.scalar_count,
        "PARAM": TRITON_DTYPES[dtype],
        "ARITHMETIC": TRITON_DTYPES[arithmetic],
        "TINY": BOUNDS[arithmetic].tiny,
        "BIG": BOUNDS[arithmetic].big,
        "ALIGN": ALIGNMENT if aligned else dtype.itemsize,
        "STRIDED": strided,
        # One widest access a thread and state; with two, the kernel for float32 takes 72 registers instead of 48.
        "BLOCK": 32 * WARPS * ALIGNMENT // arithmetic.itemsize,
        "CHUNK": CHUNK,
    }


class Prepared:
    """A batch's launches, and the scalars of their steps.

    The step counts are moved into one buffer, of which each parameter's stays a view: a step then counts all of them in
    one operation, and computes scalars once for all tensors that share group and count.
    """

    def __init__(self, batch: Batch, grads: list[Tensor]) -> None:
        self.batch = batch
        self.device = batch.params[0].device
        self.steps = torch.stack(batch.steps)
        for own, shared in zip(batch.steps, self.steps.unbind(), strict=True):
            own.data = shared
        self._build(grads)

    def _build(self, grads: list[Tensor]) -> None:
        """Makes the tables, and a launch for each specialisation that the addresses ask for."""
        batch = self.batch
        self.table = Table(batch, grads)
        self._grad_addresses = self.table.rows[:, _GRAD].tolist()
        self._share_scalars()
        paths: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
        for i, row in enumerate(self.table.rows.tolist()):
            aligned = all(row[column] % ALIGNMENT == 0 for column in _ADDRESSES)
            paths.setdefault((batch.params[i].dtype, aligned, row[_LAYOUT] >= 0), []).append(i)
        self.launches = [_Launch(self, path, indices) for path, indices in paths.items()]

    def _share_scalars(self) -> None:
        """Finds which tensors share the scalars of a step: those of one group and count."""
        pairs = torch.stack([torch.tensor(self.batch.groups), self.steps.long()])
        distinct, self.scalar_row = torch.unique(pairs, dim=1, return_inverse=True)
        self._group_of_scalars = distinct[0].tolist()
        self._steps_of_scalars = distinct[1]

    def count_step(self) -> None:
        """Counts one more step of every tensor."""
        if not torch.equal(self.steps, self._steps_of_scalars[self.scalar_row]):  # somebody has set a count
            self._share_scalars()
            for launch in self.launches:
                launch.take_scalar_rows(self)
        self.steps += 1
        self._steps_of_scalars = self._steps_of_scalars + 1

    def scalars(self, dtype: torch.dtype) -> Tensor:
        """[distinct, Rule.scalar_count] scalars of this step, of dtype, on the device."""
        rule, hyper = self.batch.rule, self.batch.hyper.tolist()
        steps = self._steps_of_scalars.tolist()
        rows = [rule.scalars(t, hyper[group], dtype) for group, t in zip(self._group_of_scalars, steps, strict=True)]
        return torch.tensor(rows, dtype=dtype).to(self.device, non_blocking=True)

    def point_to(self, grads: list[Tensor]) -> None:
        """Takes the addresses of gradients that are laid out as those it was built with."""
        addresses = self.table.addresses_of(grads)
        if addresses == self._grad_addresses:
            return
        aligned = [old % ALIGNMENT == new % ALIGNMENT for old, new in zip(self._grad_addresses, addresses, strict=True)]
        if not all(aligned):
            self._build(grads)
            return
        self._grad_addresses = addresses
        column = to_tensor(array("q", addresses))
        for launch in self.launches:
            launch.rows[:, _GRAD] = column[launch.indices].to(self.device, non_blocking=True)

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the tensors' device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class _Launch:
    """The tensors of one specialisation of the kernel.

    Args:
        prepared: what it belongs to.
        path: dtype of the parameters, whether every address is aligned, whether an operand is strided.
        indices: which of the batch's tensors it steps.
    """

    def __init__(self, prepared: Prepared, path: tuple[torch.dtype, bool, bool], indices: list[int]) -> None:
        self.indices = torch.tensor(indices)
        self.dtype = path[0]
        self.constants = constants(prepared.batch.rule, *path)
        rows, device = prepared.table.rows[self.indices], prepared.device
        chunks = (rows[:, _NUMEL] + CHUNK - 1) // CHUNK
        self.programs = int(chunks.sum())
        self.chunk_tensor = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), chunks).to(device)
        self.first_chunk = (chunks.cumsum(0) - chunks).to(device)
        self.rows = rows.to(device)
        self.layouts = prepared.table.layouts.to(device)
        self.take_scalar_rows(prepared)

    def take_scalar_rows(self, prepared: Prepared) -> None:
        """Takes each tensor's row of the scalars."""
        self.scalar_row = prepared.scalar_row[self.indices].to(prepared.device)

    def run(self, scalars: Tensor, grad_scale: Tensor | None) -> None:
        """Launches the kernel on the current stream."""
        if not self.programs:
            return
        step_kernel[(self.programs,)](
            self.rows,
            self.layouts,
            self.chunk_tensor,
            self.first_chunk,
            self.scalar_row,
            scalars,
            grad_scale,
            **self.constants,
            num_warps=WARPS,
            # Each operation is rounded by itself, as in the C++ kernel, so that both give the same bits.
            enable_fp_fusion=False,
        )
