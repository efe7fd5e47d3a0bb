"""Masters of 16-bit parameters: the same bits on every backend, rounding without bias, extremes.

That "exact" trains as float32 does is in test_step.py.
"""

import math

import pytest
import torch

from tests.cases import (
    ROUNDINGS,
    assert_same_bits,
    each_isa,
    extreme_gradients,
    gradient,
    layouts,
    master_of,
)
from vsgd_kernels import VSGD, formats, state_formats
from vsgd_kernels.noise import Noise, tensor_key

BF16, FP16 = torch.bfloat16, torch.float16
#: half a unit in the last place beyond the largest number: from here on the nearest 16-bit value is Inf
OVERFLOW = {BF16: 2.0**128 - 2.0**119, FP16: 65520.0}

#: with which the mean is all but the gradient, and a step all but lr
FOLLOWS = {"ps": 1e-20, "ghattg": 1e-8}


@pytest.fixture(params=[BF16, FP16], ids=str)
def dtype(request):
    return request.param


def stepped(pairs, mode, backend, steps=2, **settings):
    """Parameters and states after some steps on the same gradients."""
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p, _ in pairs]
    settings = {"lr": 1e-2, "weight_decay": 0.1, **settings}
    optimizer = VSGD(params, **settings, master_weights=mode, seed=7, backend=backend)
    for _ in range(steps):
        for param, (_, grad) in zip(params, pairs, strict=True):
            param.grad = grad
        optimizer.step()
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def all_values(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("other", ["triton", "cuda"])
def test_kernels_give_the_same_bits(dtype, rounded, other, generator):
    """Layouts, tails, coded states, extreme gradients and NaN."""
    pairs = list(layouts(dtype, generator).values())
    pairs += [(torch.randn(n, generator=generator).to(dtype),) * 2 for n in (0, 257, state_formats.SMALLEST + 37)]
    extreme = extreme_gradients().to(dtype)
    pairs.append((torch.linspace(-3, 3, len(extreme)).to(dtype), extreme))
    assert_same_bits(stepped(pairs, rounded, other), stepped(pairs, rounded, "cpp"))
    pairs = [(torch.randn(state_formats.SMALLEST + 37, generator=generator).to(dtype),) * 2]
    for coded in ({"state_format": "q8"}, {"state_format": "packed16"}):
        assert_same_bits(stepped(pairs, rounded, other, **coded), stepped(pairs, rounded, "cpp", **coded))


def test_reference_gives_the_same_codes(dtype, mode, generator):
    """Without a gradient the masters decay alike to the bit; all 65,536 values, and strides."""
    values = all_values(dtype)
    shapes = [values, values[:1000].view(25, 40).t(), values.view(2, -1)[:, ::7]]
    pairs = [(shape, torch.zeros_like(shape)) for shape in shapes]
    assert_same_bits(stepped(pairs, mode, "eager", 3), stepped(pairs, mode, "cpp", 3))


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_instruction_sets_give_the_same_bits(dtype, mode, style, generator, monkeypatch):
    grads = torch.cat([gradient(torch.empty(5000), generator), extreme_gradients()]).to(dtype)
    pairs = [(torch.linspace(-3, 3, len(grads)).to(dtype), grads), (all_values(dtype), all_values(dtype).roll(1))]
    wanted = stepped(pairs, mode, "cpp", state_format=style)
    for _ in each_isa(monkeypatch):
        assert_same_bits(stepped(pairs, mode, "cpp", state_format=style), wanted)


def test_every_value_is_read_and_written(dtype, mode, backend):
    """lr 0 changes no value, rounds no number and needs no low."""
    values = all_values(dtype)
    param, *state = stepped([(values, torch.zeros_like(values))], mode, backend, lr=0.0)
    nan = values.isnan()
    assert torch.equal(param[~nan].view(torch.int16), values[~nan].view(torch.int16))
    assert param[nan].isnan().all()
    lows = [t for t in state if t.dtype in (torch.int8, torch.int16)]
    assert len(lows) == (mode is not None)
    assert not any(low.any() for low in lows)


def stored(values, dtype, mode, seed=3):
    """The masters that are stored of float32 values, each rounding of its own."""
    param = torch.empty_like(values, dtype=dtype)
    low_dtype = formats.low_dtype(mode, dtype)
    low = low_dtype and torch.empty_like(param, dtype=low_dtype)
    formats.store_param(param, low, values, formats.master_noise(Noise.of(tensor_key(seed, 0), 5), (values,)))
    return formats.load_param(param, low)


@pytest.mark.parametrize("magnitude", [2.0**-14, 6.1e-5 / 3, 1.3e-6, 3.1e-9, 0.011, 1.0, 1.9, 60_000.0])
def test_rounding_is_unbiased(dtype, rounded, magnitude):
    """100,000 roundings of a value average to it: near powers of two, and fp16's subnormals and fractions of them."""
    n = 100_000
    for value in (magnitude * (1 + 1.3 * 2.0**-12), -magnitude * (1 - 1.3 * 2.0**-13), magnitude * math.sqrt(0.98)):
        value = torch.tensor(value)
        if dtype == FP16:  # below 2^-14 masters are a fixed point
            value = torch.where(value.abs() < 2.0**-14, (value * 2.0**40).round() * 2.0**-40, value)
        masters = stored(value.repeat(n), dtype, rounded).double()
        assert len(masters.unique()) == 2, "the value lies between two masters"
        error = masters.mean() - value.double()
        assert error.abs() <= ROUNDINGS * masters.std() / math.sqrt(n), value.item()


def test_rounding_goes_to_the_next_values(dtype, mode, generator):
    """The parameter is a nearest 16-bit value of its master; both are within a unit of what was stored."""
    values = torch.cat([torch.randn(20_000, generator=generator) * 2.0**k for k in (-30, -16, -10, 0, 9)])
    masters = stored(values, dtype, mode)
    ulp = torch.maximum(values.abs().log2().floor(), torch.tensor(-14.0 if dtype == FP16 else -126.0))
    ulp = torch.exp2(ulp - (10 if dtype == FP16 else 7))
    unit = ulp * {"exact": 0.0, "split8": 2.0**-8, None: 1.0}[mode]
    fixed_point = 2.0**-41 if dtype == FP16 else 0.0
    assert ((masters - values).abs() <= unit + fixed_point).all()
    param = torch.empty_like(values, dtype=dtype)
    low = formats.low_dtype(mode, dtype) and torch.empty_like(param, dtype=formats.low_dtype(mode, dtype))
    formats.store_param(param, low, masters, torch.full_like(values, 2**32 - 1, dtype=torch.int64))
    assert torch.equal(formats.load_param(param, low), masters), "a master is stored as it is"
    assert ((param.float() - masters).abs() <= (masters.to(dtype).float() - masters).abs()).all()


def test_small_updates_add_up(dtype, mode, backend):
    """Steps of less than a tenth of half a unit in the last place move the masters by what they move float32's."""
    n = 8192 if backend == "triton" else 40_000
    start = torch.ones(n)
    params = [torch.nn.Parameter(start.to(dtype)), torch.nn.Parameter(start.clone())]
    half = torch.finfo(dtype).eps / 4  # downwards from 1.0
    optimizer = VSGD(params, lr=half / 10, **FOLLOWS, backend=backend, master_weights=mode)
    for _ in range(20):
        for param in params:
            param.grad = torch.full_like(param, 2.0**-13)
        optimizer.step()
    moved = 1.0 - params[1].double().mean()
    assert moved > half
    masters = master_of(optimizer, params[0]).double()
    allowed = ROUNDINGS * masters.std() / math.sqrt(n)
    assert allowed < moved / 10
    assert ((1.0 - masters.mean()) - moved).abs() <= allowed


def test_no_number_becomes_inf_by_random_bits(dtype, mode, backend):
    """Beyond the largest number a master is Inf from where the nearest 16-bit value is, and only from there."""
    largest = torch.finfo(dtype).max
    for factor, wanted in ((0.6, largest), (1.6, math.inf)):
        param = torch.nn.Parameter(torch.full((3000,), largest, dtype=dtype))
        param.grad = -torch.ones_like(param)
        lr = factor * (OVERFLOW[dtype] - largest)
        optimizer = VSGD([param], lr=lr, **FOLLOWS, backend=backend, master_weights=mode)
        optimizer.step()
        assert (param == wanted).all()
        assert (master_of(optimizer, param) >= largest).all()


def test_extremes(dtype, mode):
    overflow, largest = OVERFLOW[dtype], torch.finfo(dtype).max
    below = torch.tensor(overflow).nextafter(torch.tensor(0.0)).item()
    values = torch.tensor([math.nan, math.inf, 0.0, below, overflow, 3.4e38, 1e-45, 2.0**-126]).repeat_interleave(1000)
    for sign in (1.0, -1.0):
        got = [masters.unique() for masters in stored(sign * values, dtype, mode).split(1000)]
        assert got[0].isnan().all()
        for masters, wanted in zip(got[1:3], (math.inf, 0.0), strict=True):
            assert masters.tolist() == [sign * wanted]
            assert torch.equal(masters.signbit(), torch.tensor([sign < 0]))
        assert got[3].isfinite().all()
        assert (got[3].abs() >= largest).all()
        assert got[4].tolist() == [sign * math.inf]
        assert got[5].tolist() == [sign * math.inf]
        assert all((masters.abs() <= 2.0**-126 if dtype == BF16 else masters == 0).all() for masters in got[6:])


def test_nan_stays_in_its_own_element(dtype, mode, backend, generator):
    param = torch.nn.Parameter(torch.randn(600, generator=generator).to(dtype))
    optimizer = VSGD([param], lr=1e-2, backend=backend, master_weights=mode)
    for _ in range(2):
        param.grad = gradient(param, generator)
        param.grad[300] = math.nan
        optimizer.step()
    assert param.isnan().nonzero().flatten().tolist() == [300]


def test_another_seed_rounds_otherwise(rounded, backend, generator):
    start, grad = torch.randn(2, 3000, generator=generator).bfloat16()
    outcomes = []
    for seed in (0, 0, 1):
        params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
        optimizer = VSGD(params, lr=1e-3, seed=seed, backend=backend, master_weights=rounded)
        for _ in range(2):
            for param in params:
                param.grad = grad
            optimizer.step()
        outcomes += [master_of(optimizer, param) for param in params]
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[3])
    for a, b in ((0, 1), (0, 4)):  # another parameter of the same values; another seed
        assert not torch.equal(outcomes[a], outcomes[b])
