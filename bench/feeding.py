"""What takes the gradients of a micro-batch, with a `step()` as what the benchmarks measure has."""

from __future__ import annotations

import torch

from vsgd_kernels import SampleVSGD

Params = list[torch.nn.Parameter]


class Feeding:
    """Has SampleVSGD accumulate the gradients that parameters have now, which they keep; `first` after discarding."""

    def __init__(self, params: Params, first: bool, backend: str | None = None) -> None:
        self._first = first
        self._grads = [param.grad for param in params]
        self._params = [torch.nn.Parameter(param.detach()) for param in params]
        self._optimizer = SampleVSGD(self._params, lr=1e-2, backend=backend)

    def step(self) -> None:
        """Feeds one sample."""
        if self._first:
            self._optimizer.discard()
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad
        self._optimizer.accumulate()


class Adding:
    """Adds gradients up as autograd does."""

    def __init__(self, params: Params) -> None:
        self._grads = [param.grad for param in params]
        self._sums = [torch.zeros_like(param) for param in params]

    def step(self) -> None:
        """Adds one gradient of each parameter."""
        for own, grad in zip(self._sums, self._grads, strict=True):
            own.add_(grad)
