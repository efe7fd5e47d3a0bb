"""What torch tests of its own optimizers: refusals, schedulers, copies, gradients; checkpoints stand apart."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from tests.cases import assert_same_bits, check_step, layouts, make_params
from tests.optimizer_infos import Problem, each_info, each_input, leaf
from vsgd_kernels.batch import DTYPES


@each_info
def test_torchs_bad_inputs(info):
    for bad in info.optim_error_inputs_func("cpu", torch.float32):
        assert bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = (
            [torch.nn.Parameter(torch.ones(2))] if (own := bad.optimizer_error_input).params is None else own.params
        )
        expects = pytest.warns if issubclass(bad.error_type, Warning) else pytest.raises
        with expects(bad.error_type, match=bad.error_regex):
            info.optim_cls(params, **own.kwargs)


_ADDED = {
    "tensor": leaf(),
    "list": [leaf()],
    "set": {"params": {leaf()}},
    "non-leaf": {"params": [leaf() * 2]},
    "no tensor": {"params": [3.0]},
    "names": {"params": [("name", leaf())]},
}
_CONSTRUCTED = {
    "tensor": leaf(),
    "nothing": [],
    "number": 3,
    "non-leaf": [leaf() * 2],
    "no tensor": [None],
    "no params": [{"lr": 0.1}],
    "one name": [("name", leaf()), leaf()],
}


@each_info
@pytest.mark.parametrize(
    ("how", "params"),
    [
        *(pytest.param("construct", params, id=name) for name, params in _CONSTRUCTED.items()),
        *(pytest.param("add_param_group", params, id=f"add {name}") for name, params in _ADDED.items()),
    ],
)
def test_refused_as_by_adamw(info, how, params):
    """By the same error with the same words, and without a trace."""
    refusals = []
    for cls in (torch.optim.AdamW, info.optim_cls):
        optimizer = cls([leaf()])
        with pytest.raises((TypeError, ValueError, KeyError)) as refusal:
            cls(params) if how == "construct" else optimizer.add_param_group(copy.copy(params))
        refusals.append((refusal.type, str(refusal.value)))
        assert len(optimizer.param_groups) == 1
    assert refusals[0] == refusals[1]


@each_info
def test_complex_is_refused(info):
    optimizer = info.optim_cls([leaf()], lr=1e-2)
    for dtype in (torch.complex64, torch.complex128):
        param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        for take in (info.optim_cls, lambda params: optimizer.add_param_group({"params": params})):
            with pytest.raises(TypeError, match=f"parameter 0 of group . must have one of the dtypes .* got {dtype}"):
                take([param])
    assert len(optimizer.param_groups) == 1


@each_info
@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable"])
def test_there_is_one_implementation(info, flag):
    """A constructor says so; a parameter group may name what it likes, as in torch."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{flag}'"):
        info.optim_cls([leaf()], **{flag: True})
    params = make_params(torch.Generator().manual_seed(0))
    optimizer = info.optim_cls([{"params": params, flag: True, "name": "all"}], lr=1e-2)
    check_step(optimizer, params)
    assert optimizer.param_groups[0][flag] is True
    assert optimizer.state_dict()["param_groups"][0]["name"] == "all"


@each_info
def test_defaults_and_repr(info):
    optimizer = info.optim_cls([leaf()], lr=0.25)
    assert optimizer.defaults["lr"] == 0.25
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    assert settings == optimizer.defaults
    optimizer.defaults["lr"] = 0.5  # of groups that come later
    optimizer.add_param_group({"params": [leaf()], "weight_decay": 0.1})
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.0), (0.5, 0.1)]
    lines = [f"    {name}: {value}" for name, value in sorted(settings.items())]
    assert repr(optimizer).splitlines()[: len(lines) + 2] == [f"{info.name} (", "Parameter Group 0", *lines]


@each_input(torch.float32, torch.float64, torch.bfloat16, torch.float16)
def test_goes_in_the_right_direction(info, dtype, kwargs):
    for contiguous in (True, False):
        problem = Problem(dtype, contiguous)
        optimizer = info.optim_cls(problem.params, **kwargs)
        losses = []
        for _ in range(20):
            losses.append(problem.loss())
            optimizer.step()
        assert (losses[-1] > losses[0]) == kwargs.get("maximize", False)
        assert abs(losses[-1] - losses[0]) > 0.05 * losses[0]


