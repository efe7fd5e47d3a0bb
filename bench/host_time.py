"""The host's share of a step: `python -m bench.host_time`. Steps a thousand small tensors and more; needs no GPU.

What the backends for GPUs do on the host is measured without their kernels, and without CUDA: tables lie on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vsgd_kernels
from vsgd_kernels.backends.cuda import CudaBackend
from vsgd_kernels.ops import Launch

from .cases import make_params

STEPS = 200
#: Gradients of the next step: those of the last, or new ones as autograd makes them.
GRADIENTS = ("the same", "new")
#: A backend's method in which the kernels run.
KERNELS = {"cpp": "run", "cuda": "step"}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    if "model name" not in said:
        return platform.processor() or platform.machine()
    # Cloud machines' names leave out what tells their generations apart.
    return f"{said['model name']} (family {said.get('cpu family', '?')}, model {said.get('model', '?')})"


def environment() -> dict[str, str | int]:
    return {"cpu": cpu_model(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def check_folders(parser: argparse.ArgumentParser, *files: Path | None) -> None:
    """Ends the program now, rather than when all is measured, where there is no folder for a file."""
    for file in filter(None, files):
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no folder for {file}")


def host_us(work: Callable[[], object], steps: int, before: Callable[[], object] = lambda: None) -> float:
    """The median time of one call, in microseconds; what `before` does before each is not counted."""
    times = []
    for _ in range(steps):
        before()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


class Timed:
    """Adds up the time that is spent in a method of an object."""

    def __init__(self, owner: Any, name: str) -> None:
        self._method = getattr(owner, name)
        self.times: list[float] = []
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        """The method."""
        begin = time.perf_counter()
        result = self._method(*args)
        self.times.append(time.perf_counter() - begin)
        return result

    def median_us(self) -> float:
        """The median call, in microseconds."""
        return 1e6 * statistics.median(self.times)


def leave_kernels_out() -> None:
    """Has the `cuda` backend take tensors on the CPU, and launch nothing."""
    CudaBackend.on_host = True
    CudaBackend.step = lambda *_: None  # type: ignore[method-assign]


def measure(backend: str, tensors: int, gradients: str, steps: int) -> dict[str, str | int | float]:
    """The parts of a step of float32 tensors of 64 elements, in microseconds."""
    params = make_params([(64,)] * tensors)
    optimizer = vsgd_kernels.VSGD(params, lr=1e-2, backend=backend)

    def backward() -> None:
        if gradients == "new":
            optimizer.zero_grad()
            torch.cat(params).square().sum().backward()

    for _ in range(3):
        backward()
        optimizer.step()
    assert optimizer._stepper._plan is not None
    (launch, _), *_ = optimizer._stepper._plan._launches
    kernel, whole = Timed(launch.backend, KERNELS[backend]), Timed(launch, "run")
    step = host_us(optimizer.step, steps, backward)
    delattr(launch.backend, KERNELS[backend])
    assert isinstance(launch, Launch)
    return {
        "backend": backend,
        "tensors": tensors,
        "gradients": gradients,
        "host": step - kernel.median_us(),
        "check": step - whole.median_us(),
        "launch": whole.median_us() - kernel.median_us(),
        "kernel": kernel.median_us(),
    }


def main(argv: list[str] | None = None) -> None:
    from tabulate import tabulate  # here, for bench.gpu takes `host_us` and does not need it

    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time", description="Measures a step's cost to the host."
    )
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 1000, 10_000], metavar="N", help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    args = parser.parse_args(argv)
    check_folders(parser, args.json)
    torch.set_num_threads(args.threads)
    leave_kernels_out()
    rows = [measure(b, n, gradients, args.steps) for b in KERNELS for n in args.tensors for gradients in GRADIENTS]
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    print(
        f"CPU: {cpu_model()}; {args.threads} threads; torch {torch.__version__}; float32 tensors of 64 elements.\n"
        "Microseconds, medians. host = check + launch: step() without the kernel's call, which is dispatch and\n"
        "arithmetic. check: finding out whether the prepared launch serves, and torch's own code around step().\n"
        "launch: all but the kernel's call. New gradients are made by autograd, outside of the time. cuda: without\n"
        "kernels and GPU, as is triton but for Triton's own code.\n"
    )
    print(tabulate([list(row.values()) for row in rows], list(rows[0]), floatfmt=".0f"))


if __name__ == "__main__":
    main()
