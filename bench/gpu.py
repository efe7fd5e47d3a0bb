"""Everything on a machine with a GPU, in one call: `python -m bench.gpu`. Builds, tests, measures, writes the results.

Needs torch, triton, nvcc, numpy and pytest, and less than 10 minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def run(title: str, command: list[str], **env: str) -> bool:
    """Runs a command in the repository's root; returns whether it succeeded."""
    print(f"== {title}", flush=True)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, check=False)
    print(f"== {title}: exit status {done.returncode}, {time.monotonic() - begin:.0f} s", flush=True)
    return done.returncode == 0


def main(argv: list[str] | None = None) -> int:
    """Builds, tests and measures; returns the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder (default: bench/results)")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, "There is no GPU that torch can use: nothing was built, tested or measured.\n")
    deadline = time.monotonic() + args.seconds

    failed = not run("build", ["setup.py", "-q", "build_ext", "--inplace"], VSGD_KERNELS_CUDA="1")
    # The settings of pyproject.toml ask for plugins that need not be here.
    failed += not run("environment", ["-m", "vsgd_kernels", "env"])
    tests = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--durations=10", "tests/gpu"]
    failed += not run("tests", tests)

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
