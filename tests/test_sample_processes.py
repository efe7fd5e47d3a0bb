"""Samples that several processes have: brought together, they are those of one."""

import math

import pytest
import torch

from tests.processes import Processes
from tests.test_samples import SETTINGS, moments, samples_of
from vsgd_kernels import SampleVSGD, samples


def test_processes(tmp_path):
    """Two processes that feed 3 and 1 samples, one of them none of a parameter, equal one that is fed all."""
    processes = Processes(2, tmp_path)
    outcomes = processes.run(_train)
    processes.stop()
    params, fed = _work()
    optimizer = SampleVSGD(params, **SETTINGS)
    for _ in range(2):
        for param, own in zip(params, fed, strict=True):
            param.grad_sample = own
            optimizer.accumulate()
        optimizer.step()
    for param, first, second in zip(params, *outcomes, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(param.detach(), first)


def _work():
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(60, generator=generator)) for _ in range(2)]
    params.append(torch.nn.Parameter(torch.randn(6, 10, generator=generator).t()))
    return params, [samples_of(param, generator, n) for param, n in zip(params, (4, 3, 3), strict=True)]


def _train():
    """What the parameters of this process come to be."""
    samples._BUCKET = 100  # two of the three parameters do not go together
    params, fed = _work()
    optimizer = SampleVSGD(params, **SETTINGS)
    for _ in range(2):
        if torch.distributed.get_rank() == 0:
            for i in range(3):
                for param, own in zip(params, fed, strict=True):
                    param.grad = own[i].clone()
                if i < 2:  # all_reduce takes the last
                    optimizer.accumulate()
        else:
            params[0].grad = fed[0][3].clone()
        optimizer.all_reduce()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_one_process(count, before, generator, monkeypatch):
    """It keeps what it has, whatever the variance was in the step before."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    param = torch.nn.Parameter(torch.randn(50, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2)
    for n in (before, count):
        if optimizer._samples and optimizer._samples[param].count:
            optimizer.step()
        fed = samples_of(param, generator, max(n, 1))
        for param.grad in fed[:n].clone():
            optimizer.accumulate()
        optimizer.all_reduce()
    own = optimizer._samples[param]
    assert own.count == count
    if count:
        mean, variance = moments(fed)
        torch.testing.assert_close(own.mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.get_variance().double(), variance, rtol=1e-5, atol=1e-6)


def test_a_nan_of_a_skipped_step_is_forgotten(monkeypatch):
    """Also where all_reduce has found a single sample."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SampleVSGD([param], lr=1e-2)
    param.grad = torch.tensor([math.nan, 1.0, 2.0])
    optimizer.all_reduce()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert not param.any()
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    assert len(set(param.tolist())) == 1
    assert param[0] < 0.0
