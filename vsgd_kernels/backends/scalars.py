"""The scalars of a step whose counts are on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import DTYPES, Batch
from ..rules import arithmetic_dtype
from . import library
from .table import COLUMNS

#: Float32 counts every step up to here.
_COUNTED = 2.0**24
#: So many steps are computed at once at most, and so many rows of all of them together.
_STEPS, _ROWS = 64, 1024


class HostScalars:
    """Counts the steps of a batch, and computes their scalars once for all tensors that share group and count.

    The counts are moved into one buffer, of which each parameter's stays a view: one operation counts all of them, and
    bytes tell whether somebody else has counted, in a tenth of the time that tensors take to. (Where a count has left
    the buffer, `Seen` has noticed, and there are other scalars.)

    Attributes:
        row: for each tensor its row of a step's scalars.
        rows: how many these are.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        counts = torch.stack(batch.steps)
        self._bytes = bytearray(counts.nbytes)
        self._steps = torch.frombuffer(self._bytes, dtype=counts.dtype).copy_(counts)
        for own, shared in zip(batch.steps, self._steps.unbind(), strict=True):
            own.data = shared
        self._one = torch.ones((), dtype=counts.dtype, device="cpu")  # to add the number 1 takes twice as long
        self._share()

    def _share(self) -> None:
        pairs = torch.stack([torch.tensor(self._batch.groups, device="cpu"), self._steps.long()])
        distinct, row = torch.unique(pairs, dim=1, return_inverse=True)
        self.row: Tensor = row
        self.rows = distinct.shape[1]
        self._groups = distinct[0]
        self._tensor_of_row = torch.empty(self.rows, dtype=torch.int64, device="cpu")
        self._tensor_of_row[self.row] = torch.arange(len(self.row), device="cpu")
        self._expected = bytes(self._bytes)

    def count(self) -> bool:
        """Counts one more step of every tensor; returns whether `row` has changed, because somebody has set a count."""
        changed = self._bytes != self._expected
        if changed:
            self._share()
        self._steps.add_(self._one)
        self._expected = bytes(self._bytes)
        return changed

    def ahead(self, steps: int, dtype: torch.dtype) -> Tensor:
        """[up to `steps`, rows, Rule.scalar_count] of dtype, on the CPU: of the step counted last and the next ones.

        Those of a single step Python computes sooner.
        """
        counts = self._steps[self._tensor_of_row]
        if steps == 1 or library.why_not_loaded() or counts.max() > _COUNTED - steps:
            rule, hyper = self._batch.rule, self._batch.hyper.tolist()
            pairs = zip(self._groups.tolist(), counts.tolist(), strict=True)
            of_one = [rule.scalars(t, hyper[group], dtype) for group, t in pairs]
            return torch.tensor([of_one], dtype=dtype, device="cpu")
        before = counts + torch.arange(-1, steps - 1, device="cpu").unsqueeze(1)
        table = torch.zeros((before.numel(), len(COLUMNS)), dtype=torch.int64, device="cpu")
        places = torch.arange(before.numel(), device="cpu")
        table[:, COLUMNS.index("step")] = before.data_ptr() + before.itemsize * places
        table[:, COLUMNS.index("group")] = self._groups.repeat(steps)
        scalars = torch.empty((steps, self.rows, self._batch.rule.scalar_count), dtype=dtype, device="cpu")
        torch.ops.vsgd_kernels._count_device(
            table, self._batch.hyper, scalars, None, self._batch.rule.name, DTYPES.index(dtype)
        )
        return scalars


class DeviceScalars:
    """The same on a device, where those of some steps are before they are taken: of twice as many each time.

    A step that finds its scalars there needs no copy; a learning rate that changes at each step has no use of it.

    Args:
        batch: whose.
        device: where they are.

    Attributes:
        of: for each dtype that is computed in, [rows, Rule.scalar_count] of the step counted last.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch = batch
        self._device = device
        self._host = HostScalars(batch)
        self._dtypes = {arithmetic_dtype(param.dtype) for param in batch.params}
        self._make_room()

    @property
    def row(self) -> Tensor:
        """For each tensor its row."""
        return self._host.row

    @torch.inference_mode(False)  # outside, what was made inside could not be written to
    def _make_room(self) -> None:
        self._most = min(_STEPS, max(1, _ROWS // self._host.rows))
        shape = (self._most, self._host.rows, self._batch.rule.scalar_count)
        self._room = {dtype: torch.empty(shape, dtype=dtype, device=self._device) for dtype in self._dtypes}
        self.of = {dtype: room[0] for dtype, room in self._room.items()}
        self._of_steps: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._forget()

    def _forget(self) -> None:
        self._hyper_version = self._batch.hyper._version
        self._next, self._filled, self._wanted = 0, 0, 1

    def count(self, copy: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Counts one more step, and has `of` hold its scalars.

        Args:
            copy: `OnDevice.copy`.

        Returns:
            Whether `row` and all of `of` are others now.
        """
        changed = self._host.count()
        if changed:
            self._make_room()
        elif self._batch.hyper._version != self._hyper_version:
            self._forget()
        if self._next == self._filled:
            self._fill(copy)
        for dtype, of_steps in self._of_steps.items():
            self.of[dtype] = of_steps[self._next]
        self._next += 1
        return changed

    def _fill(self, copy: Callable[[Tensor, Tensor], Tensor]) -> None:
        for dtype, room in self._room.items():
            found = self._host.ahead(self._wanted, dtype)
            self._next, self._filled = 0, found.shape[0]
            self._of_steps[dtype] = copy(room[: self._filled], found).unbind()
        self._wanted = min(2 * self._wanted, self._most)
