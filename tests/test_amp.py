"""torch.amp.GradScaler: the step that unscales, the one that finds unscaled gradients, and the one that is skipped."""

import copy

import pytest
import torch
from torch.amp import GradScaler, autocast
from torch.nn.utils import clip_grad_norm_

from tests.cases import (
    assert_same_bits,
    assert_stepped,
    gradient,
    make_params,
    reference_step,
    step_counts,
    through_a_file,
)
from tests.optimizer_infos import Problem, each_info, each_input
from vsgd_kernels import SampleVSGD
from vsgd_kernels.batch import DTYPES

SCALE = 3.0 * 2.0**8  # so that dividing by it rounds

#: Who unscales the gradients.
each_path = pytest.mark.parametrize("path", ["step", "unscale_"])


def scaled_backward(scaler, params, xs):
    """Leaves scale * x in each parameter's gradient."""
    wide = [param.to(torch.promote_types(param.dtype, torch.float32)) for param in params]
    loss = sum((param * x).sum() for param, x in zip(wide, xs, strict=True))
    scaler.scale(loss).backward()


def expected_step(optimizer, params, scale):
    """What a step with the gradients as they are, but for a scale, should give; and what it may not change."""
    grads = [param.grad.double() / scale for param in params]
    return reference_step(optimizer, params, grads), [param.grad.clone() for param in params]


def scaler_step(scaler, optimizer, params, path="step"):
    """Steps, and compares with the reference."""
    unscaled = path != "step"
    if unscaled:
        scaler.unscale_(optimizer)
        clip_grad_norm_(params, 1.0)  # what it is for
    expected, grads = expected_step(optimizer, params, 1.0 if unscaled else scaler.get_scale())
    scaler.step(optimizer)
    assert_stepped(optimizer, params, expected)
    assert_same_bits([param.grad for param in params], grads)


@each_path
def test_against_the_reference(case, backend, path, generator):
    """Gradients are unscaled once, whoever does it, and never written by the step; a parameter of each dtype."""
    dtypes = [dtype for dtype in DTYPES if path == "step" or dtype != torch.float16]
    params = [torch.nn.Parameter(torch.randn(300, generator=generator).to(dtype)) for dtype in dtypes]
    optimizer = case.optimizer(params, **case.settings, backend=backend)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for param in params:
        param.grad = gradient(param, generator)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):  # accumulated
        scaled_backward(scaler, params, [gradient(param, generator).float() / 64 for param in params])
    scaler_step(scaler, optimizer, params, path)


