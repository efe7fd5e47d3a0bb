"""The scalars of a step whose counts are on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..rules import rounded


class HostScalars:
    """Counts the steps of a batch, and computes each step's scalars once for all tensors that share group and count.

    The counts are moved into one buffer, of which each parameter's stays a view: one operation counts all of them, and
    bytes tell whether somebody else has counted, in a tenth of the time that tensors take to. (Where a count has left
    the buffer, `Seen` has noticed, and there are other scalars.)

    Attributes:
        row: for each tensor its row of what `of` returns.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        counts = torch.stack(batch.steps)
        self._bytes = bytearray(counts.nbytes)
        self._steps = torch.frombuffer(self._bytes, dtype=counts.dtype).copy_(counts)
        for own, shared in zip(batch.steps, self._steps.unbind(), strict=True):
            own.data = shared
        self._share()

    def _share(self) -> None:
        pairs = torch.stack([torch.tensor(self._batch.groups, device="cpu"), self._steps.long()])
        distinct, self.row = torch.unique(pairs, dim=1, return_inverse=True)
        self._groups, self._counts = distinct.tolist()
        self._expected = bytes(self._bytes)

    def count(self) -> bool:
        """Counts one more step of every tensor; returns whether `row` has changed, because somebody has set a count."""
        changed = self._bytes != self._expected
        if changed:
            self._share()
        self._steps += 1
        self._expected = bytes(self._bytes)
        self._counts = [rounded(count + 1, torch.float32) for count in self._counts]  # as the tensors do
        return changed

    def of(self, dtype: torch.dtype) -> Tensor:
        """[distinct, Rule.scalar_count] scalars of the step counted last, of dtype, on the CPU."""
        rule, hyper = self._batch.rule, self._batch.hyper.tolist()
        rows = [rule.scalars(t, hyper[group], dtype) for group, t in zip(self._groups, self._counts, strict=True)]
        return torch.tensor(rows, dtype=dtype, device="cpu")
