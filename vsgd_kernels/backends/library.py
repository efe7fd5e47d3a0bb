"""The compiled library, and what of it is used outside of a launch: it looks at many objects in one call.

Where it is not compiled, Python looks at them.
"""

from __future__ import annotations

import struct
import weakref
from functools import cache
from importlib import import_module
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..batch import Gradients

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
    if missing := _bytes_missing(libraries[0]):
        return f"the compiled kernels {libraries[0].name} lack their last {missing} bytes; {_BUILD_HINT}"
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels {libraries[0].name} do not load ({error}); {_BUILD_HINT}"
    return None


def _bytes_missing(library: Path) -> int:
    """How many bytes an ELF file is too short for its section headers, which stand last.

    The loader of a file that is cut off does not fail: the process dies when it touches what is missing.
    """
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return 0
    (start,) = struct.unpack_from("=Q", header, 40)
    size, count = struct.unpack_from("=HH", header, 58)
    return int(max(0, start + size * count - library.stat().st_size))


@cache
def _module() -> Any:
    """The library as a module of Python (``csrc/look.cpp``), or None."""
    if why_not_loaded():
        return None
    try:
        return import_module("vsgd_kernels._C")
    except ImportError:
        return None


def look(params: list[list[Tensor]]) -> Gradients:
    """The gradients that there are of some lists of parameters."""
    if module := _module():
        grads, addresses, layouts = module.look(params)
        words = torch.frombuffer if grads else torch.tensor  # the former takes no empty buffer
        return Gradients(grads, words(addresses, dtype=torch.int64), layouts)
    every = list(chain.from_iterable(params))
    there = [param.grad is not None for param in every]
    stepped = list(compress(every, there))
    grads = [param.grad for param in stepped]
    tensors = [*stepped, *grads]
    if any(map(is_traceable_wrapper_subclass, tensors)):  # they have no memory of their own
        return Gradients(grads, torch.zeros(len(grads), dtype=torch.int64, device="cpu"))
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
        strides = None if all(map(Tensor.is_contiguous, tensors)) else list(map(Tensor.stride, tensors))
        known = all(address or not tensor.numel() for address, tensor in zip(addresses, tensors, strict=True))
    except RuntimeError:  # one is not dense
        return Gradients(grads, torch.zeros(len(grads), dtype=torch.int64, device="cpu"))
    kinds = [(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors]
    layouts = (there, addresses[: len(stepped)], strides, kinds) if known else None
    return Gradients(grads, torch.tensor(addresses[len(stepped) :], dtype=torch.int64, device="cpu"), layouts)


Container = list[Any] | dict[Any, Any]


def contents(container: Container) -> list[Any]:
    """A list's items or a dict's values."""
    return list(container.values()) if isinstance(container, dict) else list(container)


def identities(containers: list[Container]) -> object:
    """Equal to that of an earlier call where the containers have the same `contents`, if those have been kept alive."""
    if module := _module():
        return module.identities(containers)
    return [list(map(id, contents(container))) for container in containers]


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
