"""The scalars of steps whose counts are on the CPU, computed for several steps at once."""

import random

import pytest
import torch

from tests.cases import assert_same_bits
from vsgd_kernels.backends import library
from vsgd_kernels.backends.scalars import HostScalars

DTYPES = (torch.float32, torch.float64)


@pytest.fixture
def batch(case):
    """Three parameters in two groups; the third has taken more steps."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(3)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "weight_decay": 0.25, "maximize": True}]
    optimizer = case.optimizer(groups, lr=0.1, backend="eager")
    optimizer.step()
    optimizer.state[params[2]]["step"].fill_(100.0)
    (launch, _), *_ = optimizer._stepper._plan._launches
    return launch.batch


def expected(batch, counts, dtype):
    rows = [
        batch.rule.scalars(float(count), batch.hyper[group].tolist(), dtype)
        for count, group in zip(counts, batch.groups, strict=True)
    ]
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ahead(batch, dtype):
    """Each step's are those that the rule's Python gives, bit for bit."""
    scalars = HostScalars(batch)
    scalars.count()
    ahead = scalars.ahead(8, dtype)
    assert len(ahead) == 8
    for k, found in enumerate(ahead):
        assert torch.equal(found[scalars.row], expected(batch, (2 + k, 2 + k, 101 + k), dtype))
    (one,) = scalars.ahead(1, dtype)
    assert torch.equal(one, ahead[0])


def test_somebody_counts(batch):
    scalars = HostScalars(batch)
    assert not scalars.count()
    batch.steps[0].fill_(7.0)
    assert scalars.count()
    assert scalars.rows == 3
    assert torch.equal(scalars.ahead(2, torch.float64)[1][scalars.row], expected(batch, (9, 4, 103), torch.float64))


@pytest.mark.engine
def test_steps_of_many_rooms(case):
    """Those of a launch that is prepared anew each time: two dtypes, counts and rates that change, skipped steps."""

    def trained(anew):
        draw = random.Random(0)
        grads = torch.Generator().manual_seed(1)
        dtypes = (torch.float32, torch.float64, torch.float32)
        params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n, dtype in enumerate(dtypes, 3)]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
        optimizer = case.optimizer(groups, **{**case.settings, "lr": 0.01}, backend="cuda")
        for _ in range(300):
            for param in params:
                param.grad = torch.randn(param.shape, generator=grads, dtype=param.dtype)
            if draw.random() < 0.01:
                optimizer.param_groups[draw.randint(0, 1)]["lr"] = draw.random()
            if draw.random() < 0.005:
                optimizer.state[params[2]]["step"].fill_(draw.randint(0, 1000))
            optimizer.found_inf = torch.tensor(float(draw.random() < 0.05))
            if anew:
                optimizer._stepper._plan = None
            optimizer.step()
        return [*params, *(optimizer.state[param]["step"] for param in params)]

    assert_same_bits(trained(anew=False), trained(anew=True))


@pytest.mark.parametrize("why", ["counts end", "nothing is compiled"])
def test_one_at_a_time(batch, monkeypatch, why):
    """Float32 counts no further than 2^24."""
    if why == "counts end":
        batch.steps[2].fill_(2.0**24 - 2)
    else:
        monkeypatch.setattr(library, "why_not_loaded", lambda: "not compiled")
    scalars = HostScalars(batch)
    scalars.count()
    (one,) = scalars.ahead(8, torch.float32)
    counts = [step.item() for step in batch.steps]
    assert counts[:2] == [2, 2]
    assert torch.equal(one[scalars.row], expected(batch, counts, torch.float32))
