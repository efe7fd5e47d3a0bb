"""What a parameter is fed between two steps: the number, the mean and the variance of samples of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import bounded
from .rules import arithmetic_dtype


@dataclass
class Samples:
    """The samples of one parameter since the last step.

    Attributes:
        count: how many.
        mean: theirs, in the dtype in which the parameter is computed; None where there is none.
        variance: theirs about the mean, of the same dtype; 0 where there are none. It stays where it is.
    """

    count: int
    mean: Tensor | None
    variance: Tensor

    @classmethod
    def none_of(cls, param: Tensor) -> Samples:
        """No samples yet."""
        dtype = arithmetic_dtype(param.dtype)
        return cls(0, None, torch.zeros_like(param, dtype=dtype, requires_grad=False))

    def fits(self, param: Tensor) -> bool:
        """Whether they are of a parameter of this shape, dtype and device."""
        own = self.variance
        return (own.shape, own.dtype, own.device) == (param.shape, arithmetic_dtype(param.dtype), param.device)

    def add(self, samples: Tensor) -> None:
        """Takes samples [M, *shape]; they are bounded one by one, so that their squares stay finite."""
        samples = bounded(samples.to(self.variance.dtype))
        mean = samples.mean(0) if len(samples) > 1 else samples[0].clone()
        self._merge(len(samples), mean, (samples - mean).square_().mean(0) if len(samples) > 1 else None)

    def _merge(self, count: int, mean: Tensor, variance: Tensor | None) -> None:
        """Adds as many others of this mean and variance (Chan, Golub and LeVeque): nothing large is subtracted."""
        if self.mean is None:
            self.count, self.mean = count, mean
            if variance is not None:
                self.variance.copy_(variance)
            return
        share = count / (self.count + count)
        distance = mean - self.mean
        self.mean.add_(distance, alpha=share)
        self.variance.mul_(1.0 - share).add_(distance.square_(), alpha=share * (1.0 - share))
        if variance is not None:
            self.variance.add_(variance, alpha=share)
        self.count += count

    def all_reduce(self, total: int, group: dist.ProcessGroup | None) -> None:
        """Adds those of the group's other processes; `total` is how many all have."""
        share = self.count / total
        own = torch.zeros_like(self.variance) if self.mean is None else self.mean
        mean = own * share
        dist.all_reduce(mean, group=group)
        self.variance.add_((own - mean).square_()).mul_(share)
        dist.all_reduce(self.variance, group=group)
        self.count, self.mean = total, mean

    def clear(self) -> None:
        """Forgets them."""
        if self.count > 1:
            self.variance.zero_()
        self.count, self.mean = 0, None