@each_info
def test_fp16_gradients_are_not_for_unscale(info):
    """torch refuses it, before anything is written; step() has to unscale them."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = info.optim_cls([param], lr=1e-2)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaled_backward(scaler, [param], [1.0])
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    scaler_step(scaler, optimizer, [param])


@pytest.mark.engine
def test_gradients_below_fp16(case, backend):
    """Unscaled in float32: gradients that fp16 could not hold without the scale count."""
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = case.optimizer([param], lr=1e-2, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    scaled_backward(scaler, [param], [torch.full((64,), 2.0**-30)])
    assert torch.tensor(2.0**-30).half() == 0.0
    scaler_step(scaler, optimizer, [param])
    assert optimizer.state[param][optimizer.rule.states[0]].all()


@each_path
@pytest.mark.parametrize("preset", [torch.tensor(0.3), torch.tensor([5.0])], ids=["0-dim", "1-dim"])
@each_info
def test_scale_of_the_users_own(info, path, preset):
    """`optimizer.grad_scale` set before counts beside the scaler's, as in torch's fused Adam."""
    params = make_params(torch.Generator().manual_seed(0))
    optimizer = info.optim_cls(params, lr=1e-2)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaled_backward(scaler, params, [torch.ones_like(param) for param in params])
    if path == "unscale_":
        scaler.unscale_(optimizer)
    optimizer.grad_scale = preset
    expected, _ = expected_step(optimizer, params, preset.item() * (SCALE if path == "step" else 1.0))
    scaler.step(optimizer)
    assert_stepped(optimizer, params, expected)


@each_info
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scale_that_is_none(info, name):
    params = make_params(torch.Generator().manual_seed(0))
    before = [param.detach().clone() for param in params]
    optimizer = info.optim_cls(params, lr=1e-2)
    for bad, shown in ((2.0, "2.0"), (torch.ones(2), r"\(2,\)"), (torch.tensor(2.0).double(), "torch.float64")):
        setattr(optimizer, name, bad)
        with pytest.raises(TypeError, match=f"{name} must be .* got .*{shown}"):
            optimizer.step()
    assert_same_bits(params, before)
    assert step_counts(optimizer, params) == [0, 0, 0]


@each_input(torch.float32, torch.bfloat16, torch.float16)
def test_overflow_changes_nothing(info, dtype, kwargs):
    """Neither parameters nor states nor counts, in the first step or later: all goes on as if it had not been."""
    for path in ("step",) if dtype == torch.float16 else ("step", "unscale_"):
        problem, twin_problem = Problem(dtype), Problem(dtype)
        optimizer, plain = (info.optim_cls(p.params, **kwargs) for p in (problem, twin_problem))
        scaler = GradScaler("cpu", init_scale=2.0**9, growth_interval=100)
        for bad in (torch.nan, None, torch.inf, -torch.inf, None):
            twin_problem.random_gradients()
            grads = [param.grad / 1024 for param in twin_problem.params]
            if bad is not None:
                grads[0][3, 5] = bad
            before = copy.deepcopy(optimizer.state_dict()["state"])
            optimizer.zero_grad()
            scaled_backward(scaler, problem.params, grads)
            if path != "step":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if bad is None:
                # What scaling has cost in fp16 is not the subject.
                for param, own in zip(twin_problem.params, problem.params, strict=True):
                    param.grad = own.grad if path != "step" else (own.grad.double() / scaler.get_scale()).to(dtype)
                plain.step()
            for i, state in before.items():
                if bad is not None:
                    assert_same_bits(state.values(), optimizer.state_dict()["state"][i].values())
            assert_same_bits(problem.params, twin_problem.params)
        assert step_counts(optimizer, problem.params) == [2, 2]
        for param, other in zip(problem.params, twin_problem.params, strict=True):
            assert_same_bits(optimizer.state[param].values(), plain.state[other].values())


@each_info
@each_path
def test_scale_follows_as_with_fused_adam(info, path):
    """The same losses lead to the same scales, growing and backing off, and scaler state dicts."""
    histories = []
    for cls, settings in ((info.optim_cls, {}), (torch.optim.Adam, {"fused": True})):
        params = make_params(torch.Generator().manual_seed(0))
        optimizer = cls(params, lr=1e-2, **settings)
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2, growth_factor=4.0, backoff_factor=0.25)
        history = []
        for bad in (0, 0, 1, 0, 0, 0, 0, 1, 1, 0):
            optimizer.zero_grad()
            scaled_backward(scaler, params, [1.0, torch.inf if bad else 2.0, 3.0])
            if path != "step":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            history.append((scaler.get_scale(), scaler.state_dict(), step_counts(optimizer, params)))
        histories.append(history)
    assert histories[0] == histories[1]
    assert len({scale for scale, *_ in histories[0]}) == 3
    assert histories[0][-1][2] == [7, 7, 7]


@each_info
@each_path
def test_several_optimizers_with_one_scaler(info, path):
    """Only those whose gradients overflow skip; the scale backs off once for all."""
    sets = [make_params(torch.Generator().manual_seed(i), 2) for i in range(3)]
    optimizers = [info.optim_cls(params, lr=1e-2) for params in sets[:2]] + [torch.optim.SGD(sets[2], lr=1e-2)]
    scaler = GradScaler("cpu", init_scale=2.0**10)
    params = [param for own in sets for param in own]
    for overflows in (None, 0, None, 1, 2):
        before = copy.deepcopy(params)
        scale = scaler.get_scale()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaled_backward(scaler, params, [torch.inf if i // 2 == overflows else 1.0 for i in range(len(params))])
        for i, (optimizer, own) in enumerate(zip(optimizers, sets, strict=True)):
            if i == overflows or i == 2:
                if path != "step":
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            else:
                scaler_step(scaler, optimizer, own, path)
        scaler.update()
        assert scaler.get_scale() == scale * (1.0 if overflows is None else 0.5)
        for i, (param, old) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(param, old) == (i // 2 == overflows)
    assert [step_counts(o, own) for o, own in zip(optimizers[:2], sets, strict=False)] == [[4, 4], [4, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(case, dtype, autocast_dtype):
    """Of float32 parameters, and of 16-bit ones with masters: the first and the last step are the reference's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).to(dtype)
    params = list(model.parameters())
    optimizer = case.optimizer(params, lr=3e-2)
    scaler = GradScaler("cpu", init_scale=SCALE)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    target = x.sum(1, keepdim=True)
    losses = []
    for i in range(8):
        optimizer.zero_grad()
        with autocast("cpu", dtype=autocast_dtype):
            output = model(x)
        assert output.dtype == autocast_dtype
        loss = (output.float() - target).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if i in (0, 7):
            scaler_step(scaler, optimizer, params)
        else:
            scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.9 * losses[0]
    assert step_counts(optimizer, params) == [8] * 4


