"""The table of addresses by which a native kernel sees a batch (``csrc/chunks.h`` reads it)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import DTYPES, Batch, SampleBatch
from ..formats import extra_bits
from ..state_formats import FORMATS, format_of

#: Columns of a row, all int64: addresses, sizes, indices.
COLUMNS = (
    *("param", "low", "step", "numel", "dtype", "group", "layout", "format", "extra", "blocks", "key"),
    *("seed", "place", "variance"),
    *("state0", "state1", "state2", "state3"),
)
#: Of the first state among a tensor's operands: parameter, gradient, low and states.
FIRST_STATE = 3
_STATES = COLUMNS.index("state0")
#: Columns of a row of `SampleTable` (``csrc/samples.h`` reads it), all int64.
SAMPLE_COLUMNS = ("mean", "variance", "numel", "dtype", "layout", "added", "stride")


class Table:
    """A batch as rows of addresses.

    Attributes:
        batch: the batch.
        rows: [tensors, COLUMNS] int64 on the CPU.
        layouts: int64 records of those tensors whose operands do not run over the same dense memory; a row's `layout`
            is its record's offset, or -1.
    """

    NUMEL = COLUMNS.index("numel")

    def __init__(self, batch: Batch, grads: list[Tensor]) -> None:
        self.batch = batch
        rows, layouts = array("q"), array("q")
        columns = zip(
            batch.params,
            batch.lows,
            grads,
            batch.states,
            batch.steps,
            batch.groups,
            batch.blocks,
            batch.keys,
            batch.seeds,
            batch.places,
            batch.variances,
            strict=True,
        )
        for param, low, grad, states, step, group, blocks, key, seed, place, variance in columns:
            operands = [param, grad, param if low is None else low, *states]
            operands += [] if variance is None else [variance]
            record = layout_record(param.shape, [operand.stride() for operand in operands], FIRST_STATE)
            rows.extend((param.data_ptr(), 0 if low is None else low.data_ptr(), step.data_ptr()))
            rows.append(param.numel())
            rows.extend((DTYPES.index(param.dtype), group, len(layouts) if record else -1))
            rows.extend((list(FORMATS).index(format_of(states)), extra_bits(low)))
            rows.extend((0 if blocks is None else blocks.data_ptr(), key, seed, place))
            rows.append(0 if variance is None else variance.data_ptr())
            # Where one tensor holds all states, it stands for each: kernels add to every address.
            held = [state.data_ptr() for state in states] * (len(batch.rule.states) // len(states))
            rows.extend(held + [0] * (len(COLUMNS) - _STATES - len(held)))
            layouts.extend(record)
        self.rows = to_tensor(rows).view(-1, len(COLUMNS))
        self.layouts = to_tensor(layouts)

        _check_memory(batch.names, batch.params)
        _check_memory([f"the gradient of {name}" for name in batch.names], grads)


class SampleTable:
    """Samples as rows of addresses, beside the means and variances that they are added to.

    Attributes:
        batch: these; they are kept alive.
        rows: [tensors, SAMPLE_COLUMNS] int64 on the CPU.
        layouts: as `Table.layouts`, of mean and sample.

    Raises:
        TypeError: samples have no memory of their own.
    """

    NUMEL = SAMPLE_COLUMNS.index("numel")

    def __init__(self, batch: SampleBatch, samples: list[Tensor]) -> None:
        self.batch = batch
        _check_memory(batch.names, samples)
        rows, layouts = array("q"), array("q")
        for mean, variance, own in zip(batch.means, batch.variances, samples, strict=True):
            record = layout_record(mean.shape, [mean.stride(), own.stride()[1:]], 0)
            rows.extend((mean.data_ptr(), variance.data_ptr(), mean.numel(), DTYPES.index(own.dtype)))
            rows.extend((len(layouts) if record else -1, len(own), own.stride(0)))
            layouts.extend(record)
        self.rows = to_tensor(rows).view(-1, len(SAMPLE_COLUMNS))
        self.layouts = to_tensor(layouts)


def _check_memory(names: Sequence[str], tensors: list[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.data_ptr() == 0 and tensor.numel():
            raise TypeError(
                f"{name} has no memory of its own ({type(tensor).__name__}): clone() it or take the eager backend"
            )


def layout_record(shape: Sequence[int], strides: Sequence[Sequence[int]], order: int) -> list[int]:
    """The common iteration of several operands of one shape: dimensions, sizes, then each operand's strides.

    Dimensions are ordered by the strides of operand `order`, the largest first: a step's by the first state's, for that
    is the order of its blocks. They are merged where all operands allow it.
    Empty where nothing is left but to run over the same dense memory.
    """
    dims = [(size, *steps) for size, *steps in zip(shape, *strides, strict=True) if size != 1]
    dims.sort(key=lambda dim: dim[1 + order], reverse=True)
    merged: list[tuple[int, ...]] = []
    for inner in dims:
        if merged and all(o == i * inner[0] for o, i in zip(merged[-1][1:], inner[1:], strict=True)):
            merged[-1] = (merged[-1][0] * inner[0], *inner[1:])
        else:
            merged.append(inner)
    if not merged or merged == [(merged[0][0], *(1 for _ in strides))]:
        return []
    return [len(merged), *(value for column in zip(*merged, strict=True) for value in column)]


def to_tensor(values: array[int]) -> Tensor:
    """The values as int64 on the CPU."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(values, dtype=torch.int64).clone()
