"""What Triton's kernel compiles to, for GPUs that need not be there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch.utils import cpp_extension

from vsgd_kernels import __main__, machine_code
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.formats import is_16_bit
from vsgd_kernels.rules import RULES
from vsgd_kernels.state_formats import FORMATS

ROOT = Path(__file__).parent.parent
#: a kernel's name and code in a disassembly
KERNEL = re.compile(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", re.DOTALL)
#: operands that a step reads and writes: parameter, gradient, states, and the variance of samples
READS = {rule.name: 2 + len(rule.states) + rule.samples for rule in RULES.values()}
WRITES = {rule.name: 1 + len(rule.states) for rule in RULES.values()}
OLDER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
LAYOUTS = ("aligned", "misaligned", "strided")
#: what C++ calls a rule
TYPES = {rule: rule.title().replace("_", "") for rule in RULES}


@pytest.fixture(scope="module")
def inspected():
    """Starts compilations, all at once; waits for one.

    Of VSGD every format for one target and fp32 for the others; of the other rules fp32 for one target.
    """
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "vsgd_kernels", "inspect", "--json", "--arch"]
    others = [rule for rule in RULES if rule != "vsgd"]
    running = {
        name: subprocess.Popen([*command, name.split()[0], *options], stdout=subprocess.PIPE, text=True, env=env)
        for name, options in (
            ("sm_90", ["--rule", "vsgd"]),
            ("sm_80", ["--rule", "vsgd", "--format", "fp32"]),
            ("sm_100", ["--rule", "vsgd", "--format", "fp32"]),
            ("gfx942", ["--rule", "vsgd", "--format", "fp32"]),
            ("sm_90 other rules", ["--format", "fp32", "--rule", *others]),
        )
    }

    def wait(name):
        output, _ = running[name].communicate()
        assert running[name].returncode == 0
        return json.loads(output)

    yield wait
    for process in running.values():
        process.kill()


def may_spill(entry):
    """Of float64's kernels, which ptxas keeps to 80 registers, one more, which the loop does not touch.

    Of 16-bit kernels of strided operands with packed16, which it keeps to 96, one with the ptxas of older Tritons.
    """
    strided_16_bit = entry["kernel"] in ("bfloat16 strided", "float16 strided") and entry["format"] == "packed16"
    return entry["kernel"].startswith("float64") or (OLDER_TRITON and strided_16_bit)


@pytest.mark.xdist_group("inspected")
@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "sm_100", "sm_90 other rules"])
def test_nvidia(inspected, arch):
    entries = inspected(arch)
    assert {(e["rule"], e["format"], e["kernel"], e["path"]) for e in entries} == {
        (rule, style, f"{str(dtype).removeprefix('torch.')} {layout}", path)
        for rule in RULES
        if (rule != "vsgd") == ("other" in arch)
        for style in (FORMATS if arch == "sm_90" else ["fp32"])
        for dtype in DTYPES
        if style == "fp32" or dtype != torch.float64
        for layout in (
            *LAYOUTS,
            *(("aligned split8", "aligned None") if style == "fp32" and is_16_bit(dtype) else ()),
            *(f"{each} samples" for each in LAYOUTS if rule == "sample_vsgd"),
        )
        for path in ("full", "tail", "table")
    }
    assert all(e["local_bytes"] <= (8 if may_spill(e) else 0) for e in entries)
    for entry in entries:
        reads, writes = READS[entry["rule"]], WRITES[entry["rule"]]
        wide = {"loads": entry["loads"], "stores": entry["stores"]}
        if entry["path"] == "table":
            assert not entry["stores"]
        if entry["path"] != "full":
            continue
        if entry["kernel"] in ("float32 aligned samples", "float64 aligned samples"):
            # Mean, variance and one sample after the other.
            assert wide == {"loads": {"128": 3}, "stores": {"128": 2}}
            assert entry["registers"] <= (64 if entry["kernel"].startswith("float32") else 72)
        if entry["kernel"] in ("bfloat16 aligned samples", "float16 aligned samples"):
            assert wide == {"loads": {"64": 1, "128": 2}, "stores": {"128": 2}}
        if entry["kernel"] == "float32 aligned" and entry["format"] == "fp32":
            assert entry["registers"] <= 64
        if entry["kernel"] in ("float32 aligned", "float64 aligned"):
            # One access for each operand, and no other: 16 bytes of float32, 8 of bf16 and packed16, 4 of q8. Words of
            # blocks are 4 bytes each, for those that a thread's lanes see, in two instructions for each state; of older
            # Tritons in three with q8, and in one more with packed16.
            states = WRITES[entry["rule"]] - 1
            assert (
                wide
                == {
                    "fp32": {"loads": {"128": reads}, "stores": {"128": writes}},
                    "bf16": {"loads": {"64": states, "128": 2}, "stores": {"64": states, "128": 1}},
                    "q8": {
                        "loads": {"32": (3 + OLDER_TRITON) * states, "128": 2},
                        "stores": {"32": 3 * states, "128": 1},
                    },
                    "packed16": {
                        "loads": {"32": 2 * states + OLDER_TRITON, "64": 1, "128": 2},
                        "stores": {"32": 2 * states, "64": 1, "128": 1},
                    },
                }[entry["format"]]
            )
        if entry["kernel"] in ("bfloat16 aligned", "float16 aligned") and entry["format"] == "fp32":
            # Four elements a thread: parameter, gradient and low take 64 bits, states 128.
            assert wide == {"loads": {"64": 3, "128": reads - 2}, "stores": {"64": 2, "128": writes - 1}}
        if entry["kernel"] in ("bfloat16 aligned split8", "float16 aligned split8"):
            lows = {"32": 1}
            assert wide == {
                "loads": {**lows, "64": 2, "128": reads - 2},
                "stores": {**lows, "64": 1, "128": writes - 1},
            }
        if entry["kernel"] in ("bfloat16 aligned None", "float16 aligned None"):
            assert wide == {"loads": {"64": 2, "128": reads - 2}, "stores": {"64": 1, "128": writes - 1}}


@pytest.mark.xdist_group("inspected")
def test_amd(inspected):
    entries = inspected("gfx942")
    assert len(entries) == len(DTYPES) * 3 + 4
    assert all(e["local_bytes"] == 0 and e["loads"] and e["stores"] for e in entries)


def compiled_by_nvcc(source, folder):
    """Of each kernel registers, stack and local memory, and its accesses."""
    command = ["nvcc", "-cubin", "-arch=sm_90", "-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    subprocess.run([*command, ROOT / "csrc" / source, "-o", folder / "kernels.cubin"], check=True)
    assembly, usage = machine_code.disassemble((folder / "kernels.cubin").read_bytes())
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    return resources, {name: machine_code.sass_accesses(code) for name, code in KERNEL.findall(assembly)}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_kernels_of_samples(tmp_path):
    """One 128-bit access for the mean, the variance and each sample on the full path."""
    resources, kernels = compiled_by_nvcc("samples_cuda.cu", tmp_path)
    assert len(kernels) == len(resources) == len(DTYPES) * len(LAYOUTS)
    assert all(local == "0" for *_, local in resources)
    (name,) = (name for name in kernels if "IfLNS_4PathE0E" in name)  # float, Path::aligned
    assert [int(stack) for each, _, stack, _ in resources if each == name] == [0]
    assert [int(registers) <= 64 for each, registers, *_ in resources if each == name] == [True]
    assert kernels[name]["full", "load", 128] == 3
    assert kernels[name]["full", "store", 128] == 2


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_kernels(tmp_path):
    """nvcc compiles them, without spilling; fp32's full path takes one 128-bit access for each operand."""
    resources, kernels = compiled_by_nvcc("step_cuda.cu", tmp_path)
    # Three paths for each dtype and format, double having one format; and counting, for each dtype.
    assert len(kernels) == len(resources) == len(RULES) * (3 * (3 * len(FORMATS) + 1) + len(DTYPES))
    assert all(stack == local == "0" for _, _, stack, local in resources)
    # Names as the compiler mangles them: float, Format::fp32, Path::aligned.
    fp32 = [name for name in kernels if "step_kernel" in name and "EfLNS_6FormatE0ELNS_4PathE0E" in name]
    assert len(fp32) == len(RULES)
    assert all(int(registers) <= 64 for name, registers, _, _ in resources if name in fp32)
    for name in fp32:
        accesses = kernels[name]
        (rule,) = (rule for rule, type_ in TYPES.items() if f"{len(type_)}{type_}E" in name)
        assert accesses["full", "load", 128] == READS[rule]
        assert accesses["full", "store", 128] == WRITES[rule]


def test_refused(capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be like .*, got 'volta'"):
        machine_code.inspect("volta")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        __main__.main(["inspect"])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_machine_code_that_the_tools_do_not_know():
    """nvdisasm no longer reads what Triton still compiles for the oldest."""
    with pytest.raises(RuntimeError, match="nvdisasm cannot read the machine code: nvdisasm"):
        machine_code.disassemble(b"no machine code")


def test_text():
    entry = {"kernel": "float32 aligned", "rule": "vsgd", "format": "fp32", "path": "full", "registers": 48}
    text = machine_code.as_text([{**entry, "local_bytes": 0, "loads": {64: 1, 128: 5}, "stores": {}}])
    row = "| vsgd | fp32 | float32 aligned | full | 48 | 0 | 1 of 64, 5 of 128 | none |"
    assert text.splitlines()[-1] == row
