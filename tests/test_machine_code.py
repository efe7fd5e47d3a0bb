"""What Triton's kernel compiles to, for GPUs that need not be there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from vsgd_kernels import __main__, machine_code
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.rules import RULES

ROOT = Path(__file__).parent.parent
#: a kernel's name and code in a disassembly
KERNEL = re.compile(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", re.DOTALL)
#: operands that a step reads and writes: parameter, gradient, states
READS = {rule.name: 2 + len(rule.states) for rule in RULES.values()}
WRITES = {rule.name: 1 + len(rule.states) for rule in RULES.values()}


def inspect(arch):
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "vsgd_kernels", "inspect", "--arch", arch, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvidia(arch):
    entries = inspect(arch)
    assert {(e["rule"], e["kernel"], e["path"]) for e in entries} == {
        (rule, f"{str(dtype).removeprefix('torch.')} {layout}", path)
        for rule in RULES
        for dtype in DTYPES
        for layout in ("aligned", "misaligned", "strided")
        for path in ("full", "tail", "table")
    }
    assert all(e["local_bytes"] == 0 for e in entries)
    for entry in entries:
        if entry["kernel"] == "float32 aligned":
            assert entry["registers"] <= 64
        if entry["path"] == "table":
            assert not entry["stores"]
        if entry["path"] == "full" and entry["kernel"] in ("float32 aligned", "float64 aligned"):
            # One widest access for each operand, and no other.
            assert entry["loads"] == {"128": READS[entry["rule"]]}
            assert entry["stores"] == {"128": WRITES[entry["rule"]]}
        if entry["path"] == "full" and entry["kernel"] in ("bfloat16 aligned", "float16 aligned"):
            # Four elements a thread: parameter, gradient and low take 64 bits, states 128.
            states = READS[entry["rule"]] - 2
            assert entry["loads"] == {"64": 3, "128": states}
            assert entry["stores"] == {"64": 2, "128": states}


def test_amd():
    entries = inspect("gfx942")
    assert len(entries) == len(RULES) * len(DTYPES) * 3
    assert all(e["local_bytes"] == 0 and e["loads"] and e["stores"] for e in entries)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_kernels(tmp_path):
    """nvcc compiles them, without spilling; fp32's full path takes one 128-bit access for each operand."""
    command = ["nvcc", "-cubin", "-arch=sm_90", "-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    subprocess.run([*command, ROOT / "csrc" / "step_cuda.cu", "-o", tmp_path / "kernels.cubin"], check=True)
    assembly, usage = machine_code.disassemble((tmp_path / "kernels.cubin").read_bytes())
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    kernels = {name: machine_code.sass_accesses(code) for name, code in KERNEL.findall(assembly)}
    assert len(kernels) == len(resources) == len(RULES) * len(DTYPES) * 4  # three paths, and counting
    assert all(local == stack == "0" for _, _, stack, local in resources)
    # Names as the compiler mangles them: fp32, Path::aligned.
    fp32 = [name for name in kernels if "step_kernel" in name and "EfLNS_4PathE0E" in name]
    assert len(fp32) == len(RULES)
    assert all(int(registers) <= 64 for name, registers, _, _ in resources if name in fp32)
    for name in fp32:
        accesses = kernels[name]
        (rule,) = (rule for rule in RULES if f"{len(rule)}{rule.capitalize()}E" in name)
        assert accesses["full", "load", 128] == READS[rule]
        assert accesses["full", "store", 128] == WRITES[rule]


def test_refused(capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be like .*, got 'volta'"):
        machine_code.inspect("volta")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        __main__.main(["inspect"])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_text():
    entry = {"kernel": "float32 aligned", "rule": "vsgd", "format": "fp32", "path": "full", "registers": 48}
    text = machine_code.as_text([{**entry, "local_bytes": 0, "loads": {64: 1, 128: 5}, "stores": {}}])
    row = "| vsgd | fp32 | float32 aligned | full | 48 | 0 | 1 of 64, 5 of 128 | none |"
    assert text.splitlines()[-1] == row
