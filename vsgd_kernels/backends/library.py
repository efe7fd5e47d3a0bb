"""The compiled libraries: the kernels, which any torch loads, and a module for the torch that it was compiled with."""

from __future__ import annotations

import struct
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BUILD_HINT = (
    "with torch and a C++17 compiler installed, `pip install --no-build-isolation` this package again "
    "(an isolated build does not see torch and leaves the kernels out)"
)


_FOLDER = Path(__file__).parent.parent


@cache
def why_not_loaded() -> str | None:
    """Loads the compiled kernels, once; returns why that failed, or None."""
    libraries = _libraries("_C")
    if not libraries and (_FOLDER.parent / "csrc").is_dir():
        return (
            f"what is imported is the checkout {_FOLDER.parent}, in which nothing was compiled; run Python elsewhere "
            "to use an installation, or `pip install --no-build-isolation -e .` there"
        )
    if not libraries:
        return f"this installation of vsgd_kernels has no compiled kernels; {_BUILD_HINT}"
    if missing := _bytes_missing(libraries[0]):
        return f"the compiled kernels {libraries[0].name} lack their last {missing} bytes; {_BUILD_HINT}"
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels {libraries[0].name} do not load ({error}); {_BUILD_HINT}"
    return None


@cache
def why_not_of_this_torch() -> str | None:
    """Loads the module that was compiled with this torch's headers, once; returns why that failed, or None."""
    libraries = _libraries("_snapshot")
    if not libraries:
        return f"not compiled; {_BUILD_HINT}"
    for path in libraries:
        if missing := _bytes_missing(path):
            return f"{path.name} lacks its last {missing} bytes; {_BUILD_HINT}"
    try:
        compiled_for = import_module("vsgd_kernels._snapshot").torch_version
    except ImportError as error:
        return f"compiled for another torch or Python ({error}); {_BUILD_HINT}"
    if compiled_for != torch.__version__:
        return f"compiled for torch {compiled_for}, not {torch.__version__}; {_BUILD_HINT}"
    return None


def _libraries(name: str) -> list[Path]:
    return [path for pattern in (f"{name}*.so", f"{name}*.pyd") for path in _FOLDER.glob(pattern)]


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
def module() -> Any:
    """The library as a module of Python (``csrc/look.cpp``), or None."""
    if why_not_loaded():
        return None
    try:
        return import_module("vsgd_kernels._C")
    except ImportError:
        return None


@cache
def module_of_this_torch() -> Any:
    """The module ``csrc/snapshot.cpp``, or None."""
    return None if why_not_of_this_torch() else import_module("vsgd_kernels._snapshot")


def increment_versions(tensors: list[Tensor]) -> None:
    """Says that the tensors have been written to, as `torch.autograd.graph.increment_version` does."""
    if module := module_of_this_torch():
        module.increment_versions(tensors)
    else:
        torch.autograd.graph.increment_version(tensors)
