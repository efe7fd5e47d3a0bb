"""What a step of each rule costs in each state format: `python -m bench.format_cost`.

With the options of `bench.step_cost`.
"""

from __future__ import annotations

from typing import Any

from vsgd_kernels import VSGD, ConstantVSGD, SampleVSGD, StochGradAdam
from vsgd_kernels.state_formats import FORMATS

from .cases import BASELINE, OPTIMIZERS, Entry, ours
from .step_cost import main

#: Bytes of a state of an element, without a block's words; packed16 has two for all.
WIDTHS = {"fp32": 4, "bf16": 2, "q8": 1}


def _entry(optimizer: type[Any], state_format: str) -> Entry:
    rule = optimizer.rule
    states = 2 if state_format == "packed16" else len(rule.states) * WIDTHS[state_format]
    read = 8 if rule.samples else 4  # the gradient, and the variance of samples
    return Entry(ours(optimizer, state_format=state_format), 2 * (4 + states) + read)


EACH: dict[str, Entry] = {
    BASELINE: OPTIMIZERS[BASELINE],
    **{
        f"{optimizer.__name__.lower()} ({state_format})": _entry(optimizer, state_format)
        for optimizer in (VSGD, ConstantVSGD, SampleVSGD, StochGradAdam)
        for state_format in FORMATS
    },
}

if __name__ == "__main__":
    main(optimizers=EACH)
