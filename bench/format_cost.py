"""What a step of each rule costs in each state format: `python -m bench.format_cost`.

With the options of `bench.step_cost`.
"""

from __future__ import annotations

from vsgd_kernels import VSGD, ConstantVSGD, SampleVSGD, StochGradAdam
from vsgd_kernels.state_formats import FORMATS

from .cases import BASELINE, OPTIMIZERS, Entry, entry
from .step_cost import main

EACH: dict[str, Entry] = {
    BASELINE: OPTIMIZERS[BASELINE],
    **{
        f"{optimizer.__name__.lower()} ({state_format})": entry(optimizer, state_format)
        for optimizer in (VSGD, ConstantVSGD, SampleVSGD, StochGradAdam)
        for state_format in FORMATS
    },
}

if __name__ == "__main__":
    main(optimizers=EACH, name="format_cost", what="a step of each rule costs in each state format")
