"""What clipping by the global norm adds to a step: `python -m bench.clipping`, with the options of `bench.step_cost`.

`clip_grad_norm_` reads the gradients, then reads and writes them: 12 bytes a parameter beside the step's. A step with
`max_grad_norm` reads them once more: 4 bytes.
"""

from __future__ import annotations

import torch
from torch.nn.utils import clip_grad_norm_

import vsgd_kernels

from .cases import BASELINE, OPTIMIZERS, Entry, Params
from .step_cost import main

#: So large that the gradients, which all optimizers share, stay as they are; the work is the same.
MAX_NORM = 1e6


class Clipped:
    """An optimizer before whose steps gradients are clipped."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Params) -> None:
        self._optimizer, self._params = optimizer, params

    def step(self) -> None:
        """Clips and steps."""
        clip_grad_norm_(self._params, MAX_NORM)
        self._optimizer.step()


def _clipped(name: str) -> Entry:
    entry = OPTIMIZERS[name]
    return Entry(lambda params: Clipped(entry.make(params), params), entry.bytes_per_parameter + 12)


VSGD = "vsgd (fused)"
CLIPPED: dict[str, Entry] = {
    BASELINE: OPTIMIZERS[BASELINE],
    f"{BASELINE} + clip_grad_norm_": _clipped(BASELINE),
    VSGD: OPTIMIZERS[VSGD],
    f"{VSGD} + clip_grad_norm_": _clipped(VSGD),
    "vsgd (fused, max_grad_norm)": Entry(
        lambda params: vsgd_kernels.VSGD(params, lr=1e-2, max_grad_norm=MAX_NORM),
        OPTIMIZERS[VSGD].bytes_per_parameter + 4,
    ),
}

if __name__ == "__main__":
    main(optimizers=CLIPPED, name="clipping", what="clipping by the global norm adds to a step")
