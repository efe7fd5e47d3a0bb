"""The norm of all gradients: as torch finds it, and in the C++ backend's one pass."""

import math

import pytest
import torch

from tests.cases import assert_norm, assert_same_bits, each_isa, layouts
from vsgd_kernels import VSGD, clipping
from vsgd_kernels.batch import DTYPES


def of_a_step(params):
    optimizer = VSGD(params, lr=1e-2, max_grad_norm=1.0, backend="cpp")
    optimizer.step()
    return optimizer.grad_norm


@pytest.fixture(params=[clipping.global_norm, of_a_step])
def norm(request):
    """Either way, of parameters."""
    return request.param


def params_of(shapes, generator, dtypes=(torch.float32,)):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes for dtype in dtypes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return params


@pytest.mark.parametrize("name", layouts(torch.float32, torch.Generator()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(norm, name, dtype, generator):
    values, grad = layouts(dtype, generator)[name]
    param = torch.nn.Parameter(values)
    param.grad = grad
    assert_norm(norm([param]), [grad], dtype)


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1024, 1025, 2**20 + 1, 2**22 + 1027])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(norm, numel, dtype, generator):
    """Many squares are added up without loss; torch's own norm of float32 is 7e-5 off at the largest."""
    param = torch.nn.Parameter(torch.zeros(numel, dtype=dtype))
    param.grad = torch.rand(numel, generator=generator).to(dtype)
    assert_norm(norm([param]), [param.grad], dtype)


def test_mixed_dtypes(norm, generator):
    """The norm is float64, but no more exact than the least of them is added up."""
    params = params_of(((5, 7), (4096,), (2, 5000), (), (0,)), generator, DTYPES)
    found = norm(params)
    assert found.dtype == torch.float64
    assert_norm(found.float(), [param.grad for param in params], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype, generator, monkeypatch):
    """With each instruction set and number of threads; also where a gradient is strided, or in the way of threads."""
    params = params_of(((300, 70), (40_000,), (3,), (0,), (100, 1030)), generator, (dtype,))
    params[-1].grad = params[-1].grad.view(1030, 100).t()
    norms = [of_a_step(params) for _ in each_isa(monkeypatch)]
    assert len(norms) > 1
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        norms.append(of_a_step(params))
        torch.set_num_threads(before)
    assert_same_bits(norms[1:], norms[:1] * (len(norms) - 1))


def test_range():
    """Squares beyond float32 and below it."""
    for value in (1e-30, 1e30):
        param = torch.nn.Parameter(torch.zeros(3000))
        param.grad = torch.full((3000,), value)
        assert of_a_step([param]).item() == pytest.approx(value * math.sqrt(3000), rel=1e-6)


@pytest.mark.parametrize("place", [0, 40, 2047, 2999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(norm, place, bad):
    param = torch.nn.Parameter(torch.zeros(3000))
    param.grad = torch.ones(3000)
    param.grad[place] = bad
    found = norm([param]).item()
    assert math.isnan(found) if math.isnan(bad) else found == math.inf
