"""Where tensors are: storage that is replaced or moved, version counters, what a step keeps and allocates."""

import gc
import weakref
from collections import defaultdict

import pytest
import torch

from tests.cases import CODED, assert_same_bits, check_step, gradient, make_params, step_counts, train
from vsgd_kernels import VSGD, state_formats
from vsgd_kernels.state_formats import FORMATS

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("looks")]


def test_backward_after_a_step_is_refused(case, backend):
    """The graph holds values that the step has changed: autograd must notice."""
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    version = param._version
    case.optimizer([param], lr=1e-2, backend=backend).step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_after_a_skipped_step(case, backend):
    """It has changed nothing, and the graph is as good as before."""
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optimizer = case.optimizer([param], lr=1e-2, backend=backend)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    loss.backward()
    assert param.grad.tolist() == [4.0] * 3


@pytest.mark.parametrize("key", ["step", "first", "last", "low"])
def test_states_moved_to_shared_memory(case, backend, generator, key):
    """What Hogwild training does: the same tensor, elsewhere."""
    params = [torch.nn.Parameter(torch.randn(30, generator=generator).bfloat16())]
    params[0].grad = gradient(params[0], generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    states = optimizer.rule.states
    optimizer.state[params[0]][{"first": states[0], "last": states[-1]}.get(key, key)].share_memory_()
    for _ in range(2):
        check_step(optimizer, params)
    assert step_counts(optimizer, params) == [3]


@pytest.mark.parametrize("contiguous_gradient", [True, False])
def test_transposed_at_the_same_address(case, backend, generator, contiguous_gradient):
    params = [torch.nn.Parameter(torch.randn(6, 6, generator=generator))]
    params[0].grad = gradient(params[0], generator)
    if not contiguous_gradient:
        params[0].grad = params[0].grad.t()
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    params[0].data = params[0].data.t()
    check_step(optimizer, params)


@pytest.mark.parametrize("how", ["data", "contiguous data", "grad", "grad data", "state", "state data", "dtype"])
def test_replaced_storage_is_noticed(case, backend, generator, how):
    """A table of addresses must not outlive the tensors it was made from."""
    params = make_params(generator)
    params[1].data = torch.randn(9, 6, generator=generator).t()
    params[1].grad = gradient(params[1], generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    state = optimizer.state[params[1]]
    last = optimizer.rule.states[-1]
    old = [params[1].detach(), params[1].grad.detach(), state[last].detach()]
    if how == "data":
        params[1].data = torch.randn(6, 9, generator=generator)
    elif how == "contiguous data":
        params[1].data = params[1].data.contiguous()
    elif how == "grad":
        params[1].grad = gradient(params[1], generator)
    elif how == "grad data":
        params[1].grad.data = gradient(params[1], generator)
    elif how == "state":
        state[last] = 1.5 * state[last]
    elif how == "state data":
        state[last].data = 1.5 * state[last]
    else:
        params[1].grad = None
        params[1].data = params[1].data.bfloat16()
        params[1].grad = gradient(params[1], generator)
    before = [t.clone() for t in old]
    for _ in range(2):
        check_step(optimizer, params)
    replaced = {"data": 0, "contiguous data": 0, "dtype": 0, "grad": 1, "grad data": 1, "state": 2, "state data": 2}[
        how
    ]
    assert torch.equal(old[replaced], before[replaced]), "the old tensor was written to"


@pytest.mark.parametrize("style", CODED)
def test_replaced_codes_are_noticed(backend, style):
    """Each entry of a state in codes, replaced by a copy of itself: the copy is stepped, and the old one left."""
    outcomes = []
    for replaced in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(state_formats.SMALLEST, generator=generator))]
        optimizer = VSGD(params, lr=1e-2, state_format=style, backend=backend)
        train(optimizer, params, generator, 1)
        state = optimizer.state[params[0]]
        for key in [key for key in state if key != "step"]:
            old, before = state[key], state[key].clone()
            if replaced:
                state[key] = old.clone()
            train(optimizer, params, generator, 1)
            assert torch.equal(old, before) == replaced
        outcomes.append([params[0].detach(), *state.values()])
    assert_same_bits(*outcomes)


def test_state_replaced_as_a_whole(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    optimizer.state[params[0]] = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    check_step(optimizer, params)
    optimizer.state.pop(params[2])
    check_step(optimizer, params)
    assert step_counts(optimizer, params) == [3, 3, 1]
    optimizer.state.clear()
    check_step(optimizer, params)
    assert step_counts(optimizer, params) == [1, 1, 1]


DROPS = {
    "moved": lambda o: [entries.update({k: v.clone() for k, v in entries.items()}) for entries in o.state.values()],
    "one dropped": lambda o: o.state.pop(next(iter(o.state))),
    "all dropped": lambda o: o.state.clear(),
    "replaced": lambda o: setattr(o, "state", defaultdict(dict)),
}


@pytest.mark.parametrize("how", DROPS)
@pytest.mark.parametrize("gradient_release", [False, True])
def test_states_that_are_dropped(case, backend, generator, how, gradient_release, request):
    """As those are that wait in the host's memory between two phases of training: theirs is free at once.

    But not where no module is compiled for this torch: there when the next step has found out.
    """
    params = [torch.nn.Parameter(torch.randn(state_formats.SMALLEST, generator=generator)) for _ in range(2)]
    settings = {"state_format": "q8", "gradient_release": gradient_release}
    optimizer = case.optimizer(params, lr=1e-2, backend=backend, **settings)

    def step():
        sum(param.square().sum() for param in params).backward()
        optimizer.step()

    for _ in range(2):
        step()
    known = {id(value): weakref.ref(value) for entries in optimizer.state.values() for value in entries.values()}
    DROPS[how](optimizer)
    kept = {id(value) for entries in optimizer.state.values() for value in entries.values()}
    dropped = [ref for number, ref in known.items() if number not in kept]
    if backend == "eager" or "compiled for this torch" not in request.node.name:
        step()
    gc.collect()
    assert dropped
    assert not any(ref() is not None for ref in dropped)


def test_gradients_are_not_kept(case, backend, generator):
    """After zero_grad nothing holds the gradients' memory."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    for _ in range(2):
        for param in params:
            param.grad = gradient(param, generator)
        optimizer.step()
    addresses = {id(p.grad) for p in params}
    optimizer.zero_grad()
    gc.collect()
    assert not [o for o in gc.get_objects() if id(o) in addresses and isinstance(o, torch.Tensor)]


def test_what_its_parameter_knows_is_freed(case, backend, generator):
    """A circle of an optimizer and a parameter, once nothing else knows them."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    for _ in range(2):
        check_step(optimizer, params)
    params[0].owner = optimizer
    known = [weakref.ref(optimizer), *map(weakref.ref, params)]
    del params, optimizer
    gc.collect()
    assert [ref() for ref in known] == [None] * 4


@pytest.mark.parametrize("style", FORMATS)
def test_no_temporaries_of_a_parameters_size(case, style):
    """A step of the C++ kernel allocates less than 64 KiB of tensors for 4 MiB of parameters, in every format."""
    params = [torch.nn.Parameter(torch.randn(2**20)), torch.nn.Parameter(torch.randn(1000, 2).t())]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = case.optimizer(params, lr=1e-2, state_format=style, backend="cpp")
    optimizer.step()
    for param in params:
        param.grad = torch.ones_like(param)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 2**16
