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
from ...state_formats import has_blocks, keys
from ..device import Path, Prepared, StepLaunch
from ..device_samples import SampleLaunch, SamplePath
from ..on_device import ALIGNMENT
from .kernel import count_kernel, step_kernel
from .rules import RULES, SCALARS
from .samples import add_kernel
from .states import FORMATS

#: Of a program at most: four move float32 and bf16 states at 0.98 of a copy's speed on an H200, one at 0.95 and 0.96,
#: eight at 0.99 and 0.87 (a tensor of 1 GiB).
WARPS = 4
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


def warps_of(style: str, arithmetic: torch.dtype, elements: int, programs: int) -> int:
    """How many warps take a chunk: no more than an average one has blocks for.

    One warp's block is one block of q8's and packed16's codes: what the block's elements share, its words among it,
    then needs no memory that warps share and no barrier.
    """
    if has_blocks(style):
        return 1
    blocks = -(-elements // (programs * _block(arithmetic, 1)))
    return min(WARPS, 1 << (blocks.bit_length() - 1))  # a power of two


def _block(arithmetic: torch.dtype, warps: int) -> int:
    """Elements of a block: one widest access a thread and state."""
    return 32 * warps * ALIGNMENT // arithmetic.itemsize


def count(prepared: Prepared, launch: StepLaunch, found_inf: Tensor | None) -> None:
    """Counts a step of the launch's tensors, unless found_inf, and computes its scalars; on the current stream."""
    tensors = len(launch.rows)
    arguments = (launch.rows, prepared.hyper, launch.scalars, found_inf, tensors)

    def specialised() -> tuple[dict[str, Any], int]:
        return count_constants(prepared.batch.rule, launch.path), COUNT_WARPS

    _launch(launch, count_kernel, -(-tensors // TENSORS), arguments, specialised, _kind(found_inf))


def step(prepared: Prepared, launch: StepLaunch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Steps the launch's tensors, unless found_inf; on the current stream."""
    tables = (launch.rows, launch.grads, launch.layouts, launch.chunk_tensor, launch.first_chunk)
    arguments = (*tables, launch.scalar_row, launch.scalars, grad_scale, found_inf)

    def specialised() -> tuple[dict[str, Any], int]:
        warps = warps_of(launch.path.format, launch.arithmetic, launch.elements, launch.programs)
        return step_constants(prepared.batch.rule, launch.path, prepared.chunk, warps), warps

    _launch(launch, step_kernel, launch.programs, arguments, specialised, _kind(grad_scale), _kind(found_inf))


def add(launch: SampleLaunch, chunk: int) -> None:
    """Adds the launch's samples; on the current stream."""
    samples = (launch.rows, launch.samples, launch.counts)
    arguments = (*samples, launch.layouts, launch.chunk_tensor, launch.first_chunk)

    def specialised() -> tuple[dict[str, Any], int]:
        warps = warps_of("fp32", arithmetic_dtype(launch.path.dtype), launch.elements, launch.programs)
        return sample_constants(launch.path, chunk, warps), warps

    _launch(launch, add_kernel, launch.programs, arguments, specialised)


def _kind(scalar: Tensor | None) -> bool | None:
    """What Triton may compile a kernel anew for: whether there is a scalar, and whether it is aligned (on NVIDIA's)."""
    return None if scalar is None else scalar.data_ptr() % ALIGNMENT == 0


def _launch(
    launch: StepLaunch | SampleLaunch,
    kernel: Any,
    programs: int,
    arguments: Arguments,
    specialised: Callable[[], tuple[dict[str, Any], int]],
    *kinds: bool | None,
) -> None:
    """Launches a kernel on the current stream, with the compile-time arguments and warps that `specialised` returns.

    The next time, with arguments of the same kinds, it launches what was compiled: to have Triton find it again takes
    the host longer than the launch. Of Triton's hooks only those of a launch are called then. An interpreted kernel is
    not compiled.
    """
    key = (kernel.__name__, *kinds)
    if again := launch.compiled.get(key):
        again(arguments)
        return
    values, warps = specialised()
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
        if _is_idle(runtime.launch_enter_hook) and _is_idle(runtime.launch_exit_hook):
            # What there would be for hooks to read takes a third of a launch.
            run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *values)
        else:
            hooked(*addresses, *values, stream=stream)

    return again


def _is_idle(hook: Any) -> bool:
    """Whether a launch hook does nothing: Triton has a chain of hooks there, unless somebody has put something else."""
    return hook is None or getattr(hook, "calls", None) == []
