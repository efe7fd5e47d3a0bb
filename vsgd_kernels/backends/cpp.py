"""The C++ backend: one fused pass over all tensors of a batch, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Batch
from .table import Table

_BUILD_HINT = (
    "with torch and a C++17 compiler installed, `pip install --no-build-isolation` this package again "
    "(an isolated build does not see torch and leaves the kernels out)"
)


@cache
def _load_library() -> str | None:
    """Loads the compiled kernels, once; returns why it could not."""
    folder = Path(__file__).parent.parent
    libraries = [path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern)]
    if not libraries:
        return f"this installation of vsgd_kernels has no compiled kernels; {_BUILD_HINT}"
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels {libraries[0].name} do not load ({error}); {_BUILD_HINT}"
    return None


class CppBackend:
    """``csrc/`` compiled: AVX-512, AVX2 or baseline code, chosen at run time, with the same bits."""

    name = "cpp"
    device_types: tuple[str, ...] | None = ("cpu",)
    #: "auto", or the instruction set to use: "baseline", "avx2", "avx512"
    isa = "auto"

    def why_unavailable(self) -> str | None:
        """Why the kernels are not there, or None."""
        return _load_library()

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Table:
        """Builds the table of addresses."""
        return Table(batch, grads)

    def is_current(self, prepared: Table) -> bool:
        """Whether parameters and states are where the table says."""
        return prepared.is_current()

    def run(self, prepared: Table, grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch."""
        prepared.point_to(grads)
        batch = prepared.batch
        torch.ops.vsgd_kernels._step_cpu(
            prepared.rows, prepared.layouts, batch.hyper, batch.rule.name, grad_scale, found_inf, self.isa
        )
