"""What a step finds: compiled, and as Python says it where nothing is compiled."""

import subprocess
import sys

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from vsgd_kernels.backends import library
from vsgd_kernels.backends.seen import identities, look


@pytest.fixture(params=["compiled", "python"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(library, "module", lambda: None)
    else:
        assert library.module() is not None


@pytest.fixture
def params():
    """Several layouts, one without a gradient."""
    shapes = ((4, 6), (), (3,), (1, 5), (0,))
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for param in (*params[:2], *params[3:]):
        param.grad = torch.ones_like(param)
    return params


def test_gradients(params):
    seen = look([params[:2], params[2:]])
    grads = [param.grad for param in params if param.grad is not None]
    assert [id(grad) for grad in seen.tensors] == [id(grad) for grad in grads]
    assert seen.addresses.tolist() == [grad.data_ptr() for grad in grads]
    assert look([params[2:3]]).addresses.tolist() == []


def test_only_addresses_of_gradients_may_change(params):
    before = look([params])
    kept = [param.grad for param in params]
    for param in (*params[:2], *params[3:]):
        param.grad = torch.zeros_like(param)
    after = look([params])
    assert after.layouts == before.layouts
    assert after.layouts is not None
    assert after.addresses.tolist() != before.addresses.tolist()
    assert len(kept) == len(params)


def swap(param):
    torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach().clone()))


CHANGES = {
    "data elsewhere": lambda p: setattr(p[0], "data", p[0].data.clone()),
    "data transposed": lambda p: setattr(p[0], "data", p[0].data.view(6, 4).t()),
    "gradient of other strides": lambda p: setattr(p[0].grad, "data", p[0].grad.data.view(6, 4).t()),
    "gradient of other shape": lambda p: setattr(p[0].grad, "data", p[0].grad.data.view(6, 4)),
    "gradient of other dtype": lambda p: setattr(p[0].grad, "data", p[0].grad.data.view(torch.int32)),
    "gradient gone": lambda p: setattr(p[1], "grad", None),
    "gradient come": lambda p: setattr(p[2], "grad", torch.ones(3)),
    "another tensor in the same object": lambda p: swap(p[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(params, change):
    before = look([params]).layouts
    CHANGES[change](params)
    assert look([params]).layouts != before


WITHOUT_MEMORY = {
    "sparse": torch.ones(3).to_sparse(),
    "zero": torch._efficientzerotensor(3),
    "wrapper": TwoTensor(torch.ones(6)[3:], torch.ones(6)[3:]),  # whose offset is no address
}


@pytest.mark.parametrize("grad", WITHOUT_MEMORY.values(), ids=list(WITHOUT_MEMORY))
def test_gradient_without_memory(params, grad):
    params[2].grad = grad
    seen = look([params])
    assert seen.layouts is None
    assert seen.tensors[2] is grad


def test_identities():
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    same = identities([[a, b], {"x": c, "y": d}])
    assert identities([[a, b], {"x": c, "y": d}]) == same
    assert identities([[a, b], {"y": c, "x": d}]) != same
    # Dicts in a dict are looked at by themselves.
    assert identities([{"x": {}, "y": c}]) == identities([{"x": {}, "y": c}])
    for other in ([[a, b], {"x": d, "y": c}], [[a], [b], {"x": c, "y": d}], [[a, b], {"x": c}], [[a, b, c], {"y": d}]):
        assert identities(other) != same


STEP = """
import torch, vsgd_kernels
from vsgd_kernels.backends import library
from vsgd_kernels.backends.seen import identities, look
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = vsgd_kernels.VSGD([param])
optimizer.step()
print(library.module() is None, optimizer._stepper._plan._launches[0][0].backend.name, param.tolist())
"""


def test_another_version_of_torchs_table():
    """Then Python looks at tensors, and the kernels step them."""
    without = "import torch; del torch.Tensor.__dlpack_c_exchange_api__"
    outputs = [
        subprocess.run([sys.executable, "-c", code + STEP], capture_output=True, text=True, check=True).stdout
        for code in (without, "")
    ]
    assert outputs[0].startswith("True cpp ")
    assert outputs[1] == outputs[0].replace("True", "False")
