"""Fixtures of the tests on a GPU."""

import pytest
import torch

from vsgd_kernels import backends
from vsgd_kernels.batch import DTYPES


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """The name of each backend that runs on a GPU. The tests fail, and are not skipped, where one is not available."""
    reason = backends.BACKENDS[request.param].why_unavailable()
    assert reason is None, reason
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    """Each dtype of parameters."""
    return request.param


@pytest.fixture(autouse=True)
def sync_is_allowed_again():
    """After a test in which the host may not wait for the device."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
