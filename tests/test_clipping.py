"""`max_grad_norm`: a step with gradients that it has not rewritten, clipped by the norm of all of them."""

import copy
import math
import pickle

import pytest
import torch
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from tests.cases import (
    assert_norm,
    assert_same_bits,
    assert_stepped,
    gradient,
    make_params,
    norm_of,
    reference_step,
    train,
)
from vsgd_kernels import VSGD, SampleVSGD, clipping
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.formats import MASTER_WEIGHTS
from vsgd_kernels.state_formats import FORMATS

MAX_NORM = 0.7


def clipped(grads, max_norm, scale=1.0):
    """The gradients that a step should take, in float64; the divisor of all is a float32 number."""
    grads = [grad.double() / scale for grad in grads]
    excess = max(1.0, (norm_of(grads) + 1e-6) / max_norm)
    return [grad / (torch.tensor(excess * scale).float().double() / scale) for grad in grads]


def params_of(dtype, generator, shapes=((5, 7), (4096,), (2, 5000), ())):
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = gradient(param, generator)
    return params


def twins_of(params):
    """Copies, and of their gradients too."""
    twins = copy.deepcopy(params)
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.clone()
    return twins


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(case, backend, dtype, generator):
    """Of every rule and dtype, in two groups; a parameter without a gradient; gradients are not written."""
    params = params_of(dtype, generator)
    frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = case.optimizer([*params[:2], frozen], **case.settings, backend=backend, max_grad_norm=MAX_NORM)
    optimizer.add_param_group({"params": params[2:], **case.settings})
    for _ in range(2):
        grads = [param.grad.clone() for param in params]
        assert norm_of(grads) > 100 * MAX_NORM
        expected = reference_step(optimizer, params, clipped(grads, MAX_NORM))
        optimizer.step()
        assert_stepped(optimizer, params, expected)
        assert_same_bits([param.grad for param in params], grads)
        assert_norm(optimizer.grad_norm, grads, dtype)
        for param in params:
            param.grad = gradient(param, generator)
    assert frozen not in optimizer.state


def test_is_clip_grad_norm_and_step(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params, **case.settings, backend=backend, max_grad_norm=MAX_NORM)
    for _ in range(3):
        twins = twins_of(params)
        norm = clip_grad_norm_(twins, MAX_NORM)
        assert norm > MAX_NORM
        expected = reference_step(optimizer, params, [twin.grad for twin in twins])
        optimizer.step()
        assert_stepped(optimizer, params, expected)
        torch.testing.assert_close(optimizer.grad_norm, norm)
        for param in params:
            param.grad = gradient(param, generator)


@pytest.mark.parametrize("masters", list(MASTER_WEIGHTS), ids=str)
@pytest.mark.parametrize("state_format", FORMATS)
def test_formats_see_the_same_scale(case, state_format, masters, generator):
    """To the bit a step with the divisor as `grad_scale`, which test_amp.py compares with the reference."""
    params = params_of(torch.bfloat16, generator)
    optimizer = case.optimizer(
        params, **case.settings, state_format=state_format, master_weights=masters, max_grad_norm=MAX_NORM
    )
    train(optimizer, params, generator)
    twin = copy.deepcopy(optimizer)
    twin.max_grad_norm = None
    twins = twin.param_groups[0]["params"]
    divisor = norm_of([param.grad for param in params]) / MAX_NORM
    for param, other in zip(params, twins, strict=True):
        other.grad = param.grad
    optimizer.step()
    twin.grad_scale, norm = clipping.clip(optimizer.grad_norm, MAX_NORM, None)
    assert norm.item() / MAX_NORM == pytest.approx(divisor)
    assert twin.grad_scale.item() == pytest.approx(divisor)
    twin.step()
    assert_same_bits(params, twins)
    for param, other in zip(params, twins, strict=True):
        assert_same_bits(optimizer.state[param].values(), twin.state[other].values())


def test_small_gradients_are_left(case, generator):
    """To the bit the step without the argument; the norm is there all the same."""
    params = make_params(generator)
    twins = twins_of(params)
    norm = norm_of([param.grad for param in params])
    optimizer = case.optimizer(params, lr=1e-2, max_grad_norm=1.01 * norm)
    other = case.optimizer(twins, lr=1e-2)
    optimizer.step()
    other.step()
    assert_same_bits(params, twins)
    assert optimizer.grad_norm.item() == pytest.approx(norm)
    assert other.grad_norm is None
    optimizer.zero_grad()
    if case.optimizer is not SampleVSGD:
        optimizer.step()
        assert optimizer.grad_norm.item() == 0.0


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_not_finite(case, backend, bad, generator):
    """As after clip_grad_norm_: of an infinite norm finite gradients count as 0, of a NaN one all are NaN."""
    params = make_params(generator)
    params[1].grad[2, 3] = bad
    twins = twins_of(params)
    clip_grad_norm_(twins, MAX_NORM)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend, max_grad_norm=MAX_NORM)
    other = case.optimizer(twins, lr=1e-2, backend=backend)
    optimizer.step()
    other.step()
    # The sign of a gradient of 0 may differ, and hence that of a mean of 0.
    torch.testing.assert_close(params, twins, rtol=0, atol=0, equal_nan=True)
    assert params[1][2, 3].isnan()
    assert params[0].isnan().any().item() == (math.isnan(bad) and not optimizer.rule.draws) or optimizer.rule.draws
    assert not optimizer.grad_norm.isfinite()


