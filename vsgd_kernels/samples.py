"""What a parameter is fed between two steps: the number, the mean and the variance of samples of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from . import graphs
from .rules import arithmetic_dtype

#: Elements of which processes bring numbers together at a time; so many take three times as much memory again.
_BUCKET = 2**23


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

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no mean of no samples."""
        return {**self.__dict__, "mean": self.mean if self.count else None}

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
            self.is_old = graphs.capturing()  # then it becomes 0 only when the graph is replayed
        return self.variance

    def count_more(self, n: int) -> None:
        """Takes note that as many were added to mean and variance."""
        self.count += n
        self.is_old &= self.count < 2

    def clear(self) -> None:
        """Forgets them."""
        self.is_old |= self.count > 1
        self.count = 0


def all_reduce(every: Sequence[Samples], totals: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Brings together the samples of a group's processes.

    Args:
        every: this process's, of the same parameters in the same order in each of them.
        totals: for each how many all processes have, 1 or more.
        group: the processes; None stands for all of them.
    """
    for bucket in _buckets(every):
        own = [every[i] for i in bucket]
        shares = [each.count / totals[i] for i, each in zip(bucket, own, strict=True)]
        means = [each.get_mean() if each.count else each.get_mean().zero_() for each in own]
        together = _sums([mean * share for mean, share in zip(means, shares, strict=True)], group)
        variances = [each.get_variance() for each in own]
        apart = [(mean - both).square_() for mean, both in zip(means, together, strict=True)]
        spreads = [d.add_(v).mul_(share) for v, d, share in zip(variances, apart, shares, strict=True)]
        for i, each, mean, variance in zip(bucket, own, together, _sums(spreads, group), strict=True):
            each.get_mean().copy_(mean)
            each.variance.copy_(variance)
            each.count, each.is_old = totals[i], totals[i] < 2


def _buckets(every: Sequence[Samples]) -> Iterator[list[int]]:
    """Those that are brought together at a time: of one device and dtype, few enough or one alone."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, each in enumerate(every):
        alike.setdefault((each.variance.device, each.variance.dtype), []).append(i)
    for places in alike.values():
        bucket: list[int] = []
        elements = 0
        for i in places:
            numel = every[i].variance.numel()
            if bucket and elements + numel > _BUCKET:
                yield bucket
                bucket, elements = [], 0
            bucket.append(i)
            elements += numel
        yield bucket


def _sums(tensors: list[Tensor], group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    """Of each the sum over all processes."""
    flat = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    dist.all_reduce(flat, group=group)
    sums: Sequence[Tensor] = _unflatten_dense_tensors(flat, tensors)  # type: ignore[no-untyped-call]
    return sums
