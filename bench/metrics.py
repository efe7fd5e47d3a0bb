"""Numbers that describe runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ENTROPY_BINS = 20


class Spread(NamedTuple):
    """The mean of some runs' values, their sample standard deviation (None for one run), and how many there are."""

    mean: float
    sd: float | None
    n: int

    def text(self, digits: int, scale: float = 1.0) -> str:
        """As it stands in a table."""
        sd = "" if self.sd is None else f" ± {self.sd * scale:.{digits}f}"
        return f"{self.mean * scale:.{digits}f}{sd} ({self.n})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def normalized_entropy(logits: Tensor) -> Tensor:
    """Per row of [n, classes], the entropy of its softmax over log(classes): 0 is certain, 1 knows nothing.

    The uncertainty of StochGradAdam's section 5.
    """
    log_p = torch.log_softmax(logits.float(), 1)
    return (-(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])).clamp(0.0, 1.0)
