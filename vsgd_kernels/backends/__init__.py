"""The backends, and the one way in which one is chosen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch import Batch, Gradients, SampleBatch
from .cpp import CppBackend
from .cuda import CudaBackend
from .eager import EagerBackend
from .triton import TritonBackend

#: The environment variable that names a backend for every optimizer whose constructor names none.
VARIABLE = "VSGD_KERNELS_BACKEND"


class Backend(Protocol):
    """What steps a batch. A backend checks nothing of it: `Batch.check` has."""

    name: str
    #: Bytes; by how much a gradient's address is off a multiple of it is to stay as it was prepared for. None where of
    #: gradients more than addresses is needed, so that what was prepared does not serve again.
    alignment: int | None

    @property
    def device_types(self) -> tuple[str, ...] | None:
        """Device types on which it runs; None for all."""

    def why_unavailable(self) -> str | None:
        """Why it cannot be used in this installation and what would bring it, or None where it can."""

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Any:
        """What `run` needs of a batch, and of its gradients' layouts, and can be kept for the next step."""

    def norm(self, prepared: Any, grads: Gradients) -> float | None:
        """The 2-norm of the gradients together, or None where torch is to find it."""

    def run(self, prepared: Any, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch: parameters, states and step counts.

        Gradients must be laid out like those it was prepared with, and as far off `alignment`.
        """

    def prepare_samples(self, batch: SampleBatch, samples: list[Tensor]) -> Any:
        """What `add_samples` needs of a batch, and of the samples' layouts, and can be kept for the next time.

        Args:
            batch: what they will be added to.
            samples: [M, *shape] for each.
        """

    def add_samples(self, prepared: Any, samples: Gradients, counts: list[int]) -> None:
        """Adds samples to means and variances, one after the other.

        Args:
            prepared: what `prepare_samples` returned.
            samples: laid out like those, and as far off `alignment`.
            counts: of the samples before, for each. Of none there is no mean to be read, and of one no variance, which
                need not be written either.
        """


#: Every backend, the fastest first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CppBackend(), TritonBackend(), CudaBackend(), EagerBackend())
}


def find(name: str, origin: str = "backend") -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none; `origin` is the argument that asked for it.
        RuntimeError: it is not available in this installation.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if reason := BACKENDS[name].why_unavailable():
        raise RuntimeError(f"{origin}={name!r} is not available: {reason}")
    return BACKENDS[name]


def requested(name: str | None) -> Backend | None:
    """The backend that the constructor's argument or else the environment variable asks for, if either does."""
    if name is not None:
        return find(name)
    variable = os.environ.get(VARIABLE)
    return find(variable, VARIABLE) if variable else None


def choose(name: str | None, device: torch.device) -> Backend:
    """The backend for a device: the one requested, or else the first that is available and runs there.

    Raises:
        ValueError: the backend requested is unknown or does not run on `device`.
        RuntimeError: the backend requested is not available.
    """
    backend = requested(name)
    if backend is None:
        chosen = next(b for b in BACKENDS.values() if _runs_on(b, device) and b.why_unavailable() is None)
        if chosen.name == "eager":
            _warn_of_eager(device.type)
        return chosen
    if not _runs_on(backend, device):
        runs_on = ", ".join(backend.device_types or ())
        raise ValueError(f"backend={backend.name!r} runs on {runs_on}, got a parameter on {device}")
    return backend


def alignment_of(used: Iterable[Backend]) -> int | None:
    """What serves all of some backends as `Backend.alignment`."""
    each = [backend.alignment for backend in used]
    known = [alignment for alignment in each if alignment is not None]
    return max(known, default=1) if len(known) == len(each) else None


@cache
def _warn_of_eager(device_type: str) -> None:
    """Says once that steps are slow, and why, where others would have served."""
    absent = [b for b in BACKENDS.values() if b.device_types and device_type in b.device_types]
    if reasons := "; ".join(f"{b.name}: {b.why_unavailable()}" for b in absent):
        warnings.warn(
            f"backend='eager' steps parameters on {device_type}, many times slower than another would ({reasons}). "
            f"Ask for it to have this said no more",
            stacklevel=2,
        )


def _runs_on(backend: Backend, device: torch.device) -> bool:
    return backend.device_types is None or device.type in backend.device_types
