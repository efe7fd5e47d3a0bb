"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rules import BOUNDS, Rule, arithmetic_dtype
from ...state_formats import keys
from ..device import Path, Prepared, StepLaunch
from ..device_samples import SampleLaunch, SamplePath
from ..on_device import ALIGNMENT
from .kernel import count_kernel, step_kernel
from .rules import RULES, SCALARS
from .samples import add_kernel
from .states import FORMATS

#: Of a program. One warp's block is one block of q8's and packed16's codes: what the block's elements share, its words
#: among it, then needs no memory that warps share and no barrier.
WARPS = 1
TENSORS, COUNT_WARPS = 128, 4  # of a program that counts

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
Arguments = tuple[Tensor | int | None, ...]
#: Products and sums are fused where the code says so, as in the C++ kernel, so that both give the same bits.
OPTIONS = {"enable_fp_fusion": False}


@lru_cache
def step_constants(rule: Rule, path: Path, chunk: int, warps: int) -> dict[str, Any]:
    """The compile-time arguments of `step_kernel` for one rule and path."""
    arithmetic = arithmetic_dtype(path.dtype)
    return {
        "UPDATE": RULES[rule.name],
        "LOAD": FORMATS[path.format][0],
        "STORE": FORMATS[path.format][1],
        "STATES": len(rule.states),
        "STORED": len(keys(path.format, rule)),
        "RATES": sum((key in rule.rates) << k for k, key in enumerate(rule.states)),
        "DRAWS": rule.draws,
        "SAMPLES": rule.samples,
        "SCALARS": rule.scalar_count,
        "EXTRA": path.extra,
        "PARAM": TRITON_DTYPES[path.dtype],
        "ARITHMETIC": TRITON_DTYPES[arithmetic],
        "TINY": BOUNDS[arithmetic].tiny,
        "BIG": BOUNDS[arithmetic].big,
        "ALIGN": ALIGNMENT if path.aligned else 1,
        "STRIDED": path.strided,
        "BLOCK": _block(arithmetic, warps),
        "CHUNK": chunk,
    }


@lru_cache
def count_constants(rule: Rule, path: Path) -> dict[str, Any]:
    """The compile-time arguments of `count_kernel`."""
    arithmetic = arithmetic_dtype(path.dtype)
    return {
        "SCALARS_OF": SCALARS[rule.name],
        "HYPERS": len(rule.hyper),
        "SCALARS": rule.scalar_count,
        "ARITHMETIC": TRITON_DTYPES[arithmetic],
        "TINY": BOUNDS[arithmetic].tiny,
        "BIG": BOUNDS[arithmetic].big,
        "TENSORS": TENSORS,
    }


@lru_cache
def sample_constants(path: SamplePath, chunk: int, warps: int) -> dict[str, Any]:
    """The compile-time arguments of `add_kernel` for one path."""
    arithmetic = arithmetic_dtype(path.dtype)
    return {
        "SAMPLE": TRITON_DTYPES[path.dtype],
        "ARITHMETIC": TRITON_DTYPES[arithmetic],
        "BIG": BOUNDS[arithmetic].big,
        "ALIGN": ALIGNMENT if path.aligned else 1,
        "STRIDED": path.strided,
        "BLOCK": _block(arithmetic, warps),
        "CHUNK": chunk,
    }


def _block(arithmetic: torch.dtype, warps: int) -> int:
    """Elements of a block: one widest access a thread and state."""
    return 32 * warps * ALIGNMENT // arithmetic.itemsize


def count(prepared: Prepared, launch: StepLaunch, found_inf: Tensor | None) -> None:
    """Counts a step of the launch's tensors, unless found_inf, and computes its scalars; on the current stream."""
    tensors = len(launch.rows)
    arguments = (launch.rows, prepared.hyper, launch.scalars, found_inf, tensors)

    def constants() -> dict[str, Any]:
        return count_constants(prepared.batch.rule, launch.path)

    _launch(launch, count_kernel, -(-tensors // TENSORS), arguments, constants, COUNT_WARPS, _kind(found_inf))


def step(prepared: Prepared, launch: StepLaunch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Steps the launch's tensors, unless found_inf; on the current stream."""
    tables = (launch.rows, launch.grads, launch.layouts, launch.chunk_tensor, launch.first_chunk)
    arguments = (*tables, launch.scalar_row, launch.scalars, grad_scale, found_inf)

    def constants() -> dict[str, Any]:
        return step_constants(prepared.batch.rule, launch.path, prepared.chunk, WARPS)

    _launch(launch, step_kernel, launch.programs, arguments, constants, WARPS, _kind(grad_scale), _kind(found_inf))


def add(launch: SampleLaunch, chunk: int) -> None:
    """Adds the launch's samples; on the current stream."""
    samples = (launch.rows, launch.samples, launch.counts)
    arguments = (*samples, launch.layouts, launch.chunk_tensor, launch.first_chunk)

    def constants() -> dict[str, Any]:
        return sample_constants(launch.path, chunk, WARPS)

    _launch(launch, add_kernel, launch.programs, arguments, constants, WARPS)


def _kind(scalar: Tensor | None) -> bool | None:
    """What Triton may compile a kernel anew for: whether there is a scalar, and whether it is aligned (on NVIDIA's)."""
    return None if scalar is None else scalar.data_ptr() % ALIGNMENT == 0


def _launch(
    launch: StepLaunch | SampleLaunch,
    kernel: Any,
    programs: int,
    arguments: Arguments,
    constants: Callable[[], dict[str, Any]],
    warps: int,
    *kinds: bool | None,
) -> None:
    """Launches a kernel on the current stream.

    The next time, with arguments of the same kinds, it launches what was compiled: to have Triton find it again takes
    the host longer than the launch. Of Triton's hooks only those of a launch are called then. An interpreted kernel is
    not compiled.
    """
    key = (kernel.__name__, *kinds)
    if again := launch.compiled.get(key):
        again(arguments)
        return
    values = constants()
    compiled = kernel[(programs,)](*arguments, **values, num_warps=warps, **OPTIONS)
    if compiled is not None:
        launch.compiled[key] = _compiled_launch(compiled, programs, launch.rows.device.index, values)


def _compiled_launch(
    compiled: Any, programs: int, device: int, constants: dict[str, Any]
) -> Callable[[Arguments], None]:
    """Launches what was compiled, with other arguments.

    For tensors it passes their addresses: of a tensor Triton asks the driver whether the device may read it.
    """
    values = tuple(constants.values())
    hooked = compiled[(programs, 1, 1)]  # also loads it
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    runtime = triton.knobs.runtime

    def again(arguments: Arguments) -> None:
        addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        stream = torch._C._cuda_getCurrentRawStream(device)
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            hooked(*addresses, *values, stream=stream)
        else:  # what there would be for hooks to read takes half of the time
            run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *values)

    return again
