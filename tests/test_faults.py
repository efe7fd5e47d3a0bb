"""What goes wrong around an optimizer and must not go wrong in it; docs/reliability.md lists these and others."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vsgd_kernels
from tests.cases import assert_same_bits, check_step, gradient, make_params, step_counts, through_a_file
from vsgd_kernels import VSGD, state_formats

ROOT = Path(__file__).parent.parent
PACKAGE = Path(vsgd_kernels.__file__).parent


@pytest.mark.engine
def test_frozen_and_unfrozen(case, backend, generator):
    """A frozen parameter keeps value, state and count, weight decay or not; unfrozen, it goes on where it was."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    params = list(model.parameters())
    optimizer = case.optimizer(params, lr=1e-2, weight_decay=0.1, backend=backend)
    frozen = params[:2]
    for freeze in (False, True, True, False):
        for param in frozen:
            param.requires_grad_(not freeze)
        before = values_of(frozen, optimizer)
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        check_step(optimizer, params)
        if freeze:
            assert_same_bits(values_of(frozen, optimizer), before)
    assert step_counts(optimizer, params) == [2, 2, 4, 4]


def values_of(params, optimizer):
    return [value.clone() for p in params for value in (p.detach(), *optimizer.state.get(p, {}).values())]


@pytest.mark.engine
def test_a_rank_with_an_empty_shard(case, backend, generator):
    """Parameters cut in two, one half without elements: both step as in the whole, saved and loaded."""
    whole = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (30, 1, 200)]
    ranks = [[torch.nn.Parameter(p.detach()[cut].clone()) for p in whole] for cut in (slice(0, None), slice(0, 0))]
    optimizers = [case.optimizer(p, lr=1e-2, **case.plain(), backend=backend) for p in (whole, *ranks)]
    for i in range(4):
        for param, *shards in zip(whole, *ranks, strict=True):
            param.grad = gradient(param, generator)
            shards[0].grad, shards[1].grad = param.grad.clone(), param.grad[:0].clone()
        for optimizer in optimizers:
            optimizer.step()
        if i == 1:
            for k, own in enumerate(ranks):
                loaded = case.optimizer(own, lr=1.0, backend=backend)
                loaded.load_state_dict(through_a_file(optimizers[k + 1].state_dict()))
                optimizers[k + 1] = loaded
    assert_same_bits(values_of(whole, optimizers[0]), values_of(ranks[0], optimizers[1]))
    assert step_counts(optimizers[2], ranks[1]) == [4, 4, 4]


@pytest.mark.engine
def test_empty_in_any_layout(case, backend):
    """Strides of no element may be 0, which would be an overlap of others."""
    empty = torch.empty(2, 0, 0, 0, memory_format=torch.channels_last)
    params = [torch.nn.Parameter(t) for t in (empty, torch.empty(0, 4).expand(0, 4), torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    for _ in range(2):
        check_step(optimizer, params)


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_state_without_data(style, generator):
    """A checkpoint that was mapped to meta is refused."""
    param = torch.nn.Parameter(torch.randn(5000, generator=generator))
    param.grad = gradient(param, generator)
    optimizer = VSGD([param], lr=1e-2, state_format=style)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    on_meta = copy.deepcopy(saved)
    on_meta["state"][0] = {key: value.to("meta") for key, value in saved["state"][0].items()}
    with pytest.raises(ValueError, match=r"state of parameter 0: expected step to be a whole number .* found"):
        optimizer.load_state_dict(on_meta)
    on_meta["state"][0]["step"] = saved["state"][0]["step"]
    first = state_formats.keys(style, optimizer.rule)[0]
    with pytest.raises(ValueError, match=rf"state of parameter 0: expected {first} to .* have data, found .* meta"):
        optimizer.load_state_dict(on_meta)
    optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.state[param].values(), saved["state"][0].values())


@pytest.mark.parametrize("how", ["map_location", "mmap"])
def test_file_that_is_mapped(how, generator, tmp_path):
    """What torch.load maps to the CPU, or from the file itself, is the optimizer's own afterwards."""
    params = make_params(generator)
    optimizer = VSGD(params, lr=1e-2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    arguments = {"map_location": "cpu"} if how == "map_location" else {"mmap": True}
    saved = torch.load(tmp_path / "saved", weights_only=True, **arguments)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = VSGD(twins, lr=1.0)
    twin.load_state_dict(saved)
    before = copy.deepcopy(saved)
    for param, other in zip(params, twins, strict=True):
        other.grad = param.grad.clone()
    for own in (optimizer, twin):
        own.step()
    assert_same_bits(values_of(params, optimizer), values_of(twins, twin))
    assert_same_bits(saved["state"][0].values(), before["state"][0].values())


STEP = """
import sys
from importlib.machinery import PathFinder
class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
if sys.argv[2] == "triton":
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
import torch, vsgd_kernels
from vsgd_kernels.__main__ import main
assert vsgd_kernels.__file__.startswith(sys.argv[1]), vsgd_kernels.__file__
main(["env"])
def step(**arguments):
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0])); param.grad = torch.tensor([0.5, 3.0])
    vsgd_kernels.VSGD([param], lr=0.25, **arguments).step()
    return param.tolist()
print("steps alike", step() == step(backend="eager"))
try:
    step(backend=sys.argv[3])
except RuntimeError as error:
    print("refused", error)
"""

#: what is gone; the backend that misses it; the reason
MISSING = {
    "triton": ("triton", "triton is not installed; `pip install triton` brings it"),
    "kernels": ("cpp", "this installation of vsgd_kernels has no compiled kernels; with torch and a C++17 compiler"),
    "half of the kernels": ("cpp", "the compiled kernels _C.abi3.so lack their last"),
    "contents": ("cpp", "the compiled kernels _C.abi3.so do not load"),
    "CUDA code": ("cuda", "this installation of vsgd_kernels has no CUDA code; with nvcc installed"),
}


@pytest.fixture
def installed(tmp_path):
    """A copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "vsgd_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_not_there(missing, installed):
    """The package imports, `env` names the reason, the backend is refused with it, and a step is eager's."""
    backend, reason = MISSING[missing]
    (library,) = (installed / "vsgd_kernels").glob("_C*")
    whole = library.read_bytes()
    if missing == "kernels":
        library.unlink()
    elif backend == "cpp":
        library.write_bytes(whole[: len(whole) // 2] if missing == "half of the kernels" else b"not a library" * 1000)
    elif backend == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key("vsgd_kernels::_step_device", "CUDA"):
        pytest.skip("this installation has CUDA code")
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env["PYTHONPATH"] = str(installed)
    command = [sys.executable, "-c", STEP, str(installed), missing, backend]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=installed, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    (row,) = (line for line in lines if line.split()[:1] == [backend] and "no: " in line)
    assert f"no: {reason}" in row
    assert "steps alike True" in lines
    (refused,) = (line for line in lines if line.startswith("refused"))
    assert f"backend={backend!r} is not available: {reason}" in refused


def test_every_test_of_the_table_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 50
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
