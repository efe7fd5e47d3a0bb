"""From the samples that parameters are fed to the launches that add them, and what is kept of these for the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends
from .backends.seen import Seen
from .batch import Gradients, SampleBatch, check_grad, check_once, check_param
from .plan import ParamGroups, lists_of, param_name
from .samples import Samples


class Found(NamedTuple):
    """What a parameter has to be taken, and what errors call the parameter.

    Attributes:
        samples: [M, *shape].
    """

    name: str
    param: Tensor
    samples: Tensor


class Intake:
    """Adds samples to those of several parameters: one call of the backend for each device.

    Args:
        found: of each parameter.
        own: those that they are added to.
        backend: the optimizer's argument.

    Raises:
        TypeError: samples have no memory of their own.
    """

    def __init__(self, found: list[Found], own: list[Samples], backend: str | None) -> None:
        self.params = [each.param for each in found]
        self._own, self._added = own, [len(each.samples) for each in found]
        devices: dict[torch.device, list[int]] = {}
        for i, each in enumerate(own):
            devices.setdefault(each.variance.device, []).append(i)
        self._launches = []
        for device, places in devices.items():
            chosen = backends.choose(backend, device)
            means, variances = [own[i].get_mean() for i in places], [own[i].variance for i in places]
            batch = SampleBatch([f"what {found[i].name} is fed" for i in places], means, variances)
            self._launches.append((chosen, chosen.prepare_samples(batch, [found[i].samples for i in places]), places))
        self._seen: Seen | None = None

    def watch(self, param_groups: ParamGroups) -> None:
        """Has `unchanged` know the groups, all of whose gradients are what it adds."""
        alignment = backends.alignment_of(backend for backend, _, _ in self._launches)
        if alignment is not None:
            self._seen = Seen(lists_of(param_groups), alignment=alignment)

    def unchanged(self, param_groups: ParamGroups) -> Gradients | None:
        """The gradients, where it is known that they are of the same parameters as then, and lie alike."""
        return None if self._seen is None else self._seen.gradients(lists_of(param_groups))

    def add(self, samples: Gradients) -> None:
        """Adds samples that lie like those that it was made with."""
        for backend, prepared, places in self._launches:
            own = samples if len(self._launches) == 1 else samples.some(places)
            backend.add_samples(prepared, own, [self._own[i].count for i in places])
            for i in places:  # at once, for the next device's launch may fail
                self._own[i].count_more(self._added[i])


def has_samples(param: Tensor) -> bool:
    """Whether a parameter has per-sample gradients."""
    return getattr(param, "grad_sample", None) is not None


def find(param_groups: ParamGroups) -> list[Found]:
    """What all parameters that have a `grad_sample` or a `grad` have to be taken.

    Raises:
        TypeError, ValueError: one does not fit its parameter, they are not of as many samples, or a parameter is there
            twice.
    """
    found = [
        Found(name, param, _samples_in(name, param))
        for i, group in enumerate(param_groups)
        for j, param in enumerate(group["params"])
        if param.grad is not None or has_samples(param)
        for name in [param_name(param_groups, i, j)]
    ]
    check_once([each.name for each in found], [each.param for each in found])
    several = [each for each in found if has_samples(each.param)]
    for each in several:
        if len(each.samples) != len(several[0].samples):
            raise ValueError(
                f"grad_sample of {each.name} must have as many samples as that of {several[0].name}, "
                f"{len(several[0].samples)}, got {len(each.samples)}"
            )
    return found


def _samples_in(name: str, param: Tensor) -> Tensor:
    """[M, *shape] what a parameter has to be taken; of several `grad_sample`, one after the other."""
    check_param(name, param)
    samples = getattr(param, "grad_sample", None)
    if samples is None:
        grad = cast(Tensor, param.grad)
        check_grad(name, param, grad)
        return grad.unsqueeze(0)
    parts = list(samples) if isinstance(samples, Sequence) else [samples]
    if not parts:
        raise ValueError(f"grad_sample of {name} must hold one or more tensors, got {samples!r}")
    for part in parts:
        _check_part(name, param, part)
    return parts[0].resolve_neg() if len(parts) == 1 else torch.cat(parts)


def _check_part(name: str, param: Tensor, part: Tensor) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"grad_sample of {name} must be a tensor, got {part!r}")
    if is_traceable_wrapper_subclass(part):
        kind = type(part).__name__
        raise TypeError(f"grad_sample of {name} must hold its own memory, got a wrapper of other tensors, {kind}")
    if part.dim() != param.dim() + 1 or part.shape[1:] != param.shape or len(part) == 0:
        raise ValueError(
            f"grad_sample of {name} must have the shape [samples, {', '.join(map(str, param.shape))}], with one "
            f"or more samples, got {tuple(part.shape)}"
        )
    if part.dtype != param.dtype or part.layout != torch.strided:
        raise TypeError(f"grad_sample of {name} must be dense and {param.dtype}, got {part.layout}, {part.dtype}")
    if part.device != param.device:
        raise ValueError(f"grad_sample of {name} must be on {param.device}, got {part.device}")
