"""Whether a step finds what the last one found. A thousand small tensors are stepped sooner than asked one by one.

They are looked at in one call of `library.module_of_this_torch`; or through functions that every torch has, in several
times as long; or, where nothing is compiled, in Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..batch import Gradients
from . import library

Dicts = Sequence[dict[Any, Any]]


class Seen:
    """What a step has found, to tell whether the next finds the same.

    It keeps the parameters alive, but no gradients. It keeps what the dicts hold only where `keeps_states`.

    Args:
        lists: of parameters.
        dicts: of tensors, of dicts of them, and of whatever else.
        moving: the tensors among them that a step reads or writes, but for parameters: torch.utils.swap_tensors, which
            Module.to may call, refuses what C++ holds.
        alignment: bytes; by how much a gradient's address is off a multiple of it is to stay the same.
    """

    def __init__(
        self, lists: list[list[Tensor]], dicts: Dicts = (), moving: Sequence[Tensor] = (), alignment: int = 1
    ) -> None:
        self._native = None
        self._gradients: Gradients | None = None  # those found last, by the module
        self._kept: list[Any] = []  # here, where the garbage collector sees it
        if module := library.module_of_this_torch():
            with suppress(RuntimeError, ValueError):  # a tensor has no memory, or is of a class of its own
                self._native = module.Snapshot(lists, [*dicts], self._kept, alignment)
        if self._native is None:
            self._alignment = alignment
            self._layouts = self._layouts_of(look(lists))
            self._kept = list(map(contents, _containers(lists, dicts)))
            self._identities = identities(_containers(lists, dicts))
            self._watch = Watch([*moving])

    @property
    def keeps_states(self) -> bool:
        """Whether it keeps alive what the dicts hold, for want of a module that was compiled for this torch."""
        return self._native is None

    def gradients(self, lists: list[list[Tensor]], dicts: Dicts = ()) -> Gradients | None:
        """The gradients, with or without their tensors, if there is nothing else that is known to be relevant and new.

        That is: the lists and dicts hold the same objects; tensors among them are where they were; the same parameters
        have gradients; these and their gradients are laid out as they were, and gradients' addresses are as far off
        a multiple of `alignment`. Where it is not known, None too.
        """
        if self._native is not None:
            before, self._gradients = self._gradients, None  # after an interrupt nothing is known of what moved
            if not self._native.serves(lists, [*dicts]):
                return None
            if before is None or self._native.moved():
                before = Gradients([], _words(self._native.gradients()))
            self._gradients = before
            return before
        found = look(lists)
        layouts = self._layouts_of(found)
        alike = (
            layouts is not None
            and layouts == self._layouts
            and not any(map(Tensor.is_neg, found.tensors))
            and identities(_containers(lists, dicts)) == self._identities
            and not self._watch.moved()
        )
        return found if alike else None

    def _layouts_of(self, found: Gradients) -> object:
        """`Gradients.layouts`, and by how much addresses are off; None where the former are."""
        if found.layouts is None:
            return None
        return found.layouts, (found.addresses & (self._alignment - 1)).tolist()


def look(params: list[list[Tensor]]) -> Gradients:
    """The gradients that there are of some lists of parameters."""
    if module := library.module():
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
    """A list's items, or a dict's keys and values, but for values that are dicts."""
    if not isinstance(container, dict):
        return list(container)
    return [each for item in container.items() for each in item if not isinstance(each, dict)]


def identities(containers: list[Container]) -> object:
    """Equal to that of an earlier call where the containers have the same `contents`, if those have been kept alive."""
    if module := library.module():
        return module.identities(containers)
    return [list(map(id, contents(container))) for container in containers]


class Watch:
    """Notices when tensors have moved in memory; keeps them alive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._native = None if library.why_not_loaded() else torch.ops.vsgd_kernels._watch(tensors)
        if self._native is None:
            self._addresses = list(map(Tensor.data_ptr, tensors))
        else:
            weakref.finalize(self, torch.ops.vsgd_kernels._watch_end, self._native)

    def moved(self) -> bool:
        """Whether a tensor is elsewhere than it was when the watch was set."""
        if self._native is None:
            return list(map(Tensor.data_ptr, self._tensors)) != self._addresses
        return bool(torch.ops.vsgd_kernels._watch_moved(self._native))


def _containers(lists: list[list[Tensor]], dicts: Dicts) -> list[Container]:
    """Those, and the dicts in dicts."""
    return [*lists, *dicts, *(each for own in dicts for each in own.values() if isinstance(each, dict))]
