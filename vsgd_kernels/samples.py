"""What a parameter is fed between two steps: the number, the mean and the variance of samples of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .backends.library import Snapshot
from .batch import Gradients, SampleBatch
from .rules import arithmetic_dtype


@dataclass
class Samples:
    """The samples of one parameter since the last step.

    Attributes:
        count: how many.
        mean: theirs, in the dtype in which the parameter is computed; None before there were any. It stays where it is.
        variance: theirs about the mean, of the same dtype. It stays where it is.
        is_old: whether there is no more than one, and the variance still that of a step before.
    """

    count: int
    mean: Tensor | None
    variance: Tensor
    is_old: bool = False

    @classmethod
    def none_of(cls, param: Tensor) -> Samples:
        """No samples yet."""
        dtype = arithmetic_dtype(param.dtype)
        return cls(0, None, torch.zeros_like(param, dtype=dtype, requires_grad=False))

    def fits(self, param: Tensor) -> bool:
        """Whether they are of a parameter of this shape, dtype and device."""
        own = self.variance
        return (own.shape, own.dtype, own.device) == (param.shape, arithmetic_dtype(param.dtype), param.device)

    def get_mean(self) -> Tensor:
        """The mean, or where there is none memory for it."""
        if self.mean is None:
            self.mean = torch.empty_like(self.variance)
        return self.mean

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """The mean of samples that there are, as what a parameter of that dtype steps with."""
        mean = self.get_mean()
        return mean if mean.dtype == dtype else mean.to(dtype)  # to() takes as long as stepping 64 elements

    def get_variance(self) -> Tensor:
        """The variance, which of no more than one sample is 0."""
        if self.is_old:
            self.variance.zero_()
            self.is_old = False
        return self.variance

    def count_more(self, n: int) -> None:
        """Takes note that as many were added to mean and variance."""
        self.count += n
        self.is_old &= self.count < 2

    def all_reduce(self, total: int, group: dist.ProcessGroup | None) -> None:
        """Adds those of the group's other processes; `total` is how many all have."""
        share = self.count / total
        own, variance = self.get_mean() if self.count else self.get_mean().zero_(), self.get_variance()
        mean = own * share
        dist.all_reduce(mean, group=group)
        variance.add_((own - mean).square_()).mul_(share)
        dist.all_reduce(variance, group=group)
        own.copy_(mean)
        self.count = total

    def clear(self) -> None:
        """Forgets them."""
        self.is_old |= self.count > 1
        self.count = 0


class Intake:
    """Adds samples to those of several parameters, in one launch a device; kept while they are laid out alike.

    Args:
        params: the parameters.
        own: of each parameter.
        samples: [M, *shape] for each.
        backend: the optimizer's argument.
    """

    def __init__(self, params: list[Tensor], own: list[Samples], samples: list[Tensor], backend: str | None) -> None:
        self.params, self._own, self._added = params, own, list(map(len, samples))
        devices: dict[torch.device, list[int]] = {}
        for i, each in enumerate(own):
            devices.setdefault(each.variance.device, []).append(i)
        self._launches = []
        for device, places in devices.items():
            chosen = backends.choose(backend, device)
            batch = SampleBatch([own[i].get_mean() for i in places], [own[i].variance for i in places])
            self._launches.append((chosen, chosen.prepare_samples(batch, [samples[i] for i in places]), places))
        self._snapshot: Snapshot | None = None

    def watch(self, params: list[list[Tensor]]) -> None:
        """Has `unchanged` know these lists, whose gradients the samples are."""
        if all(backend.name != "eager" for backend, _, _ in self._launches):  # which takes tensors, not addresses
            self._snapshot = Snapshot(params, [])

    def unchanged(self, params: list[list[Tensor]]) -> Gradients | None:
        """The gradients, where it is known that they are the parameters' of which it was told, and laid out alike."""
        return None if self._snapshot is None else self._snapshot.gradients(params, [])

    def add(self, samples: Gradients) -> None:
        """Adds samples that are laid out like those that it was made with."""
        for backend, prepared, places in self._launches:
            own = samples if len(self._launches) == 1 else samples.some(places)
            backend.add_samples(prepared, own, [self._own[i].count for i in places])
        for each, added in zip(self._own, self._added, strict=True):
            each.count_more(added)
