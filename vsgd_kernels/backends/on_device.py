"""Tables on a device, which the kernels of a launch read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of the widest access


def capturing() -> bool:
    """Whether a CUDA graph is being made of what is launched now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def misaligned(addresses: Tensor) -> Tensor:
    """Which addresses are not multiples of `ALIGNMENT`."""
    return addresses % ALIGNMENT != 0


class Chunks(NamedTuple):
    """Tensors cut into chunks, each of which a program takes.

    Attributes:
        programs: how many.
        tensor: [programs] int32, the tensor that a chunk belongs to.
        first: [tensors] int64, the number of the tensor's first chunk.
    """

    programs: int
    tensor: Tensor
    first: Tensor

    @classmethod
    def of(cls, numels: Tensor, chunk: int) -> Chunks:
        """Of tensors of so many elements, in chunks of `chunk`; on the CPU."""
        chunks = (numels + chunk - 1) // chunk
        tensor = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32, device="cpu"), chunks)
        return cls(int(chunks.sum()), tensor, chunks.cumsum(0) - chunks)


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
        """Overwrites a tensor on the device, and returns it.

        A graph that is being captured will copy again: from memory that stays, and pinned, for torch refuses other.
        """
        if capturing():
            host = host.pin_memory()
            self._kept.append(host)
        return to.copy_(host, non_blocking=True)

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one, and keeps the tables' memory for the current stream."""
        if self.device.type != "cuda":
            return nullcontext()
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams and not capturing():
            self._streams.add(stream.cuda_stream)
            for tensor in self.tensors():
                tensor.record_stream(stream)
        return torch.cuda.device(self.device)
