"""torch.set_default_device and set_default_dtype are for a program's own new tensors."""

import contextlib

import pytest
import torch

from tests.cases import assert_same_bits
from tests.optimizer_infos import Problem, each_info
from vsgd_kernels import authors_state_dict


@contextlib.contextmanager
def elsewhere():
    """New tensors are float64 and on another device, unless somebody says otherwise."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@each_info
@pytest.mark.parametrize(
    "kwargs",
    [
        {"capturable": True, "lr": torch.tensor(1e-2)},
        {"state_format": "q8", "master_weights": "split8"},
        {"state_format": "packed16", "master_weights": None},
    ],
    ids=["capturable", "q8, split8", "packed16, None"],
)
def test_default_device_and_dtype(info, kwargs, backend):
    """Are those of the program's new tensors, and no business of a step's."""
    problem, other = (Problem(torch.bfloat16 if "master_weights" in kwargs else torch.float32) for _ in range(2))
    here = info.optim_cls(problem.params, **kwargs, backend=backend)
    problem.train(here, 2)
    with elsewhere():
        twin = info.optim_cls(other.params, **kwargs, backend=backend)
    for _ in range(2):
        other.random_gradients()
        with elsewhere():
            twin.step()
            twin.load_state_dict(twin.state_dict())
            if info.name == "VSGD":
                assert authors_state_dict(twin)["state"][0]["pa2"].device.type == "cpu"
    assert_same_bits(problem.params, other.params)
    for param, own in zip(problem.params, other.params, strict=True):
        assert_same_bits(here.state[param].values(), twin.state[own].values())
