"""torch.distributed.checkpoint: what several processes saved goes on to the bit, and with another number of them."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from tests.cases import CASES
from tests.distributed import (
    assert_same_training,
    assert_same_values,
    held,
    make_model,
    make_optimizer,
    shard,
    train,
    whole,
)
from tests.processes import Processes
from vsgd_kernels import sharding, state_formats

STEPS = 3
SETTINGS = {
    "fp32": (torch.float32, {}),
    "bf16 states": (torch.float32, {"state_format": "bf16"}),
    "q8": (torch.float32, {"state_format": "q8"}),
    "exact": (torch.bfloat16, {"state_format": "q8"}),
    "packed16": (torch.bfloat16, {"state_format": "packed16"}),
    "split8": (torch.bfloat16, {"master_weights": "split8"}),
}
FULL = StateDictOptions(full_state_dict=True)


pytestmark = pytest.mark.xdist_group("distributed_checkpoint")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """By how many they are."""
    processes = {count: Processes(count, tmp_path_factory.mktemp("store")) for count in (2, 3)}
    yield processes
    for some in processes.values():
        some.stop()


@pytest.fixture(params=SETTINGS)
def setting(request):
    return request.param


def by_columns(model):
    """The model under tensor parallelism: of the second layer's weight each process has some columns."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(model, mesh, {"2": RowwiseParallel(input_layouts=Replicate())})


def make(name, setting, seed=0, cut=shard):
    dtype, settings = SETTINGS[setting]
    model = cut(make_model(dtype))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed)
    return model, make_optimizer(name, model.parameters(), **settings)


def numbers_of(optimizer, param):
    """What the states of a whole parameter stand for."""
    own = {key: held(value) for key, value in optimizer.state[param].items()}
    return [whole(sharding.like(param, value)) for value in state_formats.decoded(own, optimizer.rule)]


def save(name, setting, folder, cut=shard):
    """Trains, saves, and returns the numbers that were saved, and what further steps make of the parameters."""
    model, optimizer = make(name, setting, cut=cut)
    train(model, optimizer, STEPS)
    own, states = get_state_dict(model, optimizer)
    dcp.save({"model": own, "optimizer": states}, checkpoint_id=folder)
    saved = [[whole(param.detach()), *numbers_of(optimizer, param)] for param in model.parameters()]
    saved = copy.deepcopy(saved)  # what is no part is trained on itself
    train(model, optimizer, STEPS, first=STEPS)
    return saved, [whole(param.detach()) for param in model.parameters()]


def load(name, setting, folder, cut=shard):
    model, optimizer = make(name, setting, seed=1, cut=cut)
    own, states = get_state_dict(model, optimizer)
    dcp.load(state := {"model": own, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer


def resume(name, setting, folder):
    model, optimizer = load(name, setting, folder)
    assert [int(state["step"]) for state in optimizer.state.values()] == [STEPS] * len(optimizer.state)
    train(model, optimizer, STEPS, first=STEPS)
    return [whole(param.detach()) for param in model.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_resumes_to_the_bit(processes, tmp_path, name, setting):
    _, wanted = processes[2].run(save, name, setting, str(tmp_path))[0]
    for values in processes[2].run(resume, name, setting, str(tmp_path)):
        assert_same_values(values, wanted)


def part_of(param, value):
    """What this process holds of a whole value."""
    if not isinstance(param, DTensor):
        return value
    return held(distribute_tensor(value, param.device_mesh, param.placements)).contiguous()


def assert_coded_anew(optimizer, param, numbers):
    """A state in blocks is the codes of these numbers, or stands for them as it is, its blocks being cut as before."""
    state = {key: held(value) for key, value in optimizer.state[param].items()}
    rule = optimizer.rule
    if all(map(torch.equal, state_formats.decoded(state, rule), numbers)):
        return False
    style = state_formats.format_of(state_formats.stored(state, rule))
    coded = state_formats.converted(style, rule, held(param.detach()), dict(zip(rule.states, numbers, strict=True)))
    assert_same_values([state[key] for key in coded], coded.values())
    return True


def is_in_blocks(setting):
    return state_formats.has_blocks(SETTINGS[setting][1].get("state_format", "fp32"))


def compare_after_load(name, setting, folder, saved, cut=shard):
    """Numbers in fp32 and bf16 are those that were saved; those in blocks are coded anew for the new parts."""
    model, optimizer = load(name, setting, folder, cut)
    anew = 0
    for param, (value, *numbers) in zip(model.parameters(), saved, strict=True):
        assert_same_values([param], [value])
        if "blocks" in optimizer.state[param]:
            anew += assert_coded_anew(optimizer, param, [part_of(param, number) for number in numbers])
        else:
            own = state_formats.stored(optimizer.state[param], optimizer.rule)
            assert_same_values([state.float() for state in own], numbers)
    return anew


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_another_number_of_processes(processes, tmp_path, setting, before, after):
    saved, _ = processes[before].run(save, "vsgd", setting, str(tmp_path))[0]
    anew = processes[after].run(compare_after_load, "vsgd", setting, str(tmp_path), saved)
    assert any(anew) == is_in_blocks(setting)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3)])
