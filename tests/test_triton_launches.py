"""What the Triton backend has Triton launch, without a GPU (``fake_driver.py``)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_driver import STREAM
from vsgd_kernels.backends.triton import engine
from vsgd_kernels.rules import arithmetic_dtype

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", library, FOLDER / "fake_driver.c"], check=True)
    (library.parent / "libcuda.so").symlink_to(library)
    places = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(library.parent))
    places["TRITON_CACHE_DIR"] = str(library.parent / "cache")
    env = {**os.environ, **places, "TRITON_INTERPRET": "0", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, FOLDER / "fake_driver.py", library]
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output)


@pytest.mark.parametrize("capturable", [False, True])
def test_launches(printed, capturable):
    """The first, which Triton compiles, and those after it: on the current stream, with the tables' addresses."""
    own = [step for step in printed["steps"] if step["capturable"] == capturable]
    # Of a kind of arguments the first, which is compiled; the others are launched without Triton's search.
    assert [step["through Triton"] for step in own] == [1 + capturable, 0, 0, 1 + capturable, 0]
    for step in own:
        *counts, last = step["launched"]
        assert [launch["name"] for launch in step["launched"]] == ["count_kernel"] * capturable + ["step_kernel"]
        assert {launch["stream"] for launch in step["launched"]} == {STREAM}
        assert [launch["threads"] for launch in step["launched"]] == step["threads"][0 if capturable else 1 :]
        assert last["programs"] == 1 + 5 + 1
        assert last["arguments"][: len(step["stepped"])] == step["stepped"]
        for launch in counts:
            assert launch["programs"] == 1
            assert launch["arguments"][:3] == step["counted"]


def test_launch_hooks(printed):
    """Who observes Triton's launches sees those that did not go through its search."""
    *chains, first, second = printed["hooked"]
    assert chains == [[when, f"{kind}_kernel"] for kind in ("count", "step") for when in ("enter", "exit")]
    assert [first, second] == [["called", "count_kernel"], ["called", "step_kernel"]]
    assert [launch["stream"] for launch in printed["launched"]] == [STREAM] * 6


@pytest.mark.parametrize(
    ("style", "dtype", "elements", "programs", "warps"),
    [
        ("fp32", torch.float32, 64, 1, 1),
        ("fp32", torch.float32, 640_000, 10_000, 1),
        ("fp32", torch.float32, 3 * 129, 3, 2),
        ("bf16", torch.float32, 3 * 384, 3, 2),
        ("bf16", torch.bfloat16, 3 * 384 + 1, 3, 4),
        ("fp32", torch.float64, 128, 1, 2),
        ("fp32", torch.float32, 2**30, 2**20, 4),
        ("q8", torch.float32, 2**30, 2**20, 1),
        ("packed16", torch.float32, 2**30, 2**20, 1),
    ],
)
def test_warps(style, dtype, elements, programs, warps, shipped_triton_blocks):
    """As many as an average chunk has blocks for, and one for coded states."""
    assert engine.warps_of(style, arithmetic_dtype(dtype), elements, programs) == warps
