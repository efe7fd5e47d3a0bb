"""Fixtures: which backends and devices the tests run on."""

import json
from pathlib import Path

import pytest
import torch

from vsgd_kernels import backends

VECTORS = Path(__file__).parent / "vectors"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(2)


@pytest.fixture(params=sorted(backends.BACKENDS))
def backend(request):
    """Each backend's name; the suite fails, not skips, where one that should be built is not."""
    reason = backends.BACKENDS[request.param].why_unavailable()
    assert reason is None, reason
    return request.param


@pytest.fixture
def vector():
    """Loads one of the float64 trajectories."""
    return lambda name: json.loads((VECTORS / f"{name}.json").read_text())