def test_parts_by_columns(processes, tmp_path, setting, before, after):
    """As above, but that codes in blocks are saved decoded, and coded anew even for the same parts."""
    saved, _ = processes[before].run(save, "vsgd", setting, str(tmp_path), by_columns)[0]
    anew = processes[after].run(compare_after_load, "vsgd", setting, str(tmp_path), saved, by_columns)
    assert any(anew) == is_in_blocks(setting)


def initialise_and_train(setting):
    """What asks for a state before the first step has it made, and changes nothing."""
    model, optimizer = make("vsgd", setting)
    saved = get_optimizer_state_dict(model, optimizer)
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0}
    other, other_optimizer = make("vsgd", setting)
    assert_same_values(model.parameters(), other.parameters())
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, STEPS)
    assert_same_training(model, optimizer, other, other_optimizer)


def test_states_are_initialised_without_a_step(processes, setting):
    processes[2].run(initialise_and_train, setting)


def save_whole(setting):
    model, optimizer = make("vsgd", setting)
    train(model, optimizer, STEPS)
    own, states = get_state_dict(model, optimizer, options=FULL)
    saved = copy.deepcopy((own, states))  # for set_state_dict changes what it is given
    numbers = [numbers_of(optimizer, param) for param in model.parameters()]
    again, again_optimizer = make("vsgd", setting, seed=1)
    set_state_dict(again, again_optimizer, model_state_dict=own, optim_state_dict=states, options=FULL)
    assert_same_training(again, again_optimizer, model, optimizer)
    return *saved, numbers


def load_whole_into_parts(setting, state_dict, numbers):
    model, optimizer = make("vsgd", setting, seed=1)
    optimizer.load_state_dict(state_dict)
    for param, wanted in zip(model.parameters(), numbers, strict=True):
        if "blocks" in optimizer.state[param]:
            assert_coded_anew(optimizer, param, [part_of(param, number) for number in wanted])
        else:
            own = state_formats.stored(optimizer.state[param], optimizer.rule)
            assert_same_values([state.float() for state in own], wanted)
    assert_altered_is_refused(optimizer, state_dict)


def assert_altered_is_refused(optimizer, state_dict):
    """Though words of a whole parameter mean nothing for its parts, and are decoded."""
    for state in state_dict["state"].values():
        if "blocks" in state:
            state["blocks"][0, 1] = 31
            with pytest.raises(ValueError, match="expected blocks as this package writes them, found 0x1f"):
                optimizer.load_state_dict(state_dict)
            return


def test_full_state_dict(processes, setting):
    """Gathered, it goes back to its parts to the bit, and to a model in one process and from there, by its numbers."""
    dtype, settings = SETTINGS[setting]
    own, states, numbers = processes[2].run(save_whole, setting)[0]
    model = make_model(dtype)
    optimizer = make_optimizer("vsgd", model.parameters(), **settings)
    set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=states)
    for param, wanted in zip(model.parameters(), numbers, strict=True):
        if "blocks" in optimizer.state[param]:
            assert_coded_anew(optimizer, param, wanted)
        else:
            own = state_formats.stored(optimizer.state[param], optimizer.rule)
            assert_same_values([state.float() for state in own], wanted)
    train(model, optimizer, 1, first=STEPS)
    numbers = [numbers_of(optimizer, param) for param in model.parameters()]
    processes[2].run(load_whole_into_parts, setting, optimizer.state_dict(), numbers)


def shard_later():
    """The parameters that the constructor was given are replaced in the group."""
    model = make_model()
    optimizer = make_optimizer("vsgd", model.parameters(), state_format="q8")
    optimizer.param_groups[0]["params"] = list(shard(model).parameters())
    other, other_optimizer = make("vsgd", "q8")
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, STEPS)
    for own, others in zip(*(o.state_dict()["state"].values() for o in (optimizer, other_optimizer)), strict=True):
        assert own.keys() == others.keys()
        assert_same_values(own.values(), others.values())


def test_sharded_after_the_optimizer_was_made(processes):
    processes[2].run(shard_later)
