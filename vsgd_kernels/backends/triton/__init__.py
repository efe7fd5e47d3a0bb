"""The Triton backend: one launch for all tensors of a dtype, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...batch import Batch
from ...rules import arithmetic_dtype

if TYPE_CHECKING:
    from .engine import Prepared


def interpreted() -> bool:
    """Whether Triton runs kernels in Python (TRITON_INTERPRET=1), for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend:
    """``kernel.py`` compiled for the GPU at its first launch. Triton is imported no earlier than that."""

    name = "triton"

    @property
    def device_types(self) -> tuple[str, ...] | None:
        """GPUs, and in interpreted mode the CPU too."""
        return ("cuda", "cpu") if interpreted() else ("cuda",)

    def why_unavailable(self) -> str | None:
        """Why it cannot be used, or None."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; `pip install triton` brings it"
        if interpreted():
            return None
        if not torch.cuda.is_available():
            return "torch sees no GPU; it takes a GPU, its driver and a build of torch for it"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "Triton compiles its launcher with a C compiler and finds none; install gcc or clang, or set CC"
        return None

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Prepared:
        """Builds the tables on the device."""
        from .engine import Prepared

        return Prepared(batch, grads)

    def is_current(self, prepared: Prepared) -> bool:
        """Whether parameters and states are where the tables say."""
        return prepared.table.is_current()

    def run(self, prepared: Prepared, grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch: one launch for each dtype and path."""
        if found_inf is not None and found_inf.item():
            return
        with prepared.guard():
            prepared.point_to(grads)
            prepared.count_step()
            scalars = {}
            for launch in prepared.launches:
                dtype = arithmetic_dtype(launch.dtype)
                if dtype not in scalars:
                    scalars[dtype] = prepared.scalars(dtype)
                launch.run(scalars[dtype], grad_scale)