@each_input(torch.float32, torch.bfloat16)
def test_resumed_after_an_overflow(info, dtype, kwargs):
    """Optimizer and scaler, saved after a skipped step, go on to the bit; also where it was the first."""

    def steps(problem, optimizer, scaler, overflows):
        for overflow in overflows:
            problem.random_gradients()
            xs = [param.grad * (torch.inf if overflow else 1.0) for param in problem.params]
            optimizer.zero_grad()
            scaled_backward(scaler, problem.params, xs)
            scaler.step(optimizer)
            scaler.update()

    for past in ([1], [0, 0, 1]):
        problem, twin_problem = Problem(dtype), Problem(dtype)
        optimizer, twin = (info.optim_cls(p.params, **kwargs) for p in (problem, twin_problem))
        scaler, twin_scaler = (GradScaler("cpu", init_scale=2.0**4, growth_interval=2) for _ in range(2))
        steps(problem, optimizer, scaler, past)
        with torch.no_grad():
            for param, other in zip(problem.params, twin_problem.params, strict=True):
                other.copy_(param)
        twin_problem.generator.set_state(problem.generator.get_state())
        twin.load_state_dict(through_a_file(optimizer.state_dict()))
        twin_scaler.load_state_dict(through_a_file(scaler.state_dict()))
        steps(problem, optimizer, scaler, [0, 1, 0])
        steps(twin_problem, twin, twin_scaler, [0, 1, 0])
        assert_same_bits(problem.params, twin_problem.params)
        for param, other in zip(problem.params, twin_problem.params, strict=True):
            assert_same_bits(optimizer.state[param].values(), twin.state[other].values())


@each_info
def test_disabled_scaler_and_no_gradients(info):
    """A disabled scaler passes the closure on; a step without any gradient is none, as with fused Adam."""
    params = make_params(torch.Generator().manual_seed(0))
    grads = [param.grad for param in params]
    optimizer = info.optim_cls(params, lr=1e-2)
    for param in params:
        param.grad = None

    def closure():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return 5.0

    if info.optim_cls is not SampleVSGD:  # which asks to be fed
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(()))
        before = copy.deepcopy(params)
        scaler.step(optimizer)
        assert_same_bits(params, before)
        assert not optimizer.state
    closure()
    expected = reference_step(optimizer, params, grads)
    assert GradScaler("cpu", enabled=False).step(optimizer, closure=closure) == 5.0
    assert_stepped(optimizer, params, expected)
