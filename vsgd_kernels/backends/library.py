"""The compiled libraries, and what of them is used outside of a launch: they look at many objects in one call.

The kernels' library looks at them through functions that every torch has; `_snapshot` in torch's own way, which is
several times as fast, where it was compiled for this torch. Where nothing is compiled, Python looks at them.
"""

from __future__ import annotations

import struct
import weakref
from contextlib import suppress
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


_FOLDER = Path(__file__).parent.parent


@cache
def why_not_loaded() -> str | None:
    """Loads the compiled kernels, once; returns why that failed, or None."""
    libraries = _libraries("_C")
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
def why_not_exact() -> str | None:
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
def _module() -> Any:
    """The library as a module of Python (``csrc/look.cpp``), or None."""
    if why_not_loaded():
        return None
    try:
        return import_module("vsgd_kernels._C")
    except ImportError:
        return None


@cache
def _exact() -> Any:
    """The module ``csrc/snapshot.cpp``, or None."""
    return None if why_not_exact() else import_module("vsgd_kernels._snapshot")


def look(params: list[list[Tensor]]) -> Gradients:
    """The gradients that there are of some lists of parameters."""
    if module := _module():
        grads, addresses, layouts = module.look(params)
        return Gradients(grads, _words(addresses), layouts)
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


def _words(buffer: bytearray) -> Tensor:
    # frombuffer takes none that is empty
    return torch.frombuffer(buffer, dtype=torch.int64) if buffer else torch.empty(0, dtype=torch.int64, device="cpu")


Container = list[Any] | dict[Any, Any]


def contents(container: Container) -> list[Any]:
    """A list's items, or a dict's keys and values."""
    return [*chain.from_iterable(container.items())] if isinstance(container, dict) else list(container)


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


class Snapshot:
    """What a step has found, to tell whether the next finds the same.

    It keeps alive what the lists and dicts held, but no gradients.

    Args:
        lists: of parameters.
        dicts: of tensors, of dicts of them, and of whatever else.
    """

    def __init__(self, lists: list[list[Tensor]], dicts: list[dict[Any, Any]]) -> None:
        self._native = None
        self._kept: list[Any] = []  # here, where the garbage collector sees it
        if module := _exact():
            with suppress(RuntimeError, ValueError):  # a tensor has no memory, or is of a class of its own
                self._native = module.Snapshot(lists, dicts, self._kept)

    @property
    def is_taken(self) -> bool:
        """Whether it can tell anything."""
        return self._native is not None

    def gradients(self, lists: list[list[Tensor]], dicts: list[dict[Any, Any]]) -> Gradients | None:
        """The gradients' addresses, without the gradients, if there is nothing else that may have changed.

        That is: the lists and dicts hold the same objects; all tensors among them are where they were; the same
        parameters have gradients; these and their gradients are laid out as they were, to 16 bytes of their addresses.
        Where it is not known, as where no module is compiled for this torch, None too.
        """
        found = None if self._native is None else self._native.gradients(lists, dicts)
        return None if found is None else Gradients([], _words(found))


class Seen:
    """What some lists of parameters held and how these and their gradients lay, to tell whether they do so again.

    By a `Snapshot`, or where there is none by `look`. It keeps the parameters alive, but no gradients.
    """

    def __init__(self, lists: list[list[Tensor]]) -> None:
        self._snapshot = Snapshot(lists, [])
        if not self._snapshot.is_taken:
            self._layouts = look(lists).layouts
            self._kept = list(map(contents, lists))
            self._identities = identities([*lists])

    def gradients(self, lists: list[list[Tensor]]) -> Gradients | None:
        """The gradients, without them or with them, if they are known to lie alike but for their addresses."""
        if self._snapshot.is_taken:
            return self._snapshot.gradients(lists, [])
        found = look(lists)
        alike = (
            found.layouts is not None
            and found.layouts == self._layouts
            and identities([*lists]) == self._identities
            and not any(map(Tensor.is_neg, found.tensors))
        )
        return found if alike else None


def increment_versions(tensors: list[Tensor]) -> None:
    """Says that the tensors have been written to, as `torch.autograd.graph.increment_version` does."""
    if module := _exact():
        module.increment_versions(tensors)
    else:
        torch.autograd.graph.increment_version(tensors)
