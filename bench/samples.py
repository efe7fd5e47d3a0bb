"""What feeding SampleVSGD a micro-batch costs: `python -m bench.samples`, with the options of `bench.step_cost`.

The first sample since a step is written as the mean: 8 bytes a parameter, and 4 more of what a processor reads before
it writes. Each further one reads and writes mean and variance: 20. A gradient that autograd adds to the last, as
without samples, takes 12. Times include that `.grad` is set.
"""

from __future__ import annotations

from functools import partial

from .cases import BASELINE, FURTHER_BYTES, OPTIMIZERS, Entry
from .feeding import Adding, Feeding
from .step_cost import main

FED: dict[str, Entry] = {
    BASELINE: OPTIMIZERS[BASELINE],
    "samplevsgd (fused)": OPTIMIZERS["samplevsgd (fused)"],
    "accumulate(), first": Entry(partial(Feeding, first=True), 8),
    "accumulate(), further": Entry(partial(Feeding, first=False), FURTHER_BYTES),
    "accumulate(), further (eager)": Entry(partial(Feeding, first=False, backend="eager"), FURTHER_BYTES, slow=True),
    "gradients added up": Entry(Adding, 12),
}

if __name__ == "__main__":
    main(optimizers=FED, name="samples", what="feeding SampleVSGD a micro-batch costs")
