"""What a step costs on a GPU: times, bandwidth, launches, memory; used by `python -m bench.gpu`."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial

import torch

from .cases import BASELINE, GPU_CASES, GPU_OPTIMIZERS, Entry, count, make_params
from .host_time import cpu_model, host_us

Row = dict[str, str | int | float | None]

WARMUP, SLOW_STEPS, STEPS = 3, 3, 30
#: The device's clock, in cycles a microsecond: not less than any GPU's.
CYCLES_PER_US = 2500


def environment() -> dict[str, str | float]:
    """The GPU, its driver, versions, and the bandwidth that a copy reaches."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cpu": cpu_model(),
        "commit": _output_of("git", "describe", "--always", "--dirty"),
        "copy_gb_per_s": copy_bandwidth(),
    }


def _output_of(*command: str) -> str:
    """The first line that a command prints, or "unknown" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def copy_bandwidth(numel: int = 2**30) -> float:
    """GB/s of a copy within the device, read and written, over 4 GiB of float32."""
    source = torch.randn(numel, device="cuda")
    to = torch.empty_like(source)
    return 8 * numel / device_ms(lambda: to.copy_(source), STEPS) / 1e6


def device_ms(work: Callable[[], object], times: int) -> float:
    """The median time that the device takes for what one call gives it to do; the host's time is not in it.

    Each call is queued behind a wait that lasts longer than the host takes for it. A thousand kernels fit the queue.
    """
    wait = int(2.0 * host_us(work, WARMUP, before=torch.cuda.synchronize) * CYCLES_PER_US)
    return statistics.median(_queued(work, wait) for _ in range(times))


def _queued(work: Callable[[], object], wait: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(wait)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def step_ms(work: Callable[[], object], times: int) -> float:
    """The time of one call among many that follow on each other, the host's share among it as far as it is longer."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / times


def kernels(work: Callable[[], object]) -> list[str]:
    """The names of the kernels that one call launches; copies and fills of memory are none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_device = (e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


def peak_mib(work: Callable[[], object]) -> float:
    """MiB that one call allocates beyond what is there before and after."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def replay_of(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """What replays a step that is captured now; it keeps the optimizer, whose tables the graph reads."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return partial(_replay, graph, optimizer)


def _replay(graph: torch.cuda.CUDAGraph, _: torch.optim.Optimizer) -> None:
    graph.replay()


def measure(case: str, name: str, entry: Entry) -> Row:
    """Measures one optimizer over the parameters of one case, float32."""
    params = make_params(GPU_CASES[case], "cuda")
    numel, optimizer = count(GPU_CASES[case]), entry.make(params)
    times = SLOW_STEPS if entry.slow else STEPS
    optimizer.step()
    step = replay_of(optimizer) if entry.replayed else optimizer.step
    ms = None if entry.slow else device_ms(step, times)  # what is slow launches more kernels than fit the queue
    return {
        "case": case,
        "optimizer": name,
        "parameters": numel,
        "tensors": len(params),
        "device_ms": ms,
        "gb_per_s": ms and entry.bytes_per_parameter * numel / ms / 1e6,
        "step_ms": step_ms(step, times),
        "host_us": host_us(step, times, before=torch.cuda.synchronize),  # the device has nothing to do
        "launches": len(kernels(step)),
        "peak_mib": peak_mib(step),
        "byte_limit_ratio": entry.bytes_per_parameter / GPU_OPTIMIZERS[BASELINE].bytes_per_parameter,
    }


def measure_all(deadline: float) -> tuple[list[Row], list[str]]:
    """Every optimizer over every case, until `deadline` (of time.monotonic): the rows, and what time lacked for."""
    rows: list[Row] = []
    left_out: list[str] = []
    for case in GPU_CASES:
        for name, entry in GPU_OPTIMIZERS.items():
            if time.monotonic() > deadline:
                left_out.append(f"{case}, {name}")
                continue
            rows.append(measure(case, name, entry))
            torch.cuda.empty_cache()
            print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
    baselines = {row["case"]: row for row in rows if row["optimizer"] == BASELINE}
    for row in rows:
        baseline = baselines.get(row["case"])
        for key in ("device", "step"):
            ms = row[f"{key}_ms"]
            row[f"{key}_ratio"] = ms / baseline[f"{key}_ms"] if baseline and ms else None
    return rows, left_out
