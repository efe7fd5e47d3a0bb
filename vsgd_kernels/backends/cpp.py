"""The C++ backend: one fused pass over all tensors of a batch, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch, Gradients, SampleBatch
from .library import why_not_loaded
from .table import SampleTable, Table

#: In the order of ``csrc/step_cpu.h``'s Isa.
ISAS = ("auto", "baseline", "avx2", "avx512", "avx512vbmi")


class CppBackend:
    """``csrc/`` compiled: AVX-512, AVX2 with FMA, or baseline code, chosen at run time, with the same bits."""

    name = "cpp"
    device_types: tuple[str, ...] | None = ("cpu",)
    alignment: int | None = 1
    #: One of `ISAS`: the instruction set to use, "auto" being the best of this processor.
    isa = "auto"

    def why_unavailable(self) -> str | None:
        """Why the kernels are not there, or None."""
        return why_not_loaded()

    def best_isa(self) -> str:
        """The best instruction set of this processor, of those that the kernels are compiled for."""
        return ISAS[torch.ops.vsgd_kernels._best_isa()]

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Table:
        """Builds the table of addresses."""
        return Table(batch, grads)

    def norm(self, prepared: Table, grads: Gradients) -> float:
        """The gradients' norm, in float64."""
        return float(torch.ops.vsgd_kernels._norm_cpu(prepared.rows, grads.addresses, prepared.layouts, self.isa))

    def run(self, prepared: Table, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch."""
        batch = prepared.batch
        torch.ops.vsgd_kernels._step_cpu(
            prepared.rows,
            grads.addresses,
            prepared.layouts,
            batch.read_hyper(),
            batch.rule.name,
            grad_scale,
            found_inf,
            self.isa,
        )

    def prepare_samples(self, batch: SampleBatch, samples: list[Tensor]) -> SampleTable:
        """Builds the table of addresses."""
        return SampleTable(batch, samples)

    def add_samples(self, prepared: SampleTable, samples: Gradients, counts: list[int]) -> None:
        """Adds them in one pass."""
        before = torch.tensor(counts, dtype=torch.int64, device="cpu")
        torch.ops.vsgd_kernels._add_samples_cpu(prepared.rows, samples.addresses, before, prepared.layouts, self.isa)
