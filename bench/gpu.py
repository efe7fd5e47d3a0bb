"""Everything on a machine with a GPU, in one call: `python -m bench.gpu`. Builds, tests, measures, writes the results.

Needs torch, triton, nvcc, numpy and pytest, and less than 10 minutes; ninja and pytest-xdist make it faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
#: Seconds that the measurements take; the tests leave them.
MEASUREMENTS = 240
#: Processes that test side by side. Each takes half a GiB of the GPU's memory for itself.
MOST_PROCESSES = 16


def run(title: str, command: list[str], deadline: float, **env: str) -> bool:
    """Runs a command in the repository's root; returns whether it succeeded before the deadline."""
    print(f"== {title}", flush=True)
    begin = time.monotonic()
    timeout = max(1.0, deadline - begin)
    try:
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=False, timeout=timeout)
        ended = f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = "stopped, for time ran out"
    print(f"== {title}: {ended}, {time.monotonic() - begin:.0f} s", flush=True)
    return ended == "exit status 0"


def test_command() -> list[str]:
    """pytest's arguments. The settings of pyproject.toml ask for plugins that need not be here."""
    command = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--durations=5", "-rs", "tests/gpu"]
    if find_spec("xdist"):
        command += ["--numprocesses", str(min(os.cpu_count() or 1, MOST_PROCESSES)), "--dist", "loadgroup"]
    return command


def main(argv: list[str] | None = None) -> int:
    """Builds, tests and measures; returns the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder (default: bench/results)")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, "There is no GPU that torch can use: nothing was built, tested or measured.\n")
    deadline = time.monotonic() + args.seconds

    major, minor = torch.cuda.get_device_capability()
    build = ["setup.py", "-q", "build_ext", "--inplace"]
    failed = not run("build", build, deadline, VSGD_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    failed += not run("environment", ["-m", "vsgd_kernels", "env"], deadline)
    failed += not run("tests", test_command(), deadline - MEASUREMENTS)

    from . import gpu_cost, gpu_report  # not before the kernels are built

    print("== measurements", flush=True)
    environment = gpu_cost.environment()
    rows, left_out = gpu_cost.measure_all(deadline)
    results = {"environment": environment, "rows": rows, "left_out": left_out}
    gpu_report.write(results, args.out)
    print(gpu_report.markdown(results))
    return failed


if __name__ == "__main__":
    sys.exit(main())
