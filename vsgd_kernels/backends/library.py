"""The compiled library, and what of it is used outside of a launch."""

from __future__ import annotations

import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_BUILD_HINT = (
    "with torch and a C++17 compiler installed, `pip install --no-build-isolation` this package again "
    "(an isolated build does not see torch and leaves the kernels out)"
)


@cache
def why_not_loaded() -> str | None:
    """Loads the compiled kernels, once; returns why that failed, or None."""
    folder = Path(__file__).parent.parent
    libraries = [path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern)]
    if not libraries:
        return f"this installation of vsgd_kernels has no compiled kernels; {_BUILD_HINT}"
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels {libraries[0].name} do not load ({error}); {_BUILD_HINT}"
    return None


class Watch:
    """Notices when tensors have moved in memory; keeps them alive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._native = None if why_not_loaded() else torch.ops.vsgd_kernels._watch(tensors)
        if self._native is None:
            self._addresses = list(map(Tensor.data_ptr, tensors))
        else:
            weakref.finalize(self, torch.ops.vsgd_kernels._watch_end, self._native)

    def moved(self) -> bool:
        """Whether a tensor is elsewhere than it was when the watch was set."""
        if self._native is None:
            return list(map(Tensor.data_ptr, self._tensors)) != self._addresses
        return bool(torch.ops.vsgd_kernels._watch_moved(self._native))
