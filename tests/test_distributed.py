"""Training that two processes share equals that of one: DistributedDataParallel, ZeroRedundancyOptimizer, FSDP2."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.cases import CASES
from tests.distributed import (
    assert_same_training,
    assert_same_values,
    copies,
    follow,
    held,
    make_model,
    make_optimizer,
    shard,
    train,
)
from tests.processes import Processes
from vsgd_kernels import authors_state_dict, hyperparameters, reference, sharding, state_formats

STEPS = 3


pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    processes = Processes(2, tmp_path_factory.mktemp("store"))
    yield processes
    processes.stop()


def train_alone(name, dtype, settings):
    model = make_model(dtype)
    optimizer = make_optimizer(name, model.parameters(), **settings)
    train(model, optimizer, STEPS)
    return model, optimizer


SETTINGS = {
    "fp32": (torch.float32, {}),
    "bf16 states": (torch.float32, {"state_format": "bf16"}),
    "q8": (torch.float32, {"state_format": "q8", "seed": 7}),
    "packed16": (torch.float32, {"state_format": "packed16", "seed": 7}),
    "bf16 parameters": (torch.bfloat16, {}),
    "split8": (torch.bfloat16, {"master_weights": "split8", "state_format": "q8"}),
    "rounded": (torch.bfloat16, {"master_weights": None}),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return request.param


def train_with_ddp(name, setting):
    dtype, settings = SETTINGS[setting]
    model = DistributedDataParallel(make_model(dtype))
    optimizer = make_optimizer(name, model.parameters(), **settings)
    train(model, optimizer, STEPS)
    assert_same_training(model, optimizer, *train_alone(name, dtype, settings))


@pytest.mark.parametrize("name", CASES)
def test_ddp(processes, name, setting):
    processes.run(train_with_ddp, name, setting)


def train_with_zero(name, setting):
    """Each process steps some of the parameters; those that are exact are those of one process."""
    dtype, settings = SETTINGS[setting]
    case = CASES[name]
    settings = {"lr": 1e-2, "weight_decay": 0.1, **case.plain(), **settings}
    model = DistributedDataParallel(make_model(dtype))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=case.optimizer, **settings)
    own = [param for group in optimizer.optim.param_groups for param in group["params"]]
    params = copies(own)
    follow(STEPS, model, optimizer, own, params, case.optimizer(params, **settings))
    assert_same_values(own, params)
    if setting in ("fp32", "bf16 parameters"):
        assert_same_values(model.parameters(), train_alone(name, dtype, settings)[0].parameters())


@pytest.mark.parametrize("name", CASES)
def test_zero(processes, name, setting):
    processes.run(train_with_zero, name, setting)


def consolidate_zero():
    model = DistributedDataParallel(make_model())
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=CASES["vsgd"].optimizer, **settings)
    train(model, optimizer, STEPS)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        alone, alone_optimizer = train_alone("vsgd", torch.float32, {})
        fresh = make_optimizer("vsgd", alone.parameters())
        fresh.load_state_dict(optimizer.state_dict())
        assert_same_training(alone, fresh, alone, alone_optimizer)


def test_consolidated_state_of_zero(processes):
    processes.run(consolidate_zero)


POLICIES = {
    "plain": {},
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def train_with_fsdp(name, setting):
    """A process's part is stepped as a plain parameter of its own would be; what is exact, as by one process."""
    dtype, settings = SETTINGS[setting]
    settings = {**CASES[name].plain(), **settings}
    model = shard(make_model(dtype))
    optimizer = make_optimizer(name, model.parameters(), **settings)
    params = copies(model.parameters())
    seed = settings.pop("seed", 0)
    groups = [
        {"params": [copy], "seed": seed + sharding.first_element(param)}
        for copy, param in zip(params, model.parameters(), strict=True)
    ]
    reference = make_optimizer(name, groups, **settings)
    follow(STEPS, model, optimizer, list(model.parameters()), params, reference)
    coded = 0
    for param, copy in zip(model.parameters(), params, strict=True):
        states = state_formats.stored(optimizer.state[param], optimizer.rule)
        assert all(isinstance(state, DTensor) and state.placements == param.placements for state in states)
        assert int(optimizer.state[param]["step"]) == STEPS
        others = state_formats.stored(reference.state[copy], optimizer.rule)
        if states[0].dtype == others[0].dtype:  # a part may be small where the whole is not
            assert_same_values([held(param), *map(held, states)], [copy, *others])
            coded += states[0].dtype != torch.float32
    assert bool(coded) == ("state_format" in settings)
    if setting in ("fp32", "bf16 parameters"):
        assert_same_values(model.parameters(), train_alone(name, dtype, settings)[0].parameters())


@pytest.mark.parametrize("name", CASES)
def test_fsdp(processes, name, setting):
    processes.run(train_with_fsdp, name, setting)


