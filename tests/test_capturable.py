"""`capturable=True`: step counts and learning rate where the parameters are. On the CPU that is the CPU."""

import copy

import pytest
import torch

from tests.cases import check_step, gradient, make_params, step_counts
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.rules import arithmetic_dtype


def mixed_params(generator):
    """Every dtype, aligned, misaligned and strided."""
    params = []
    for dtype in DTYPES:
        whole, misaligned, strided = (torch.randn(3000, generator=generator).to(dtype) for _ in range(3))
        params += map(torch.nn.Parameter, (whole, misaligned[1:18], strided.view(30, 100).t()))
    return params


def test_against_the_reference(case, backend, generator):
    params = mixed_params(generator)
    groups = [{"params": params[::2], **case.settings}, {"params": params[1::2]}]
    optimizer = case.optimizer(groups, lr=1e-2, capturable=True, backend=backend)
    for step in range(4):
        for param in params[step % 3 :]:
            param.grad = gradient(param, generator)
        check_step(optimizer, params)


def test_equals_counting_on_the_host(case, backend, generator):
    """To the bit, except that the GPU's power function may round a scalar otherwise."""
    params = mixed_params(generator)
    twins = copy.deepcopy(params)
    optimizers = [
        case.optimizer(p, **case.settings, capturable=capturable, backend=backend)
        for p, capturable in ((params, False), (twins, True))
    ]
    for _ in range(5):
        for param, twin in zip(params, twins, strict=True):
            param.grad = gradient(param, generator)
            twin.grad = param.grad
        for optimizer in optimizers:
            optimizer.step()
    assert step_counts(optimizers[1], twins) == [5] * len(twins)
    for param, twin in zip(params, twins, strict=True):
        steps = 5 * case.settings["lr"] * case.largest_step
        atol = 4 * torch.finfo(arithmetic_dtype(param.dtype)).eps * steps
        torch.testing.assert_close(twin, param, rtol=4 * torch.finfo(param.dtype).eps, atol=atol)


def test_learning_rate_is_read_at_each_step(case, backend, generator):
    """Written in place, as a graph's replays need it; and replaced by another tensor, or by a number."""
    params = make_params(generator)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    optimizer = case.optimizer(params, lr=lr, weight_decay=0.1, capturable=True, backend=backend)
    check_step(optimizer, params)
    lr.mul_(0.5)
    check_step(optimizer, params)
    for new in (torch.tensor([3e-3]), 0.02, torch.tensor(1e-3)):
        optimizer.param_groups[0]["lr"] = new
        for _ in range(2):
            check_step(optimizer, params)
    assert lr.item() == 0.5e-2


def test_found_inf(case, backend, generator):
    """Changes neither parameters, states nor step counts."""
    params = mixed_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, capturable=True, backend=backend)
    for param in params:
        param.grad = gradient(param, generator)
    check_step(optimizer, params)
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for param, old in zip(params, before[0], strict=True):
        assert torch.equal(param, old)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][i][key]) for key, value in state.items())
    optimizer.found_inf = torch.tensor(0.0)
    check_step(optimizer, params)


@pytest.mark.engine
@pytest.mark.parametrize("capturable", [False, True])
def test_resumed_with_the_other_setting(case, backend, generator, capturable):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, capturable=capturable, backend=backend)
    check_step(optimizer, params)
    other = case.optimizer(params, lr=1e-2, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["capturable"] is capturable
    other.param_groups[0]["capturable"] = not capturable
    for _ in range(2):
        check_step(other, params)
    assert step_counts(other, params) == [3, 3, 3]


@pytest.mark.engine
def test_one_group_of_two(case, backend, generator):
    params = make_params(generator, 4)
    groups = [{"params": params[:2], "capturable": True}, {"params": params[2:]}]
    optimizer = case.optimizer(groups, lr=torch.tensor(1e-2), backend=backend)
    for _ in range(3):
        check_step(optimizer, params)


@pytest.mark.engine
def test_counts_set_by_hand(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, capturable=True, backend=backend)
    check_step(optimizer, params)
    optimizer.state[params[1]]["step"].fill_(7)
    optimizer.state[params[2]]["step"] = torch.tensor(3.0)
    check_step(optimizer, params)
    assert step_counts(optimizer, params) == [2, 8, 4]


@pytest.mark.engine
def test_refused(case):
    with pytest.raises(TypeError, match="capturable must be a bool, got 1"):
        case.optimizer([torch.nn.Parameter(torch.ones(3))], lr=1e-2, capturable=1)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        case.optimizer([torch.nn.Parameter(torch.ones(3))], lr=torch.ones(2), capturable=True)
