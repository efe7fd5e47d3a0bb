"""The Triton backend: one launch for all tensors of a dtype, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

from ..device import DeviceBackend, Prepared, StepLaunch
from ..device_samples import PreparedSamples, SampleLaunch


def interpreted() -> bool:
    """Whether Triton runs kernels in Python (TRITON_INTERPRET=1), for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(DeviceBackend):
    """``kernel.py`` and ``samples.py``, compiled for the GPU at their first launch; Triton is imported no earlier."""

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

    def count(self, prepared: Prepared, launch: StepLaunch, found_inf: Tensor | None) -> None:
        """Counts a step of the launch's tensors, unless found_inf, and computes its scalars."""
        from . import engine

        engine.count(prepared, launch, found_inf)

    def step(self, prepared: Prepared, launch: StepLaunch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the launch's tensors, unless found_inf."""
        from . import engine

        engine.step(prepared, launch, grad_scale, found_inf)

    def add(self, prepared: PreparedSamples, launch: SampleLaunch) -> None:
        """Adds the launch's samples."""
        from . import engine

        engine.add(launch, prepared.chunk)