def train_with_fsdp_policy(policy, name):
    model = shard(make_model(), **POLICIES[policy])
    optimizer = make_optimizer(name, model.parameters(), **CASES[name].plain())
    params = copies(model.parameters())
    follow(
        STEPS, model, optimizer, list(model.parameters()), params, make_optimizer(name, params, **CASES[name].plain())
    )
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert_same_values(map(held, model.parameters()), params)
    if policy == "offload":
        alone, _ = train_alone(name, torch.float32, CASES[name].plain())
        assert_same_values(model.parameters(), alone.parameters())


@pytest.mark.parametrize("policy", ["mixed precision", "offload"])
def test_fsdp_policies(processes, policy):
    processes.run(train_with_fsdp_policy, policy, "vsgd")


def prepare_fsdp_once():
    """A step with nothing new prepares nothing: what the second one, whose states are DTensors, prepared serves on."""
    model = shard(make_model())
    optimizer = make_optimizer("vsgd", model.parameters(), state_format="q8")
    train(model, optimizer, 2)
    plan = optimizer._stepper._plan
    train(model, optimizer, 2, first=2)
    assert optimizer._stepper._plan is plan
    state = optimizer.state[next(model.parameters())]
    state["mug"] = state["mug"].clone()
    train(model, optimizer, 1, first=4)
    assert optimizer._stepper._plan is not plan


def test_fsdp_is_prepared_once(processes):
    processes.run(prepare_fsdp_once)


def move_states():
    """Their memory is free at once."""
    model = shard(make_model())
    optimizer = make_optimizer("vsgd", model.parameters(), state_format="q8")
    train(model, optimizer, 2)
    known = [weakref.ref(sharding.local(value)) for entries in optimizer.state.values() for value in entries.values()]
    for entries in optimizer.state.values():
        entries.update({key: value.clone() for key, value in entries.items()})
    gc.collect()
    assert known
    assert not any(ref() is not None for ref in known)


def test_states_that_are_moved(processes):
    processes.run(move_states)


def change_format():
    model = shard(make_model(torch.bfloat16))
    optimizer = make_optimizer("vsgd", model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0].update(state_format="bf16", master_weights="split8")
    train(model, optimizer, 1, first=1)
    state = optimizer.state[next(model.parameters())]
    assert {key: state[key].dtype for key in ("mug", "low")} == {"mug": torch.bfloat16, "low": torch.int8}
    optimizer.param_groups[0].update(master_weights=None)
    train(model, optimizer, 1, first=2)
    assert "low" not in state
    optimizer.param_groups[0].update(state_format="packed16")
    train(model, optimizer, 1, first=3)
    assert state.keys() == {"step", "packed", "blocks"}
    assert state["packed"].placements == next(model.parameters()).placements


def test_format_changed_between_steps(processes):
    processes.run(change_format)


def step_with_another_gradient():
    model = shard(make_model())
    optimizer = make_optimizer("vsgd", model.parameters())
    param = next(model.parameters())
    before = held(param.detach()).clone()
    # FSDP2 keeps gradients where the parameter is; a gradient of every process is brought there.
    param.grad = DTensor.from_local(torch.ones(param.shape), param.device_mesh, run_check=False)
    optimizer.step()
    assert (held(param) < before).all()
    assert held(optimizer.state[param]["mug"]).shape == before.shape


def test_gradient_of_other_placements(processes):
    processes.run(step_with_another_gradient)


def go_back_through_old_values():
    model = shard(make_model())
    optimizer = make_optimizer("vsgd", model.parameters())
    param = next(model.parameters())
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_after_a_step_is_refused(processes):
    processes.run(go_back_through_old_values)


def ask_what_was_learned(style):
    model = shard(make_model())
    optimizer = make_optimizer("vsgd", model.parameters(), state_format=style)
    train(model, optimizer, 2)
    saved, posteriors = authors_state_dict(optimizer)["state"], optimizer.get_current_posterior()
    for i, (param, posterior) in enumerate(zip(model.parameters(), posteriors, strict=True)):
        own = {key: held(value) for key, value in optimizer.state[param].items()}
        numbers = state_formats.decoded(own, optimizer.rule)
        assert_same_values([held(saved[i][key]) for key in optimizer.rule.states], numbers)
        row = hyperparameters.settings(optimizer.rule.hyper, optimizer.param_groups[0]).row
        w, variance = reference.vsgd_posterior(*numbers[1:], optimizer.rule.scalars(3, row, torch.float32).inv_a)
        assert_same_values(map(held, posterior), [1 - w, numbers[0], variance])
        assert posterior.variance.placements == saved[i]["bg"].placements == param.placements


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_what_was_learned(processes, style):
    """In every format the posterior, and the authors' layout, have what each process holds, as DTensors."""
    processes.run(ask_what_was_learned, style)
