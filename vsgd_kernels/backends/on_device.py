"""Tables on a device, which the kernels of a launch read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import graphs
from .table import SampleTable, Table

ALIGNMENT = 16  # bytes of the widest access
#: Bytes that CUDA takes at once to a place of its own; for more that is not pinned, the host waits for the stream.
_STAGED = 2**16


def misaligned(addresses: Tensor) -> Tensor:
    """Which addresses are not multiples of `ALIGNMENT`."""
    return addresses & (ALIGNMENT - 1) != 0  # a division takes longer


class OnDevice(ABC):
    """What lies on a device for some launches.

    It is written in place, on the stream that the launch runs on: a launch on another stream needs no more care than
    the tensors do that it works on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: list[Tensor] = []
        self._streams: set[int] = set()

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """All that lies on the device."""

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the device."""
        return self.copy(torch.empty_like(host, device=self.device), host)

    def copy(self, to: Tensor, host: Tensor) -> Tensor:
        """Overwrites a tensor on the device, and returns it; the host does not wait for that.

        A graph that is being captured will copy again: from memory that stays, and pinned, for torch refuses other.
        """
        capturing = graphs.capturing()
        if capturing or (host.nbytes > _STAGED and self.device.type == "cuda"):
            host = host.pin_memory()
        if capturing:
            self._kept.append(host)
        return to.copy_(host, non_blocking=True)

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one, and keeps the tables' memory for the current stream."""
        if self.device.type != "cuda":
            return nullcontext()
        # Each step asks; torch.cuda.current_stream would make an object, torch.cuda.device enter what is entered.
        handle = torch._C._cuda_getCurrentRawStream(self.device.index)
        if handle not in self._streams and not graphs.capturing():
            self._streams.add(handle)
            stream = torch.cuda.current_stream(self.device)
            for tensor in self.tensors():
                tensor.record_stream(stream)
        return nullcontext() if torch.cuda.current_device() == self.device.index else torch.cuda.device(self.device)


class Chunked:
    """Some tensors of a table, and how they are cut into chunks, each of which a program takes; n of them.

    Attributes:
        indices: [n] their rows, on the CPU.
        elements: of all tensors.
        rows: [n, columns] int64.
        layouts: int64 records, see table.py.
        programs: how many chunks there are.
        chunk_tensor: [programs] int32, the tensor that a chunk belongs to.
        first_chunk: [n] int64, the number of the tensor's first chunk.
        compiled: a backend's kernels, as far as it has found out which serve these tensors.
    """

    def __init__(self, on: OnDevice, table: Table | SampleTable, indices: list[int], chunk: int) -> None:
        self.compiled: dict[Any, Any] = {}
        self.indices = torch.tensor(indices, device="cpu")
        rows = table.rows[self.indices]
        self.elements = int(rows[:, table.NUMEL].sum())
        chunks = (rows[:, table.NUMEL] + chunk - 1) // chunk
        self.programs = int(chunks.sum())
        self.rows, self.layouts = on.upload(rows), on.upload(table.layouts)
        tensors = torch.arange(len(rows), dtype=torch.int32, device="cpu")
        self.chunk_tensor = on.upload(torch.repeat_interleave(tensors, chunks))
        self.first_chunk = on.upload(chunks.cumsum(0) - chunks)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that lies on the device."""
        return self.rows, self.layouts, self.chunk_tensor, self.first_chunk
