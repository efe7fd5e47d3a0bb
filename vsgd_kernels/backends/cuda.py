"""The CUDA backend: ``csrc/step_cuda.cu``, for GPUs where Triton is not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import DTYPES
from ..state_formats import FORMATS
from .device import DeviceBackend, Path, Prepared, StepLaunch
from .device_samples import PreparedSamples, SampleLaunch, SamplePath
from .library import why_not_loaded


class CudaBackend(DeviceBackend):
    """The C++ kernels' rules and formats, compiled by nvcc."""

    name = "cuda"
    #: Whether tensors on the CPU are stepped by the same blocks, run on the host one after the other: for tests.
    on_host = False

    @property
    def device_types(self) -> tuple[str, ...] | None:
        """GPUs."""
        return ("cuda", "cpu") if self.on_host else ("cuda",)

    def why_unavailable(self) -> str | None:
        """Why it cannot be used, or None."""
        if (reason := why_not_loaded()) or self.on_host:
            return reason
        if not torch._C._dispatch_has_kernel_for_dispatch_key("vsgd_kernels::_step_device", "CUDA"):
            return (
                "this installation of vsgd_kernels has no CUDA code; with nvcc installed, "
                "`VSGD_KERNELS_CUDA=1 pip install --no-build-isolation` this package again"
            )
        if not torch.cuda.is_available():
            return "torch sees no GPU; it takes a GPU, its driver and a build of torch for it"
        return None

    def count(self, prepared: Prepared, launch: StepLaunch, found_inf: Tensor | None) -> None:
        """Counts a step of the launch's tensors, unless found_inf, and computes its scalars."""
        torch.ops.vsgd_kernels._count_device(
            launch.rows,
            prepared.hyper,
            launch.scalars,
            found_inf,
            prepared.batch.rule.name,
            DTYPES.index(launch.path.dtype),
        )

    def step(self, prepared: Prepared, launch: StepLaunch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the launch's tensors, unless found_inf."""
        torch.ops.vsgd_kernels._step_device(
            launch.rows,
            launch.grads,
            launch.layouts,
            launch.chunk_tensor,
            launch.first_chunk,
            launch.scalar_row,
            launch.scalars,
            grad_scale,
            found_inf,
            prepared.chunk,
            launch.elements,
            prepared.batch.rule.name,
            DTYPES.index(launch.path.dtype),
            _path_code(launch.path),
            list(FORMATS).index(launch.path.format),
        )

    def add(self, prepared: PreparedSamples, launch: SampleLaunch) -> None:
        """Adds the launch's samples."""
        torch.ops.vsgd_kernels._add_samples_device(
            launch.rows,
            launch.samples,
            launch.counts,
            launch.layouts,
            launch.chunk_tensor,
            launch.first_chunk,
            prepared.chunk,
            launch.elements,
            DTYPES.index(launch.path.dtype),
            _path_code(launch.path),
        )


def _path_code(path: Path | SamplePath) -> int:
    """``csrc/lanes.h``'s Path."""
    return 2 if path.strided else 0 if path.aligned else 1
