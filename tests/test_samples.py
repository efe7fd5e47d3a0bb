"""VSGD on samples: micro-batches, per-sample gradients, processes; one sample is VSGD; what is refused."""

import copy

import pytest
import torch

from tests.cases import SIZES, TOLERANCE, assert_stepped, gradient, layouts, reference_step
from tests.test_vectors import assert_relative
from vsgd_kernels import VSGD, SampleVSGD
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.rules import BOUNDS, arithmetic_dtype
from vsgd_kernels.state_formats import FORMATS

SETTINGS = {"lr": 1e-2, "ghattg": 8.0, "ps": 1e-4, "weight_decay": 0.1}


def mixed_params(generator, every_layout=True):
    """Every size in float32, the other dtypes, and every layout."""
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES[:-2]]
    params += [torch.nn.Parameter(torch.randn(1500, generator=generator).to(dtype)) for dtype in DTYPES]
    some = list(layouts(torch.float32, generator).values())[:: 1 if every_layout else 7]
    return params + [torch.nn.Parameter(param) for param, _ in some]


def samples_of(param, generator, n=4):
    """[n, *shape] gradients."""
    return torch.stack([gradient(param, generator) for _ in range(n)])


def moments(samples):
    """Mean and variance in float64."""
    samples = samples.double()
    return samples.mean(0), samples.var(0, unbiased=False)


@pytest.mark.parametrize("style", FORMATS)
def test_one_sample_is_vsgd_to_the_bit(backend, generator, style):
    """Accumulated, given as a sample, or left in .grad; in every format, dtype, size and layout."""
    params = mixed_params(generator, every_layout=backend != "triton")
    copies = [copy.deepcopy(params) for _ in range(3)]
    plain = VSGD(params, **SETTINGS, state_format=style, backend=backend)
    others = [SampleVSGD(own, **SETTINGS, state_format=style, backend=backend) for own in copies]
    for _ in range(2):
        for param, *twins in zip(params, *copies, strict=True):
            param.grad = gradient(param, generator)
            twins[0].grad, twins[1].grad = param.grad.clone(), param.grad.clone()
            twins[2].grad_sample = param.grad.unsqueeze(0).clone()
        others[1].accumulate()
        others[2].accumulate()
        for optimizer in (plain, *others):
            optimizer.step()
    assert all(twin.grad is not None for twin in copies[0])
    assert all(twin.grad is None for twin in copies[1])
    for own, optimizer in zip(copies, others, strict=True):
        for param, twin in zip(params, own, strict=True):
            assert torch.equal(param, twin)
            for key, value in plain.state[param].items():
                assert torch.equal(value, optimizer.state[twin][key]), key


@pytest.mark.parametrize("how", ["micro-batches", "per-sample", "both"])
def test_against_the_reference(backend, generator, how):
    """Several steps on 4 samples: moments as in float64, and the step that the reference makes of them."""
    params = mixed_params(generator, every_layout=backend != "triton" or how == "per-sample")
    optimizer = SampleVSGD(params, **SETTINGS, backend=backend)
    for _ in range(2):
        fed = [samples_of(param, generator) for param in params]
        one_by_one = {"micro-batches": 4, "per-sample": 0, "both": 2}[how]
        for i in range(one_by_one):
            for param, samples in zip(params, fed, strict=True):
                param.grad = samples[i]
            optimizer.accumulate()
        if one_by_one < 4:
            for param, samples in zip(params, fed, strict=True):
                param.grad_sample = samples[one_by_one:]
            optimizer.accumulate()
        means = []
        for param, samples in zip(params, fed, strict=True):
            own, (mean, variance) = optimizer._samples[param], moments(samples)
            eps = torch.finfo(arithmetic_dtype(param.dtype)).eps
            size = samples.double().abs().amax(0) if param.numel() else mean
            assert own.count == 4
            assert ((own.mean - mean).abs() <= TOLERANCE["input"] * eps * size).all()
            assert ((own.variance - variance).abs() <= 4 * TOLERANCE["input"] * eps * size * variance.sqrt()).all()
            means.append(own.mean.to(param.dtype))
        expected = reference_step(optimizer, params, means)
        optimizer.step()
        assert_stepped(optimizer, params, expected)
        assert all(samples.count == 0 and not samples.get_variance().any() for samples in optimizer._samples.values())


def test_micro_batches_equal_the_vector(backend, vector):
    """vsgd-persample, its samples as micro-batches."""
    data = vector("vsgd-persample")
    param = torch.nn.Parameter(torch.tensor(data["param0"], dtype=torch.float64))
    hyper = {"wd": "weight_decay", "offset": "shape_offset"}
    optimizer = SampleVSGD([param], **{hyper.get(k, k): v for k, v in data["hyper"].items()}, backend=backend)
    for samples, wanted in zip(data["grads"], data["steps"], strict=True):
        for sample in samples:
            param.grad = torch.tensor(sample, dtype=torch.float64)
            optimizer.accumulate()
        optimizer.step()
        assert_relative(param.detach(), wanted["param"])


def test_a_large_mean_does_not_cancel(backend):
    """Samples that differ by 1e-3 of 1e3: in float32 the mean of their squares would not show it."""
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    noise = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1))
    samples = 1000.0 + noise
    for sample in samples:
        param.grad = sample.clone()
        optimizer.accumulate()
    torch.testing.assert_close(optimizer._samples[param].variance.double(), moments(samples)[1], rtol=1e-3, atol=0)


