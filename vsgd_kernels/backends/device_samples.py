"""What the backends for GPUs share in adding samples: tables on the device, one launch for all tensors of a path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import DTYPES, Gradients, SampleBatch
from .on_device import Chunked, OnDevice, misaligned
from .table import SAMPLE_COLUMNS, SampleTable

_DTYPE, _LAYOUT, _ADDED, _STRIDE = (SAMPLE_COLUMNS.index(name) for name in ("dtype", "layout", "added", "stride"))
_ADDRESSES = [SAMPLE_COLUMNS.index(name) for name in ("mean", "variance")]


class SamplePath(NamedTuple):
    """What specialises a kernel.

    Attributes:
        dtype: of the samples.
        aligned: whether every address, of every sample, is a multiple of `ALIGNMENT`.
        strided: whether samples run over memory in another order than their means.
    """

    dtype: torch.dtype
    aligned: bool
    strided: bool


class SampleLaunch(Chunked):
    """The samples of one path, as the kernels see them; of n tensors.

    Attributes:
        samples: [n] int64, addresses.
        counts: [n] int64, how many there were before.
    """

    def __init__(self, prepared: PreparedSamples, table: SampleTable, path: SamplePath, indices: list[int]) -> None:
        super().__init__(prepared, table, indices, prepared.chunk)
        self.path = path
        self.samples, self.counts = (torch.empty_like(self.first_chunk) for _ in range(2))

    def tensors(self) -> tuple[Tensor, ...]:
        """All that lies on the device."""
        return *super().tensors(), self.samples, self.counts


class PreparedSamples(OnDevice):
    """The launches that add samples of certain layouts."""

    def __init__(self, batch: SampleBatch, samples: list[Tensor], chunk: int) -> None:
        super().__init__(batch.means[0].device)
        self.chunk = chunk
        table = SampleTable(batch, samples)
        rows = table.rows
        sizes = torch.tensor([dtype.itemsize for dtype in DTYPES], device="cpu")[rows[:, _DTYPE]]
        apart = misaligned(rows[:, _STRIDE] * sizes) & (rows[:, _ADDED] > 1)
        aligned = ~(misaligned(rows[:, _ADDRESSES]).any(1) | misaligned(Gradients.of(samples).addresses) | apart)
        paths: dict[SamplePath, list[int]] = {}
        for i, row in enumerate(rows.tolist()):
            path = SamplePath(DTYPES[row[_DTYPE]], bool(aligned[i]), row[_LAYOUT] >= 0)
            paths.setdefault(path, []).append(i)
        self.launches = [SampleLaunch(self, table, path, indices) for path, indices in paths.items()]

    def tensors(self) -> Iterator[Tensor]:
        """All that lies on the device."""
        return (tensor for launch in self.launches for tensor in launch.tensors())

    def take(self, samples: Gradients, counts: list[int]) -> None:
        """Gives the launches the samples' addresses, aligned as they were first, and how many there were before."""
        before = torch.tensor(counts, dtype=torch.int64, device="cpu")
        for launch in self.launches:
            self.copy(launch.samples, samples.addresses[launch.indices])
            self.copy(launch.counts, before[launch.indices])