@each_info
@pytest.mark.parametrize("maximize", [False, True])
def test_rosenbrock(info, maximize):
    """One coordinate's gradient at a time, as torch tests it."""

    def value():
        x, y = param
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    param = torch.nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = info.optim_cls([param], lr=1e-2, maximize=maximize)
    values = []
    for i in range(600):
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        values.append(loss.item())
        param.grad[i % 2] = 0.0
        optimizer.step()
    if maximize:
        assert values[-1] > 4 * values[300] > 16 * values[0]
    else:  # into the valley, and along it
        assert values[-1] < 0.99 * values[300] < 1e-2 * values[0]


@each_input(torch.float32, torch.bfloat16, torch.float16, torch.float64)
def test_zero_gradients_move_nothing_but_by_weight_decay(info, dtype, kwargs):
    problem = Problem(dtype)
    before = [p.detach().clone() for p in problem.params]
    optimizer = info.optim_cls(problem.params, **kwargs)
    for _ in range(3):
        for param in problem.params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    decay = (1.0 - float(kwargs["lr"]) * kwargs.get("weight_decay", 0.0)) ** 3
    for param, old in zip(problem.params, before, strict=True):
        # Three roundings, each of half a unit in the last place or, where it is stochastic, of one.
        rtol = 0 if decay == 1.0 else 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(param.double(), old.double() * decay, rtol=rtol, atol=0 if decay == 1.0 else 1e-6)


@each_input(*DTYPES)
def test_gradients_are_never_written(info, dtype, kwargs):
    """Neither their values, nor their memory exchanged, whatever their layout, the dtype, loss scaling or overflow."""
    arrangements = layouts(dtype, torch.Generator().manual_seed(0)).values()
    params = [torch.nn.Parameter(param) for param, _ in arrangements] + Problem(dtype).params
    grads = [grad for _, grad in arrangements] + [torch.ones_like(param) for param in params[-2:]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    seen = [(grad.clone(), grad._version, grad.data_ptr()) for grad in grads]
    optimizer = info.optim_cls(params, **kwargs)
    for scaling in ({}, {"grad_scale": 3.0, "found_inf": 0.0}, {"grad_scale": 3.0, "found_inf": 1.0}):
        for name, value in scaling.items():
            setattr(optimizer, name, torch.tensor(value))
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    for grad, (old, version, address) in zip(grads, seen, strict=True):
        assert torch.equal(grad, old)
        assert (grad._version, grad.data_ptr()) == (version, address)


@each_info
def test_zero_grad(info):
    problem = Problem()
    optimizer = info.optim_cls(problem.params, lr=1e-2)
    problem.random_gradients()
    grads = [p.grad for p in problem.params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(problem.params, grads, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params)


@each_input(torch.float32, torch.bfloat16)
def test_deepcopy(info, dtype, kwargs):
    """Has every public attribute, shares nothing, and goes on alike."""
    problem = Problem(dtype)
    optimizer = info.optim_cls(problem.params, **kwargs)
    problem.train(optimizer)
    twin_problem, twin = copy.deepcopy((problem, optimizer))
    assert {k for k in vars(twin) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    for param, other in zip(problem.params, twin_problem.params, strict=True):
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, twin.state[other][key])
            assert value.data_ptr() != twin.state[other][key].data_ptr()
    twin_problem.generator = torch.Generator().set_state(problem.generator.get_state())
    problem.train(optimizer)
    twin_problem.train(twin)
    assert_same_bits(problem.params, twin_problem.params)


@each_info
def test_subclass(info):
    """Somebody's own class: its step's hooks run once, and its copy is of its class."""

    class Own(info.optim_cls):
        def __init__(self, params, lr=1e-2, **kwargs):
            super().__init__(params, lr=lr, **kwargs)

        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    problems, classes = (Problem(), Problem()), (Own, info.optim_cls)
    optimizers = [cls(problem.params, lr=1e-2) for cls, problem in zip(classes, problems, strict=True)]
    for problem, optimizer in zip(problems, optimizers, strict=True):
        problem.train(optimizer)
    assert_same_bits(problems[0].params, problems[1].params)
    assert optimizers[0].steps == 3
    assert type(copy.deepcopy(optimizers[0])) is Own
