"""The command line: `python -m vsgd_kernels env`, `inspect` and `memory`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys

import torch

from . import __version__, backends, machine_code, memory
from .backends import library
from .backends.cpp import CppBackend
from .rules import RULES
from .state_formats import FORMATS

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def environment() -> str:
    """Versions, threads, and each backend with the reason where it is not available, as lines of text."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    slower = library.why_not_of_this_torch()
    lines = [
        f"vsgd_kernels  {__version__}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton        {triton}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"step checks   {f'slower: {slower}' if slower else 'compiled for this torch'}",
        f"CUDA device   {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        "",
        "backend       runs on       available",
    ]
    for backend in backends.BACKENDS.values():
        devices = ", ".join(backend.device_types or ("any device",))
        reason = backend.why_unavailable()
        yes = f"yes, {backend.best_isa()}" if isinstance(backend, CppBackend) and reason is None else "yes"
        lines.append(f"{backend.name:13} {devices:13} {yes if reason is None else f'no: {reason}'}")
    try:
        requested = backends.requested(None)
        chosen = requested.name if requested else "not set: the first that is available and fits the device"
    except (ValueError, RuntimeError) as error:
        chosen = f"error: {error}"
    return "\n".join([*lines, "", f"{backends.VARIABLE}  {chosen}"])


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vsgd_kernels", description="Fused VSGD optimizers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions and which backends are available, and if not why")
    inspect = commands.add_parser(
        "inspect", help="compile every Triton kernel for a GPU that need not be there, which takes minutes"
    )
    inspect.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100 or gfx942 (default: %(default)s)")
    inspect.add_argument("--format", choices=FORMATS, help="of this state format only (default: of all)")
    inspect.add_argument("--rule", choices=RULES, nargs="+", help="of these rules only (default: of all)")
    inspect.add_argument("--json", action="store_true", help="print a JSON list of objects instead of a table")
    sizes = commands.add_parser("memory", help="print what training takes in each state format, beside AdamW")
    sizes.add_argument("--params", type=float, required=True, help="number of parameters, such as 7e9 or 124e6")
    sizes.add_argument("--rule", choices=RULES, default="vsgd", help="of the optimizer (default: %(default)s)")
    sizes.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the parameters (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        print(environment())
        return 0
    if arguments.command == "memory":
        if not 0 < arguments.params < math.inf:
            parser.error(f"--params must be greater than 0 and finite, got {arguments.params}")
        rows = memory.usage_of_count(arguments.params, _DTYPES[arguments.dtype], RULES[arguments.rule])
        print(memory.as_text(rows))
        return 0
    try:
        styles = [arguments.format] if arguments.format else FORMATS
        entries = machine_code.inspect(arguments.arch, styles, arguments.rule or RULES)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(json.dumps(entries, indent=1) if arguments.json else machine_code.as_text(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