def test_parameters_fed_differently(backend, generator):
    """Each counts its own samples: one, three, and none."""
    params = [torch.nn.Parameter(torch.randn(50, generator=generator)) for _ in range(3)]
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    for i in range(3):
        params[0].grad = gradient(params[0], generator)
        params[1].grad = gradient(params[1], generator) if i == 0 else None
        optimizer.accumulate()
    assert [optimizer._samples[p].count for p in params[:2]] == [3, 1]
    expected = reference_step(optimizer, params[:2], [optimizer._samples[p].mean for p in params[:2]])
    optimizer.step()
    assert_stepped(optimizer, params[:2], expected)
    assert not optimizer.state.get(params[2])


def test_the_gradient_of_the_last_micro_batch_may_stay(backend, generator):
    param, twin = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    one, other = (SampleVSGD([p], lr=1e-2, backend=backend) for p in (param, twin))
    for i in range(3):
        param.grad = gradient(param, generator)
        twin.grad = param.grad.clone()
        one.accumulate()
        if i < 2:
            other.accumulate()
    one.step()
    other.step()
    assert torch.equal(param, twin)
    assert param.grad is None
    assert twin.grad is None


@pytest.mark.parametrize("largest", [3e38, 1e30, 1e-40])
def test_extreme_samples_stay_finite(backend, largest):
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    for step in range(3):
        for sign in (1, -1, 1):
            param.grad = torch.tensor([largest, -largest, 1.0, 0.0]) * sign * (step != 1)
            optimizer.accumulate()
        assert (optimizer._samples[param].variance <= BOUNDS[torch.float32].big ** 2).all()
        optimizer.step()
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())


def test_grad_scaler(backend, generator):
    """Scaled samples step as plain ones do; an overflow in any of them skips the step, and discards all."""
    param, twin = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    optimizer, plain = (SampleVSGD([p], lr=1e-2, backend=backend) for p in (param, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, overflow in enumerate([None, 2, None, 0, None]):
        for i in range(3):
            x = gradient(twin, generator)
            scaler.scale((param * (torch.inf if i == overflow else x)).sum()).backward()
            if i < 2:  # the scaler looks at the last one's
                optimizer.accumulate()
            if overflow is None:
                twin.grad = x
                plain.accumulate()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow is None:
            plain.step()
        assert torch.equal(param, twin), step
    assert optimizer.state[param]["step"] == 3


def test_copies_and_discarding(backend, generator):
    """deepcopy keeps what was fed, a state dict does not, discard() forgets it."""
    param = torch.nn.Parameter(torch.ones(50))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    twin_param, twin = copy.deepcopy((param, optimizer))
    assert "variance" not in str(optimizer.state_dict())
    for own in (optimizer, twin):
        own.step()
    assert torch.equal(param, twin_param)
    param.grad = gradient(param, generator)
    optimizer.accumulate()
    optimizer.discard()
    with pytest.raises(RuntimeError, match="no parameter was fed"):
        optimizer.step()


def test_fed_nothing(backend):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    with pytest.raises(RuntimeError, match=r"no parameter was fed since the last step: call backward\(\), and accum"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) found no parameter with a grad or grad_sample"):
        optimizer.accumulate()
    assert torch.equal(param, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("samples", "error", "match"),
    [
        (torch.ones(4, 2), ValueError, r"grad_sample of parameter 1 of group 0 .*\[samples, 3\].* got \(4, 2\)"),
        (torch.ones(3), ValueError, r"grad_sample of parameter 1 .* got \(3,\)"),
        (torch.ones(0, 3), ValueError, r"grad_sample of parameter 1 .* got \(0, 3\)"),
        (torch.ones(5, 3), ValueError, r"grad_sample of parameter 1 .* as many samples as .*parameter 0.*, 4, got 5"),
        (torch.ones(4, 3, dtype=torch.float64), TypeError, r"grad_sample of parameter 1 .* got .*torch.float64"),
        (torch.ones(4, 3, device="meta"), ValueError, r"grad_sample of parameter 1 .* on cpu, got meta"),
        (torch.ones(4, 3).to_sparse(), TypeError, r"grad_sample of parameter 1 .* dense"),
        ([torch.ones(4, 3), 1.0], TypeError, r"grad_sample of parameter 1 .* a tensor, got 1.0"),
    ],
)
def test_samples_that_do_not_fit(samples, error, match):
    """Nothing is taken, neither of them nor of the parameters before."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SampleVSGD(params, lr=1e-2)
    params[0].grad_sample, params[1].grad_sample = torch.ones(4, 3), samples
    for method in (optimizer.accumulate, optimizer.step):
        with pytest.raises(error, match=match):
            method()
    assert params[0].grad_sample is not None
    assert not any(own.count for own in optimizer._samples.values())
    assert not optimizer.state


def test_a_refused_step_keeps_the_samples(generator):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SampleVSGD([param], lr=1e-2)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    param.grad = left = gradient(param, generator)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    assert optimizer._samples[param].count == 2
    assert param.grad is left
    assert torch.equal(param, torch.ones(3))
