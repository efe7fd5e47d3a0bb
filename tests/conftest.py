"""Fixtures: which backends and devices the tests run on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

# Files are tested side by side, and threads that spin while they wait take the processor from the others': the tests of
# training took 158 s instead of 5. OpenMP reads this when torch is imported, hence before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, hence before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter

from tests.cases import CASES
from vsgd_kernels import backends
from vsgd_kernels.arithmetic import fma
from vsgd_kernels.backends import library
from vsgd_kernels.backends.triton import engine, interpreted
from vsgd_kernels.formats import MASTER_WEIGHTS

VECTORS = Path(__file__).parent / "vectors"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "xdist_group(name): run by one process, for they share what is slow to start")
    config.addinivalue_line("markers", "engine: its subject is the same for every rule, so that VSGD stands for all")
    torch.set_num_threads(2)
    backends.BACKENDS["cuda"].on_host = not torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    """Leaves out what another parameter shows: an interpreted Triton block costs milliseconds, and there are many."""
    config.hook.pytest_deselected(items=[item for item in items if _is_shown_by_another(item)])
    items[:] = [item for item in items if not _is_shown_by_another(item)]


def _is_shown_by_another(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("case", "vsgd") == "vsgd":
        return False
    # How Triton reads and writes dtypes is VSGD's to show; mixed ones run for every rule.
    dtype_of_the_engine = params.get("backend") == "triton" and params.get("dtype", torch.float32) != torch.float32
    return dtype_of_the_engine or item.get_closest_marker("engine") is not None


SHIPPED_GEOMETRY = engine.warps_of, backends.BACKENDS["triton"].chunk


@pytest.fixture(scope="session", autouse=True)
def large_triton_blocks():
    """An interpreted block costs milliseconds whatever its size: 4096 elements a block, two blocks a program."""
    if interpreted():
        engine.warps_of, backends.BACKENDS["triton"].chunk = (lambda *_: 32), 8192


@pytest.fixture
def shipped_triton_blocks(monkeypatch):
    """As a GPU runs them."""
    warps_of, chunk = SHIPPED_GEOMETRY
    monkeypatch.setattr(engine, "warps_of", warps_of)
    monkeypatch.setattr(backends.BACKENDS["triton"], "chunk", chunk)


@pytest.fixture(scope="session", autouse=True)
def fma_of_the_interpreter():
    """Older versions of Triton's interpreter round an fma's product, which compiled kernels do not."""
    if interpreted() and not hasattr(interpreter._interpreter, "fma_fp32"):

        def create_fma(_, *handles):
            numbers = [torch.from_numpy(x.copy()) for x in np.broadcast_arrays(*(handle.data for handle in handles))]
            return interpreter.TensorHandle(fma(*numbers).numpy(), handles[-1].dtype.scalar)

        interpreter.InterpreterBuilder.create_fma = create_fma


@pytest.fixture(scope="session", autouse=True)
def range_of_the_interpreter():
    """Older versions of Triton's interpreter cannot count to a number that was computed, with numpy from 2.4 on."""
    if interpreted():
        patch_tensor = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch


@pytest.fixture(params=["cpp", "eager", *([] if torch.cuda.is_available() else ["triton", "cuda"])])
def backend(request):
    """The name of each backend that runs on the CPU. The suite fails, and does not skip, where one was not built."""
    reason = backends.BACKENDS[request.param].why_unavailable()
    assert reason is None, reason
    return request.param


@pytest.fixture(params=["compiled for this torch", "compiled", "python"])
def looks(request, monkeypatch):
    """Who notices that something has changed: each of `seen`'s ways."""
    if request.param != "compiled for this torch":
        monkeypatch.setattr(library, "module_of_this_torch", lambda: None)
    if request.param == "python":
        monkeypatch.setattr(library, "module", lambda: None)


@pytest.fixture
def vector():
    """Loads one of the float64 trajectories."""
    return lambda name: json.loads((VECTORS / f"{name}.json").read_text())


@pytest.fixture(params=sorted(CASES))
def case(request):
    """Each rule."""
    return CASES[request.param]


@pytest.fixture(params=list(MASTER_WEIGHTS), ids=str)
def mode(request):
    """Each `master_weights`."""
    return request.param


@pytest.fixture(params=["split8", None], ids=str)
def rounded(request):
    """Those that round."""
    return request.param


@pytest.fixture(params=["before the first step", "after a step"])
def stepped(request):
    """Whether optimizers have taken a step already."""
    return request.param == "after a step"


@pytest.fixture
def generator():
    """A source of random numbers, the same in every test."""
    return torch.Generator().manual_seed(0)
