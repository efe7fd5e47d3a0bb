"""Every learning-rate schedule and weight averaging of torch.optim, over a step that reads the rate."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils

from tests.cases import assert_same_bits, check_step, make_params
from tests.optimizer_infos import TORCHS_SCHEDULERS, Problem, each_info, each_input

SCHEDULES = {
    **{f"torch's {i}": combined for i, combined in enumerate(TORCHS_SCHEDULERS)},
    "LambdaLR": [lambda o: schedules.LambdaLR(o, lambda i: 0.9**i)],
    "MultiplicativeLR": [lambda o: schedules.MultiplicativeLR(o, lambda i: 0.95)],
    "StepLR": [lambda o: schedules.StepLR(o, 3, gamma=0.5)],
    "MultiStepLR": [lambda o: schedules.MultiStepLR(o, [2, 4, 7])],
    "ConstantLR": [lambda o: schedules.ConstantLR(o, factor=0.3, total_iters=4)],
    "LinearLR": [lambda o: schedules.LinearLR(o, start_factor=0.1, total_iters=6)],
    "ExponentialLR": [lambda o: schedules.ExponentialLR(o, 0.9)],
    "PolynomialLR": [lambda o: schedules.PolynomialLR(o, total_iters=8, power=2.0)],
    "CosineAnnealingLR": [lambda o: schedules.CosineAnnealingLR(o, 6, eta_min=1e-4)],
    "CosineAnnealingWarmRestarts": [lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, T_mult=2)],
    "CyclicLR": [lambda o: schedules.CyclicLR(o, 1e-3, 3e-2, step_size_up=3, cycle_momentum=False)],
    "OneCycleLR": [lambda o: schedules.OneCycleLR(o, 0.05, total_steps=12, cycle_momentum=False)],
    "ReduceLROnPlateau": [lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.5)],
    "SequentialLR": [
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.2, total_iters=3), schedules.ExponentialLR(o, 0.8)], milestones=[3]
        )
    ],
    "ChainedScheduler": [
        lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.5, 3), schedules.ExponentialLR(o, 0.9)])
    ],
    "SWALR": [lambda o: swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=5)],
}


def advance(schedulers):
    for scheduler in schedulers:
        # To a plateau a loss that does not fall is told.
        scheduler.step(*([1.0] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))


@each_info
@pytest.mark.parametrize("kind", ["number", "tensor", "tensor, capturable"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(info, kind, schedule):
    """The rates are AdamW's under the same schedule, a step is that of a rate set by hand, and nothing warns."""
    params, twins, others = (make_params(torch.Generator().manual_seed(0), 2) for _ in range(3))

    def groups(params):
        lrs = (1e-2, 2e-2) if kind == "number" else (torch.tensor(1e-2), torch.tensor(2e-2))
        return [{"params": [param], "lr": lr} for param, lr in zip(params, lrs, strict=True)]

    optimizer = info.optim_cls(groups(params), capturable=kind == "tensor, capturable")
    twin = info.optim_cls([{"params": [param]} for param in twins], lr=0.0)
    adamw = torch.optim.AdamW(groups(others))
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers, adamws = ([make(o) for make in SCHEDULES[schedule]] for o in (optimizer, adamw))
        for _ in range(12):
            for group, by_hand, wanted in zip(*(o.param_groups for o in (optimizer, twin, adamw)), strict=True):
                assert float(group["lr"]) == float(wanted["lr"])
                assert isinstance(group["lr"], torch.Tensor) == (kind != "number")
                by_hand["lr"] = float(wanted["lr"])
            seen.add(by_hand["lr"])
            optimizer.step()
            twin.step()
            assert_same_bits(params, twins)
            adamw.step()
            advance(schedulers)
            advance(adamws)
    assert len(seen) > 1


@each_info
def test_momentum_that_cycles(info):
    """OneCycleLR and CyclicLR also move beta1 where there is one, and say so where there is none."""
    makes = [
        lambda o: schedules.OneCycleLR(o, 0.05, total_steps=12),
        lambda o: schedules.CyclicLR(o, 1e-3, 3e-2, step_size_up=3),
    ]
    for make in makes:
        problem = Problem()
        optimizer = info.optim_cls(problem.params, lr=1e-2)
        if "betas" not in optimizer.defaults:
            with pytest.raises(ValueError, match="must support momentum"):
                make(optimizer)
            continue
        scheduler = make(optimizer)
        seen = set()
        for _ in range(10):
            seen.add(optimizer.param_groups[0]["betas"])
            problem.random_gradients()
            check_step(optimizer, problem.params)
            scheduler.step()
        assert len(seen) > 3


@each_input(torch.float32)
def test_schedule_is_resumed(info, dtype, kwargs):
    """Optimizer and scheduler saved, and loaded into new ones, go on as if nothing had been."""
    problem, twin_problem = Problem(dtype), Problem(dtype)
    optimizer, twin = (info.optim_cls(p.params, **copy.deepcopy(kwargs)) for p in (problem, twin_problem))
    make = SCHEDULES["SequentialLR"][0]
    scheduler = make(optimizer)
    for _ in range(2):
        problem.train(optimizer, 1)
        scheduler.step()
    with torch.no_grad():
        for param, other in zip(problem.params, twin_problem.params, strict=True):
            other.copy_(param)
    twin_problem.generator.set_state(problem.generator.get_state())
    resumed = make(twin)
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        for own, its, schedule in ((problem, optimizer, scheduler), (twin_problem, twin, resumed)):
            own.train(its, 1)
            schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == float(twin.param_groups[0]["lr"])
    assert_same_bits(problem.params, twin_problem.params)


@each_input(torch.float32)
def test_averaged_model(info, dtype, kwargs):
    """swa_utils' averages are those of the parameters that the steps left."""
    model = torch.nn.Linear(60, 70)
    optimizer = info.optim_cls(model.parameters(), **copy.deepcopy(kwargs))
    averaged = swa_utils.AveragedModel(model)
    decay = 0.7
    moving = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    visited, wanted = [], None
    for i in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 60, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        optimizer.step()
        for own in (averaged, moving):
            own.update_parameters(model)
        visited.append(model.weight.detach().double().clone())
        wanted = visited[-1] if wanted is None else decay * wanted + (1 - decay) * visited[-1]
    assert not torch.equal(visited[0], visited[-1])
    torch.testing.assert_close(averaged.module.weight.double(), torch.stack(visited).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moving.module.weight.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("total", [7, 97])
@each_input(torch.float32)
def test_linear_to_zero(info, dtype, kwargs, total):
    """LinearLR ends some roundings below 0, which counts as 0."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = info.optim_cls([param], **{**copy.deepcopy(kwargs), "lr": 0.1})
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=total)
    for _ in range(total):
        param.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 1e-15
    before = param.clone()
    optimizer.step()
    assert torch.equal(param, before)