def test_fp16_norm_beyond_fp16(case, backend):
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.float16))
    param.grad = torch.full_like(param, 4096.0)
    optimizer = case.optimizer([param], lr=1e-2, backend=backend, max_grad_norm=MAX_NORM)
    expected = reference_step(optimizer, [param], clipped([param.grad], MAX_NORM))
    optimizer.step()
    assert_stepped(optimizer, [param], expected)
    assert optimizer.grad_norm.item() == pytest.approx(4096 * math.sqrt(1000))


@pytest.mark.parametrize("path", ["step", "unscale_"])
def test_grad_scaler(case, path, generator):
    """The norm is that of unscaled gradients; a step that overflowed is skipped."""
    scale = 3.0 * 2.0**8
    params = make_params(generator)
    optimizer = case.optimizer(params, **case.settings, max_grad_norm=MAX_NORM)
    scaler = GradScaler("cpu", init_scale=scale)
    for i in range(3):
        for param in params:
            param.grad = gradient(param, generator)
        if i == 1:
            params[0].grad[0, 0] = math.inf
        scaler.scale(torch.zeros(()))  # makes the scale
        if path == "unscale_":
            scaler.unscale_(optimizer)
        before = copy.deepcopy(params)
        now = 1.0 if path == "unscale_" else scaler.get_scale()
        grads = [param.grad for param in params]
        expected = None if i == 1 else reference_step(optimizer, params, clipped(grads, MAX_NORM / 50, now))
        optimizer.max_grad_norm = MAX_NORM / 50
        scaler.step(optimizer)
        scaler.update()
        if i == 1:
            assert_same_bits(params, before)
        else:
            assert_stepped(optimizer, params, expected)
            assert optimizer.grad_norm.item() == pytest.approx(norm_of(grads) / now)
            assert optimizer.grad_norm > MAX_NORM / 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_and_nothing_is_large(dtype):
    """No value is read on the host, and temporaries are of a size of their own."""
    param = torch.zeros(2**23, dtype=dtype)
    param.grad = torch.ones_like(param)
    scale = torch.tensor(2.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        divisor, norm = clipping.clip(clipping.global_norm([param]), 1.0, scale)
    assert norm.item() == pytest.approx(2.0**10.5)
    assert divisor.item() == pytest.approx(2.0**11.5)
    events = profiler.events()
    assert "aten::linalg_vector_norm" in {event.name for event in events}
    assert not {"aten::item", "aten::_local_scalar_dense"} & {event.name for event in events}
    assert 0 < max(event.cpu_memory_usage for event in events) <= 4 * 2**20 + 2**16


def test_of_samples_the_mean_is_clipped(generator):
    """All samples are scaled by what clips their mean, and so is their variance."""
    params = make_params(generator)
    optimizer = SampleVSGD(params, lr=1e-2, max_grad_norm=MAX_NORM)
    twins = copy.deepcopy(params)
    other = SampleVSGD(twins, lr=1e-2)
    samples = [torch.randn(8, *param.shape, generator=generator) for param in params]
    means = [sample.mean(0) for sample in samples]
    divisor = norm_of(means) / MAX_NORM
    for param, twin, sample in zip(params, twins, samples, strict=True):
        param.grad = twin.grad = None
        param.grad_sample = sample
        twin.grad_sample = sample / divisor
    optimizer.step()
    other.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(means))
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin)
        for key in optimizer.rule.states:
            torch.testing.assert_close(optimizer.state[param][key], other.state[twin][key])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_an_attribute_that_copies_keep(copied, generator):
    params = make_params(generator)
    optimizer = VSGD(params, lr=1e-2, max_grad_norm=MAX_NORM)
    optimizer.step()
    assert "max_grad_norm" not in str(optimizer.state_dict())
    assert copied(optimizer).max_grad_norm == MAX_NORM
    plain = VSGD(copy.deepcopy(params))
    plain.load_state_dict(optimizer.state_dict())
    assert plain.max_grad_norm is None
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.max_grad_norm == MAX_NORM


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0.0, ValueError, "max_grad_norm must be greater than 0, got 0.0"),
        (-1, ValueError, "max_grad_norm must be greater than 0, got -1"),
        (math.nan, ValueError, "max_grad_norm must be greater than 0, got nan"),
        ("1", TypeError, "max_grad_norm must be a real number, got '1'"),
        (True, TypeError, "max_grad_norm must be a real number, got True"),
    ],
)
def test_refused(case, value, error, match):
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=match):
        case.optimizer([param], max_grad_norm=value)
    optimizer = case.optimizer([param], max_grad_norm=1.0)
    with pytest.raises(error, match=match):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("grad", [torch.ones(3).to_sparse(), torch.ones(3)._neg_view()], ids=["sparse", "neg"])
def test_gradients_that_cannot_be_stepped(grad):
    """The error is that of the step."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    params[0].grad, params[1].grad = torch.ones(3), grad
    with pytest.raises(TypeError, match="the gradient of parameter 1 of group 0"):
        VSGD(params, max_grad_norm=1.0).step()
    assert_same_bits(params, [torch.ones(3)] * 2)
