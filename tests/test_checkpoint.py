"""Checkpoints: exact resume, the authors' layout, the authors' and pytorch_optimizer's checkpoints."""

import copy

import pytest
import pytorch_optimizer
import torch

from tests.cases import gradient, through_a_file, train
from vsgd_kernels import VSGD, authors_state_dict, state_formats
from vsgd_kernels.batch import DTYPES


def params_like(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_go_on_alike(a, params_a, b, params_b, generator, steps=3):
    for _ in range(steps):
        for p, q in zip(params_a, params_b, strict=True):
            p.grad = gradient(p, generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(params_a, params_b, strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype
            assert torch.equal(value, b.state[q][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_exact(case, backend, generator, dtype):
    params = [torch.nn.Parameter(torch.randn(9, 5, generator=generator).to(dtype)) for _ in range(2)]
    optimizer = case.optimizer(params, **case.settings, backend=backend)
    train(optimizer, params, generator)
    twins = params_like(params)
    twin = case.optimizer(twins, backend=backend)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    assert {k: v for k, v in twin.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    assert_go_on_alike(optimizer, params, twin, twins, generator)


def test_between_backends(case, generator):
    """What one backend saved, another goes on with."""
    params = [torch.nn.Parameter(torch.randn(40, generator=generator))]
    optimizer = case.optimizer(params, lr=1e-2, backend="cpp")
    train(optimizer, params, generator)
    twins = params_like(params)
    twin = case.optimizer(twins, backend="eager")
    twin.load_state_dict(optimizer.state_dict())
    assert_go_on_alike(optimizer, params, twin, twins, generator)


@pytest.mark.engine
def test_loading_neither_changes_nor_shares_the_dict(case, backend, generator):
    params = [torch.nn.Parameter(torch.randn(9, 5, generator=generator).bfloat16())]
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    train(optimizer, params, generator)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    twins = params_like(params)
    twin = case.optimizer(twins, backend=backend)
    twin.load_state_dict(saved)
    train(twin, twins, generator)
    assert saved["param_groups"] == before["param_groups"]
    assert saved["state"].keys() == before["state"].keys()
    for i, state in before["state"].items():
        assert state.keys() == saved["state"][i].keys()
        assert all(torch.equal(value, saved["state"][i][name]) for name, value in state.items())


@pytest.mark.engine
def test_load_hooks_see_the_plain_dict(case, generator):
    params = [torch.nn.Parameter(torch.randn(4, generator=generator))]
    optimizer = case.optimizer(params, lr=1e-2)
    train(optimizer, params, generator)
    saved = optimizer.state_dict()
    twins = params_like(params)
    twin = case.optimizer(twins)
    mean = optimizer.rule.states[0]

    def double_mean(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0][mean] *= 2
        return state_dict

    seen = []
    twin.register_load_state_dict_pre_hook(double_mean)
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.state[twins[0]][mean].clone()))
    twin.load_state_dict(saved)
    assert torch.equal(seen[0], 2 * saved["state"][0][mean])


@pytest.mark.engine
def test_layout_follows_the_parameter(case, backend, generator):
    """Saved from contiguous parameters, loaded into channels_last ones."""
    params = [torch.nn.Parameter(torch.randn(6, 5, 4, 3, generator=generator))]
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    train(optimizer, params, generator)
    twins = [torch.nn.Parameter(params[0].detach().clone(memory_format=torch.channels_last))]
    twin = case.optimizer(twins, backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state[twins[0]][optimizer.rule.states[0]].stride() == twins[0].stride()
    assert_go_on_alike(optimizer, params, twin, twins, generator)


@pytest.mark.engine
@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_into_parameters_of_another_dtype(case, backend, generator, saved, loaded):
    params = [torch.nn.Parameter(torch.randn(30, generator=generator).to(saved))]
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    train(optimizer, params, generator)
    twins = [torch.nn.Parameter(params[0].detach().to(loaded))]
    twin = case.optimizer(twins, backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    for name in optimizer.rule.states:
        assert twin.state[twins[0]][name].dtype == torch.float32
        assert torch.equal(twin.state[twins[0]][name], optimizer.state[params[0]][name])
    train(twin, twins, generator)


@pytest.mark.engine
def test_parameter_without_state_stays_without(case, backend, generator):
    params = [torch.nn.Parameter(torch.randn(4, generator=generator)) for _ in range(2)]
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    params[0].grad = gradient(params[0], generator)
    optimizer.step()
    twins = params_like(params)
    twin = case.optimizer(twins, backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    assert not twin.state.get(twins[1])
    assert_go_on_alike(optimizer, params, twin, twins, generator)


def authors_checkpoint(params, grads, settings):
    """A state_dict as the authors' class saves it, by its own expanded arithmetic, in the parameters' dtype."""
    state = {}
    ps, ghattg = settings["ps"], settings["ghattg"]
    pa2, pbg2, pbhg2 = 2 * ps + 1 + 1e-4, 2 * ps, 2 * ghattg * ps
    for i, param in enumerate(params):
        mug, bg, bhg = (torch.zeros_like(param) for _ in range(3))
        for t, grad in enumerate(grads, 1):
            sg, shg = (pbg2 / (pa2 - 1), pbhg2 / (pa2 - 1)) if t == 1 else (bg / pa2, bhg / pa2)
            old, mug = mug, (grad * sg + mug * shg) / (sg + shg)
            square = sg * shg / (sg + shg) + mug**2
            rho1, rho2 = t ** -settings["tau1"], t ** -settings["tau2"]
            bg = bg * (1 - rho1) + rho1 * (pbg2 + square - 2 * mug * old + old**2)
            bhg = bhg * (1 - rho2) + rho2 * (pbhg2 + square - 2 * grad * mug + grad**2)
            param.mul_(1 - settings["lr"] * settings["weight_decay"])
            param.sub_(settings["lr"] / (square.sqrt() + settings["eps"]) * mug)
        constants = {"pa2": pa2, "pbg2": pbg2, "pbhg2": pbhg2, "step": float(len(grads))}
        state[i] = {"mug": mug, "bg": bg, "bhg": bhg, **{k: torch.tensor(v) for k, v in constants.items()}}
    return {"state": state, "param_groups": [{**settings, "params": list(range(len(params)))}]}


SETTINGS = {"ghattg": 20.0, "ps": 1e-6, "tau1": 0.8, "tau2": 0.95, "lr": 0.02, "weight_decay": 0.01, "eps": 1e-7}


def test_the_authors_checkpoint_goes_on_as_theirs(backend, generator):
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    grads = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(9)]
    halfway, end = start.clone(), start.clone()
    saved = authors_checkpoint([halfway], grads[:5], SETTINGS)
    finished = authors_checkpoint([end], grads, SETTINGS)["state"][0]
    param = torch.nn.Parameter(halfway.clone())
    optimizer = VSGD([param], lr=1.0, shape_offset=0.0, backend=backend)
    optimizer.load_state_dict(through_a_file(saved))
    assert {k: v for k, v in optimizer.param_groups[0].items() if k in SETTINGS} == SETTINGS
    assert optimizer.param_groups[0]["shape_offset"] == 1e-4
    for grad in grads[5:]:
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(param.detach(), end, rtol=1e-10, atol=1e-12)
    for name in ("mug", "bg", "bhg", "step"):
        wanted = finished[name].to(optimizer.state[param][name])
        torch.testing.assert_close(optimizer.state[param][name], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_into_the_authors_layout_and_on(generator, style, backend):
    """What their class would hold, from any format; loaded again, the next step is that of the states as they were."""
    params = [
        torch.nn.Parameter(torch.randn(5000, generator=generator)),
        torch.nn.Parameter(torch.randn(70, 90, generator=generator).bfloat16().t()),
        torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64)),
        torch.nn.Parameter(torch.randn(3, generator=generator)),
    ]
    groups = [{"params": params[:2], "lr": torch.tensor(0.5)}, {"params": params[2:]}]
    optimizer = VSGD(groups, **SETTINGS, state_format=style, master_weights=None, backend=backend)
    train(optimizer, params[:3], generator)
    saved = authors_state_dict(optimizer)
    theirs = authors_checkpoint([torch.ones(3)], [torch.ones(3)] * 3, SETTINGS)
    assert saved["state"].keys() == {0, 1, 2}
    assert saved["param_groups"] == [{**SETTINGS, "lr": 0.5, "params": [0, 1]}, {**SETTINGS, "params": [2, 3]}]
    for i, state in saved["state"].items():
        own = optimizer.state[params[i]]
        assert state.keys() == theirs["state"][0].keys()
        for key, value in zip(optimizer.rule.states, state_formats.decoded(own, optimizer.rule), strict=True):
            assert torch.equal(state[key], value)
            assert state[key].dtype == (torch.float64 if i == 2 else torch.float32)
            assert state[key].data_ptr() not in [entry.data_ptr() for entry in own.values()]
        for key in ("step", "pa2", "pbg2", "pbhg2"):
            assert torch.equal(state[key], theirs["state"][0][key])
    twins = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    twin = VSGD([{"params": twins[:2]}, {"params": twins[2:]}], master_weights=None, backend=backend)
    twin.load_state_dict(through_a_file(saved))
    for own, its in ((params, optimizer), (twins, twin)):
        train(its, own, torch.Generator().manual_seed(3), 1)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_what_the_authors_layout_cannot_hold():
    param = torch.nn.Parameter(torch.ones(3))
    for setting, value in (("maximize", True), ("shape_offset", 0.0)):
        with pytest.raises(ValueError, match=f"{setting} must be .* for the authors' class, .*, got {value}"):
            authors_state_dict(VSGD([param], **{setting: value}))
    with pytest.raises(TypeError, match=r"optimizer must be a vsgd_kernels\.VSGD or SampleVSGD, got SGD"):
        authors_state_dict(torch.optim.SGD([param]))


def test_the_authors_low_precision_states_are_restored_exactly(backend, generator):
    start = torch.randn(50, generator=generator).bfloat16()
    saved = authors_checkpoint([start], [torch.randn(50, generator=generator).bfloat16() for _ in range(3)], SETTINGS)
    param = torch.nn.Parameter(start)
    optimizer = VSGD([param], backend=backend)
    optimizer.load_state_dict(through_a_file(saved))
    for name in ("mug", "bg", "bhg"):
        assert torch.equal(optimizer.state[param][name], saved["state"][0][name].float())
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.isfinite().all()


def test_pytorch_optimizers_checkpoint_goes_on_as_theirs(backend, generator):
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(start.clone())
    their_optimizer = pytorch_optimizer.VSGD([theirs], **SETTINGS)
    train(their_optimizer, [theirs], generator, steps=4)
    param = torch.nn.Parameter(theirs.detach().clone())
    optimizer = VSGD([param], backend=backend)
    optimizer.load_state_dict(through_a_file(their_optimizer.state_dict()))
    restored = {k: v for k, v in optimizer.param_groups[0].items() if k in SETTINGS}
    assert restored == pytest.approx(SETTINGS, rel=1e-12)
    assert optimizer.state[param]["step"] == 4
    for _ in range(4):
        param.grad = gradient(param, generator)
        theirs.grad = param.grad.clone()
        optimizer.step()
        their_optimizer.step()
    torch.testing.assert_close(param, theirs, rtol=1e-10, atol=1e-12)


def test_pytorch_optimizers_checkpoint_leaves_maximize_alone(generator):
    """It keeps maximize on the object, not in its checkpoint."""
    theirs = torch.nn.Parameter(torch.ones(3))
    their_optimizer = pytorch_optimizer.VSGD([theirs], maximize=True)
    train(their_optimizer, [theirs], generator)
    optimizer = VSGD([torch.nn.Parameter(torch.ones(3))], maximize=True)
    optimizer.load_state_dict(their_optimizer.state_dict())
    assert optimizer.param_groups[0]["maximize"] is True


def test_pytorch_optimizers_prior_of_zero_is_refused(generator):
    theirs = torch.nn.Parameter(torch.ones(3))
    their_optimizer = pytorch_optimizer.VSGD([theirs], ps=0.0)
    train(their_optimizer, [theirs], generator)
    with pytest.raises(ValueError, match=r"ps=0.0 in the checkpoint"):
        VSGD([torch.nn.Parameter(torch.ones(3))]).load_state_dict(their_optimizer.state_dict())


def test_rates_below_float32_are_restored_as_small_as_it_can_be(backend):
    wide = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    wide.grad = torch.zeros_like(wide)
    optimizer = VSGD([wide], ps=1e-60, eps=0.0, shape_offset=0.0, backend=backend)
    optimizer.step()
    narrow = torch.nn.Parameter(torch.ones(3))
    twin = VSGD([narrow], backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    narrow.grad = torch.zeros_like(narrow)
    twin.step()
    assert torch.equal(narrow, torch.ones(3))
    assert (twin.state[narrow]["bg"] > 0).all()


def test_pytorch_optimizers_coupled_decay_is_refused(generator):
    theirs = torch.nn.Parameter(torch.ones(3))
    their_optimizer = pytorch_optimizer.VSGD([theirs], weight_decay=0.1, weight_decouple=False)
    train(their_optimizer, [theirs], generator)
    with pytest.raises(ValueError, match=r"weight_decouple=False with weight_decay=0.1"):
        VSGD([torch.nn.Parameter(torch.ones(3))]).load_state_dict(their_optimizer.state_dict())
