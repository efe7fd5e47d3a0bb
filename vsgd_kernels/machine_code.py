"""What Triton's kernel compiles to for a GPU that need not be there: `python -m vsgd_kernels inspect --arch sm_90`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backends import device
from .backends.device_samples import SamplePath
from .backends.triton import TritonBackend, interpreted
from .batch import DTYPES
from .formats import is_16_bit, low_dtype
from .rules import RULES, Rule, arithmetic_dtype
from .state_formats import FORMATS

_LAYOUTS = ("aligned", "misaligned", "strided")
#: Bits of an access by what its SASS opcode ends in; without any of these it has 32.
_SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_SASS = re.compile(r"(?P<op>LDG|STG)\.E(?P<suffixes>[.\w]*)")
#: The paths by the eviction hints that access.py gives their accesses.
_SASS_PATHS = {"EL": "table", "EF": "tail"}
_GCN = re.compile(r"(?:global|flat|buffer)_(?P<op>load|store)_[us]?(?P<kind>byte|short|dwordx\d|dword)")
_GCN_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def inspect(
    arch: str, styles: Iterable[str] = tuple(FORMATS), rules: Iterable[str] = tuple(RULES)
) -> list[dict[str, Any]]:
    """Compiles every kernel for a target.

    Args:
        arch: "sm_80", "sm_90", "sm_100" …, or "gfx942" and the like.
        styles: of which state formats.
        rules: of which rules.

    Returns:
        For each rule, dtype, layout and path an object with

        - kernel: dtype of the parameters, and whether addresses are "aligned" to 16 bytes, "misaligned" or "strided".
          `master_weights` is "exact", but for two more kernels of each 16-bit dtype, which name theirs. Those that add
          samples, for a rule that takes them, end in "samples"; they have format "fp32";
        - rule, format: the update rule, and how its states are stored;
        - path: "full" for blocks that lie wholly inside a tensor, "tail" for a tensor's last block, "table" for what a
          program reads of the tables; for AMD targets "all", whose code does not tell them apart;
        - registers a thread, local_bytes of spilled registers a thread (of the kernel as a whole);
        - loads, stores: {bits of an access: number of instructions}.

    Raises:
        ValueError: the target is not known.
        RuntimeError: Triton is missing, interprets kernels instead of compiling them, or cannot compile for the target.
    """
    if not re.fullmatch(r"sm_\d{2,3}|gfx\w+", arch):
        raise ValueError(f"arch must be like 'sm_90' or 'gfx942', got {arch!r}")
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels and cannot compile them; unset it")
    return [
        {"kernel": name, "rule": rule, "format": style, **entry}
        for rule in rules
        for style in styles
        for name, kernel in _kernels(RULES[rule], style)
        for entry in _entries(_compile(kernel, arch), arch)
    ]


class _Kernel(NamedTuple):
    """A kernel as the engine would launch it, of which the first arguments are tables and the others constants."""

    function: str
    tables: dict[str, str]
    constants: dict[str, Any]
    warps: int


def _kernels(rule: Rule, style: str) -> Iterator[tuple[str, _Kernel]]:
    """Names and kernels of a rule in one state format."""
    for dtype in DTYPES:
        if dtype == torch.float64 and style != "fp32":
            continue  # it has no other format
        variants: list[tuple[str, str | None]] = [(layout, "exact") for layout in _LAYOUTS]
        if is_16_bit(dtype) and style == "fp32":
            variants += [("aligned", "split8"), ("aligned", None)]
        for layout, masters in variants:
            low = low_dtype(masters, dtype)
            extra = 0 if low is None else 8 * low.itemsize
            name = f"{_name(dtype)} {layout}" + ("" if masters == "exact" else f" {masters}")
            yield name, _step_kernel(rule, device.Path(dtype, *_accesses(layout), style, extra))
        if rule.samples and style == "fp32":
            for layout in _LAYOUTS:
                yield f"{_name(dtype)} {layout} samples", _add_kernel(SamplePath(dtype, *_accesses(layout)))


def _accesses(layout: str) -> tuple[bool, bool]:
    """Whether addresses are aligned, and operands strided."""
    return layout != "misaligned", layout == "strided"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_kernel(rule: Rule, path: device.Path) -> _Kernel:
    engine = _engine()
    arithmetic = arithmetic_dtype(path.dtype)
    scalars = "*fp64" if arithmetic == torch.float64 else "*fp32"
    tables = {"rows": "*i64", "grads": "*i64", "layouts": "*i64", "chunk_tensor": "*i32", "first_chunk": "*i64"}
    tables |= {"scalar_row": "*i64", "scalars": scalars}
    absent = {"grad_scale": None, "found_inf": None}
    warps = engine.warps_of(path.format, arithmetic, TritonBackend.chunk, 1)  # of large tensors
    constants = engine.step_constants(rule, path, TritonBackend.chunk, warps)
    return _Kernel("step_kernel", tables, {**absent, **constants}, warps)


def _add_kernel(path: SamplePath) -> _Kernel:
    engine = _engine()
    tables = {"rows": "*i64", "samples": "*i64", "counts": "*i64", "layouts": "*i64", "chunk_tensor": "*i32"}
    warps = engine.warps_of("fp32", arithmetic_dtype(path.dtype), TritonBackend.chunk, 1)
    constants = engine.sample_constants(path, TritonBackend.chunk, warps)
    return _Kernel("add_kernel", {**tables, "first_chunk": "*i64"}, constants, warps)


def _engine() -> Any:
    try:
        from .backends.triton import engine
    except ImportError as error:
        raise RuntimeError(f"triton is not installed ({error}); `pip install triton` brings it") from error
    return engine


def _compile(kernel: _Kernel, arch: str) -> Any:
    """The kernel compiled for a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    engine = _engine()
    signature = {**kernel.tables, **dict.fromkeys(kernel.constants, "constexpr")}
    function = getattr(engine, kernel.function)
    tables = [param for param in function.params if param.name in kernel.tables]
    aligned = {(p.num,): [["tt.divisibility", 16]] for p in tables if not p.do_not_specialize_on_alignment}
    source = ASTSource(function, signature, constexprs=kernel.constants, attrs=aligned)
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    try:
        return triton.compile(source, target=target, options={"num_warps": kernel.warps, **engine.OPTIONS})
    except Exception as error:
        raise RuntimeError(f"Triton cannot compile for arch={arch!r}: {error}") from error


