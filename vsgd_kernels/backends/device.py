"""What the backends for GPUs share: tables on the device, one launch for all tensors of a path, device-side counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, Gradients
from ..formats import extra_bits
from ..rules import arithmetic_dtype
from ..state_formats import format_of
from .scalars import HostScalars
from .table import COLUMNS, Table

ALIGNMENT = 16  # bytes of the widest access

_NUMEL, _LAYOUT = (COLUMNS.index(name) for name in ("numel", "layout"))
_ADDRESSES = [COLUMNS.index(name) for name in ("param", "low", "variance", "state0", "state1", "state2", "state3")]


def capturing() -> bool:
    """Whether a CUDA graph is being made of what is launched now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


class Path(NamedTuple):
    """What specialises a kernel.

    Attributes:
        dtype: of parameters and gradients.
        aligned: whether every address is a multiple of `ALIGNMENT`.
        strided: whether the operands run over memory in different orders.
        format: of the states.
        extra: bits of the masters beyond those of the parameters.
    """

    dtype: torch.dtype
    aligned: bool
    strided: bool
    format: str
    extra: int


class DeviceBackend(ABC):
    """A backend that steps all tensors of a `Path` in one launch; its classes launch the kernels.

    Attributes:
        chunk: elements that a program steps.
    """

    chunk = 1024

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Prepared:
        """Builds the tables on the device."""
        return Prepared(batch, grads, self.chunk)

    def is_current(self, prepared: Prepared) -> bool:
        """Whether parameters and states are where the tables say."""
        return prepared.table.is_current()

    def norm(self, prepared: Prepared, grads: Gradients) -> None:
        """Torch finds it."""
        return None

    def run(self, prepared: Prepared, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch: one launch for each path, and before it one that counts where the counts are on the device.

        Only where they are not does a found_inf have to be waited for.
        """
        with prepared.guard():
            prepared.point_to(grads)
            if prepared.host_scalars and found_inf is not None:
                if found_inf.item():
                    return
                found_inf = None
            if prepared.host_scalars:
                prepared.count_on_host(prepared.host_scalars)
            else:
                prepared.take_hyper()
                for launch in prepared.launches:
                    self.count(prepared, launch, found_inf)
            for launch in prepared.launches:
                if launch.programs:
                    self.step(prepared, launch, grad_scale, found_inf)

    @abstractmethod
    def count(self, prepared: Prepared, launch: Launch, found_inf: Tensor | None) -> None:
        """Counts a step of the launch's tensors, unless found_inf, and computes its scalars."""

    @abstractmethod
    def step(self, prepared: Prepared, launch: Launch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the launch's tensors, unless found_inf."""


class Prepared:
    """A batch's launches.

    Everything that they read lies in buffers that are written in place, on the stream that the step runs on: a step on
    another stream needs no more care than the parameters do.
    """

    def __init__(self, batch: Batch, grads: list[Tensor], chunk: int) -> None:
        self.batch = batch
        self.chunk = chunk
        self.device = batch.params[0].device
        self.host_scalars = None if batch.capturable else HostScalars(batch)
        self._kept: list[Tensor] = []
        self._streams: set[int] = set()
        self._build(Gradients.of(grads))

    def _build(self, grads: Gradients) -> None:
        self.table, self.grads = Table(self.batch, grads.tensors), grads.addresses
        aligned = ~(_misaligned(self.table.rows[:, _ADDRESSES]).any(1) | _misaligned(self.grads))
        strided = self.table.rows[:, _LAYOUT] >= 0
        paths: dict[Path, list[int]] = {}
        for i, param in enumerate(self.batch.params):
            style, extra = format_of(self.batch.states[i]), extra_bits(self.batch.lows[i])
            path = Path(param.dtype, bool(aligned[i]), bool(strided[i]), style, extra)
            paths.setdefault(path, []).append(i)
        self._scalars: dict[torch.dtype, Tensor] = {}
        self.hyper = self.upload(self.batch.hyper)
        self._hyper_version = self.batch.hyper._version
        self.launches = [Launch(self, path, indices) for path, indices in paths.items()]
        self._streams.clear()

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the device."""
        return self.copy(torch.empty_like(host, device=self.device), host)

    def copy(self, to: Tensor, host: Tensor) -> Tensor:
        """Overwrites a tensor on the device, and returns it.

        A graph that is being captured will copy again: from memory that stays, and pinned, for torch refuses other.
        """
        if capturing():
            host = host.pin_memory()
            self._kept.append(host)
        return to.copy_(host, non_blocking=True)

    def point_to(self, grads: Gradients) -> None:
        """Takes the addresses of gradients that are laid out as those it was built with."""
        if torch.equal(grads.addresses, self.grads):
            return
        if not torch.equal(_misaligned(grads.addresses), _misaligned(self.grads)):
            self._build(grads)
            return
        self.grads = grads.addresses
        for launch in self.launches:
            self.copy(launch.grads, self.grads[launch.indices])

    def count_on_host(self, scalars: HostScalars) -> None:
        """Counts a step, and gives the launches the scalars of it."""
        if scalars.count():
            self._streams.clear()  # none of them knows the new tensors
            self._scalars.clear()
            for launch in self.launches:
                launch.take_scalar_rows(self, scalars)
        for dtype, shared in self._scalars.items():
            self.copy(shared, scalars.of(dtype))

    def scalars_of(self, dtype: torch.dtype, rows: int) -> Tensor:
        """What the launches that compute in that dtype share: `HostScalars.of` on the device."""
        if dtype not in self._scalars:
            self._scalars[dtype] = self.empty_scalars(dtype, rows)
        return self._scalars[dtype]

    def empty_scalars(self, dtype: torch.dtype, rows: int) -> Tensor:
        """Room on the device for so many rows of scalars."""
        return torch.empty((rows, self.batch.rule.scalar_count), dtype=dtype, device=self.device)

    def take_hyper(self) -> None:
        """Takes the hyperparameters, as far as they have changed, and learning rates that are on the device."""
        if self.batch.hyper._version != self._hyper_version:
            self._hyper_version = self.batch.hyper._version
            self.copy(self.hyper, self.batch.hyper.clone())
        for group, lr in self.batch.lrs.items():
            self.hyper[group, self.batch.rule.hyper.index("lr")] = lr

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the tensors' device the current one, and keeps the tables' memory for the current stream."""
        if self.device.type != "cuda":
            return nullcontext()
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams and not capturing():
            self._streams.add(stream.cuda_stream)
            for tensor in (self.hyper, *(tensor for launch in self.launches for tensor in launch.tensors())):
                tensor.record_stream(stream)
        return torch.cuda.device(self.device)


class Launch:
    """The tensors of one path, as the kernels see them; n of them, in `programs` chunks.

    Attributes:
        rows: [n, COLUMNS] int64.
        grads: [n] int64, addresses of the gradients.
        layouts: int64, see `Table`.
        chunk_tensor: [programs] int32, the tensor that a chunk belongs to.
        first_chunk: [n] int64, the number of the tensor's first chunk.
        scalar_row: [n] int64, the tensor's row of `scalars`.
        scalars: [rows, Rule.scalar_count] in arithmetic dtype, the scalars of the step.
    """

    def __init__(self, prepared: Prepared, path: Path, indices: list[int]) -> None:
        self.path = path
        self.indices = torch.tensor(indices, device="cpu")
        rows = prepared.table.rows[self.indices]
        chunks = (rows[:, _NUMEL] + prepared.chunk - 1) // prepared.chunk
        self.programs = int(chunks.sum())
        chunk_tensor = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32, device="cpu"), chunks)
        self.chunk_tensor = prepared.upload(chunk_tensor)
        self.first_chunk = prepared.upload(chunks.cumsum(0) - chunks)
        self.rows = prepared.upload(rows)
        self.grads = prepared.upload(prepared.grads[self.indices])
        self.layouts = prepared.upload(prepared.table.layouts)
        if prepared.host_scalars:
            self.take_scalar_rows(prepared, prepared.host_scalars)
        else:
            self.scalar_row = prepared.upload(torch.arange(len(rows), device="cpu"))
            self.scalars = prepared.empty_scalars(arithmetic_dtype(path.dtype), len(rows))

    def take_scalar_rows(self, prepared: Prepared, scalars: HostScalars) -> None:
        """Takes each tensor's row of the scalars that the host computes."""
        self.scalar_row = prepared.upload(scalars.row[self.indices])
        self.scalars = prepared.scalars_of(arithmetic_dtype(self.path.dtype), int(scalars.row.max()) + 1)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that lies on the device."""
        tables = (self.rows, self.grads, self.layouts, self.chunk_tensor, self.first_chunk)
        return (*tables, self.scalar_row, self.scalars)


def _misaligned(addresses: Tensor) -> Tensor:
    return addresses % ALIGNMENT != 0
