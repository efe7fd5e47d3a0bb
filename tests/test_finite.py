"""Finite gradients never lead to NaN or Inf; others stay in their own element; 16-bit parameters train."""

import itertools
import math

import pytest
import torch

from vsgd_kernels import VSGD
from vsgd_kernels.rules import BOUNDS

LARGEST = torch.finfo(torch.float32).max
EXTREMES = [LARGEST, -LARGEST, 1e30, -1e19, 1.0, -1e-20, 1.2e-38, -1e-40, 1.4e-45, 0.0]


def assert_finite(optimizer, param):
    assert param.isfinite().all()
    for name in optimizer.rule.states:
        state = optimizer.state[param][name]
        assert state.isfinite().all(), name
        if name in optimizer.rule.rates:
            assert (state > 0).all(), name


def extreme_settings(case):
    names = case.optimizer.rule.hyper
    for settings in (
        {},
        {"eps": 0.0},
        {"eps": 0.0, "shape_offset": 0.0, "ps": 1e-300},
        {"eps": 0.0, "shape_offset": 0.0, "ps": 1e-40, "ghattg": 1e-300},
        {"ps": 1e300, "ghattg": 1e300},
        {"tau": 1e-9, "tau1": 1e-9, "tau2": 1e-9},
        {"tau": 1.0, "tau1": 1.0, "tau2": 1.0, "ghattg": 1e38},
    ):
        own = {name: value for name, value in settings.items() if name in names}
        if own or not settings:
            yield own


def test_extreme_gradients_in_any_order(case, backend):
    """Every sequence of four extremes, one an element, then back to ordinary gradients."""
    sequences = torch.tensor(list(itertools.product(EXTREMES, repeat=4)), dtype=torch.float32)
    for settings in extreme_settings(case):
        param = torch.nn.Parameter(torch.linspace(-1, 1, len(sequences)))
        optimizer = case.optimizer([param], lr=1e-2, **settings, backend=backend)
        for grad in (*sequences.unbind(1), *torch.randn(5, len(sequences)).unbind(0)):
            param.grad = grad.clone()
            before = param.detach().clone()
            optimizer.step()
            assert_finite(optimizer, param)
            # whatever the gradient
            assert ((param - before).abs() <= case.largest_step * 1e-2 * (1 + 1e-5) + 1e-6).all()


def test_extreme_gradients_in_float64(case, backend):
    sequences = torch.tensor([[1e308, -1e308, 1e154, 1e-320, 5e-324, 0.0]], dtype=torch.float64)
    param = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = case.optimizer([param], lr=1e-2, eps=0.0, backend=backend)
    for shift in range(12):
        param.grad = sequences[0].roll(shift)
        optimizer.step()
        assert_finite(optimizer, param)


def test_largest_gradients_step_as_far_as_large_ones(case, backend):
    """Beyond the bound a gradient counts as the bound: the step has its sign and size, and is not 0 or Inf."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = case.optimizer(params, lr=1e-2, **case.plain(), backend=backend)
    params[0].grad = torch.tensor([LARGEST, -LARGEST])
    params[1].grad = torch.tensor([1.0, -1.0]) * BOUNDS[torch.float32].big
    optimizer.step()
    assert torch.equal(params[0], params[1])
    assert (params[0].abs() > 1e-4).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bad_gradient_touches_only_its_element(case, backend, bad, dtype):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 2000, dtype=dtype)) for _ in range(2)]
    optimizer = case.optimizer(params, lr=1e-2, **case.plain(), backend=backend)
    for i in range(3):
        grad = torch.randn(2000, generator=torch.Generator().manual_seed(i)).to(dtype)
        params[0].grad, params[1].grad = grad, grad.clone()
        if i == 1:
            params[0].grad[[0, 777, 1999]] = bad
        optimizer.step()
    untouched = torch.ones(2000, dtype=torch.bool)
    untouched[[0, 777, 1999]] = False
    states = [[param.detach(), *(optimizer.state[param][n] for n in optimizer.rule.states)] for param in params]
    for hurt, whole in zip(*states, strict=True):
        assert torch.equal(hurt[untouched], whole[untouched])
    assert params[0][~untouched].isnan().all()


class AuthorsArithmetic:
    """The authors' expanded squares and products, in the parameter's own dtype: what fails in 16 bits."""

    def __init__(self, param):
        self.param = param
        self.mug, self.bg, self.bhg = (torch.zeros_like(param) for _ in range(3))
        self.t = 0

    def step(self, grad, lr, ps=1e-8, ghattg=30.0):
        self.t += 1
        pa2, pbg2, pbhg2 = (torch.tensor(x) for x in (2 * ps + 1 + 1e-4, 2 * ps, 2 * ghattg * ps))
        first = self.t == 1
        sg, shg = (pbg2 / (pa2 - 1), pbhg2 / (pa2 - 1)) if first else (self.bg / pa2, self.bhg / pa2)
        old = self.mug.clone()
        self.mug.copy_((grad * sg + old * shg) / (sg + shg))
        square = sg * shg / (sg + shg) + self.mug**2
        rho1, rho2 = self.t**-0.81, self.t**-0.9
        self.bg.mul_(1 - rho1).add_((pbg2 + square - 2 * self.mug * old + old**2) * rho1)
        self.bhg.mul_(1 - rho2).add_((pbhg2 + square - 2 * grad * self.mug + grad**2) * rho2)
        self.param.sub_(lr / (square.sqrt() + 1e-8) * self.mug)


def train_by_small_gradients(dtype, backend, steps):
    """Gradients of 1e-4 from 1.0 with lr 0.01: the authors' arithmetic, ours, and ours in float32."""
    theirs = AuthorsArithmetic(torch.ones(4, dtype=dtype))
    params = [torch.nn.Parameter(torch.ones(4, dtype=d)) for d in (dtype, torch.float32)]
    optimizer = VSGD(params, lr=0.01, backend=backend)
    for _ in range(steps):
        for param in params:
            param.grad = torch.full_like(param, 1e-4)
        optimizer.step()
        theirs.step(params[0].grad, lr=0.01)
    return theirs.param, *(param.detach().float() for param in params)


def test_fp16_trains_where_the_authors_arithmetic_is_nan(backend):
    theirs, ours, ours_in_float32 = train_by_small_gradients(torch.float16, backend, 30)
    assert theirs.isnan().all()
    assert torch.allclose(ours, ours_in_float32, rtol=0, atol=1e-3)


def test_bf16_trains_where_the_authors_arithmetic_stalls(backend):
    theirs, ours, ours_in_float32 = train_by_small_gradients(torch.bfloat16, backend, 150)
    assert torch.equal(theirs, torch.ones_like(theirs))
    assert (ours < 0.95).all()
    assert torch.allclose(ours, ours_in_float32, rtol=0, atol=4e-3)