def _entries(compiled: Any, arch: str) -> Iterator[dict[str, Any]]:
    if arch.startswith("sm_"):
        assembly, usage = disassemble(compiled.asm["cubin"])
        registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL"))
        local += stack  # where spilled registers are
        accesses = sass_accesses(assembly)
    else:
        assembly = compiled.asm["amdgcn"]
        fields = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        registers, local = (int(re.findall(field, assembly)[0]) for field in fields)
        accesses = Counter(("all", match["op"], _GCN_BITS[match["kind"]]) for match in _GCN.finditer(assembly))
    for path in sorted({path for path, _, _ in accesses}):
        yield {
            "path": path,
            "registers": registers,
            "local_bytes": local,
            "loads": _by_bits(accesses, path, "load"),
            "stores": _by_bits(accesses, path, "store"),
        }


def _by_bits(accesses: Counter[tuple[str, str, int]], path: str, op: str) -> dict[int, int]:
    return {bits: n for (p, o, bits), n in sorted(accesses.items()) if (p, o) == (path, op)}


def sass_accesses(assembly: str) -> Counter[tuple[str, str, int]]:
    """(path, load or store, bits) -> instructions."""
    accesses: Counter[tuple[str, str, int]] = Counter()
    for match in _SASS.finditer(assembly):
        suffixes = match["suffixes"].split(".")
        path = next((_SASS_PATHS[suffix] for suffix in suffixes if suffix in _SASS_PATHS), "full")
        bits = next((_SASS_BITS[suffix] for suffix in suffixes if suffix in _SASS_BITS), 32)
        accesses[path, "load" if match["op"] == "LDG" else "store", bits] += 1
    return accesses


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code as text, and the resources that it uses."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        try:
            outputs = [
                subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout
                for tool, option in commands
            ]
        except subprocess.CalledProcessError as error:  # Triton's tools no longer know what it still compiles for
            raise RuntimeError(
                f"{Path(error.cmd[0]).name} cannot read the machine code: {error.stderr.strip()}"
            ) from error
    return outputs[0], outputs[1]


def as_text(entries: list[dict[str, Any]]) -> str:
    """The entries as a Markdown table."""
    lines = [
        "| rule | format | kernel | path | registers | local bytes | loads | stores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        widths = (", ".join(f"{n} of {bits}" for bits, n in entry[op].items()) or "none" for op in ("loads", "stores"))
        names = (entry[key] for key in ("rule", "format", "kernel", "path", "registers", "local_bytes"))
        lines.append("| " + " | ".join(map(str, (*names, *widths))) + " |")
    return "\n".join(lines)
