"""master_weights as a setting: checkpoints, changes between steps, bad input."""

import copy
import pickle

import pytest
import torch

from tests.cases import assert_same_bits, gradient, master_of, through_a_file, train
from vsgd_kernels import VSGD
from vsgd_kernels.formats import MASTER_WEIGHTS

BF16, FP16 = torch.bfloat16, torch.float16


def make(mode, generator, backend=None, **settings):
    params = [
        torch.nn.Parameter(torch.randn(300, generator=generator).bfloat16()),
        torch.nn.Parameter(torch.randn(20, 9, generator=generator).half().t()),
        torch.nn.Parameter(torch.randn(50, generator=generator)),
    ]
    return params, VSGD(params, lr=1e-3, master_weights=mode, seed=5, backend=backend, **settings)


def tensors_of(params, optimizer):
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def test_resume_is_exact(mode, generator, backend):
    params, optimizer = make(mode, generator, backend)
    train(optimizer, params, generator)
    others = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    resumed = VSGD(others, master_weights=mode, backend=backend)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for own, its in ((params, optimizer), (others, resumed), (copied.param_groups[0]["params"], copied)):
        assert its.param_groups[0]["master_weights"] == mode
        train(its, own, torch.Generator().manual_seed(9))
        assert_same_bits(tensors_of(params, optimizer), tensors_of(own, its)) if its is not optimizer else None


@pytest.mark.parametrize("old", list(MASTER_WEIGHTS), ids=str)
@pytest.mark.parametrize("how", ["load", "group"])
def test_into_another_mode(old, mode, how, generator, backend):
    """The master is kept as far as it goes, and the parameter is not touched."""
    params, optimizer = make(old, generator, backend)
    train(optimizer, params, generator)
    visible, before = [p.detach().clone() for p in params], [master_of(optimizer, p) for p in params]
    if how == "load":
        loaded = VSGD(params, lr=1e-3, master_weights=mode, backend=backend)
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer = loaded
    optimizer.param_groups[0].update(master_weights=mode, lr=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    bits = {"exact": 16, "split8": 8, None: 0}
    for param, seen, wanted in zip(params, visible, before, strict=True):
        assert torch.equal(param, seen)
        now = master_of(optimizer, param)
        if param.dtype == torch.float32 or bits[mode] >= bits[old]:
            assert torch.equal(now, wanted)
        elif mode is None:
            assert torch.equal(now, seen.float())
        else:
            # Half an 8-bit fraction; a whole one where the nearest one would be the next parameter's.
            unit = torch.finfo(param.dtype).eps * seen.float().abs().clamp(min=2.0**-14) * 2.0**-8
            assert ((now - wanted).abs() <= unit).all()
            assert ((now - wanted).abs() <= unit / 2).double().mean() > 0.97
            assert not torch.equal(now, wanted)
        low = optimizer.state[param].get("low")
        assert (low is None) == (mode is None or param.dtype == torch.float32)
    train(optimizer, params, generator, 1)


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (torch.zeros(299, dtype=torch.int8), r"expected low of shape \(300,\), found \(299,\)"),
        (torch.zeros(300), "expected low of torch.int16 or torch.int8, found torch.float32"),
        (None, "expected low to be a tensor, found None"),
    ],
)
def test_altered(low, message, rounded, generator):
    """Refused before anything is written."""
    params, optimizer = make(rounded, generator)
    train(optimizer, params, generator, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["low"] = low
    before = [t.clone() for t in tensors_of(params, optimizer)]
    with pytest.raises(ValueError, match=f"state of parameter 0: {message}"):
        optimizer.load_state_dict(saved)
    assert_same_bits(tensors_of(params, optimizer), before)


def test_altered_between_steps(generator, backend):
    params, optimizer = make("split8", generator, backend)
    train(optimizer, params, generator, 1)
    state = optimizer.state[params[0]]
    for low, error, message in (
        (torch.zeros(300), TypeError, "state 'low' of parameter 0 of group 0 must be torch.int.* got torch.float32"),
        (torch.zeros(299, dtype=torch.int8), ValueError, r"state 'low' of parameter 0 .*\(300,\), got \(299,\)"),
    ):
        kept, before = dict(state), params[0].detach().clone()
        state["low"] = low
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(params[0], before)
        state.update(kept)
    train(optimizer, params, generator, 1)


def parameter(dtype, n=3):
    return torch.nn.Parameter(torch.ones(n, dtype=dtype))


@pytest.mark.parametrize("value", ["half", "EXACT", 8, True, ["exact"]])
def test_unknown_value(value):
    message = r"master_weights must be one of 'exact', 'split8', None, got .*"
    with pytest.raises(ValueError, match=message) as error:
        VSGD([parameter(BF16)], master_weights=value)
    assert repr(value) in str(error.value)
    optimizer = VSGD([parameter(BF16)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(BF16)], "master_weights": value})
    assert len(optimizer.param_groups) == 1


def test_refused_without_16_bit_parameters(mode):
    message = f"master_weights={mode!r} is for bfloat16 and float16 parameters, got none but torch.float32"
    with pytest.raises(ValueError, match=message):
        VSGD([parameter(torch.float32)], master_weights=mode)
    with pytest.raises(ValueError, match=f"{message}, torch.float64"):
        VSGD([{"params": [parameter(torch.float64)]}, {"params": [parameter(torch.float32)]}], master_weights=mode)
    with pytest.raises(ValueError, match=message):
        VSGD([{"params": [parameter(BF16)]}, {"params": [parameter(torch.float32)], "master_weights": mode}])
    optimizer = VSGD([parameter(BF16)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(torch.float32)], "master_weights": mode})
    assert len(optimizer.param_groups) == 1


def test_accepted_with_any_16_bit_parameter(mode, generator):
    """A 16-bit model with normalisation layers in float32, in one group or in one of their own."""
    for groups in (
        [parameter(BF16), parameter(torch.float32)],
        [{"params": [parameter(BF16)]}, {"params": [parameter(torch.float32)], "weight_decay": 0.0}],
    ):
        optimizer = VSGD(groups, lr=1e-2, master_weights=mode)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        train(optimizer, params, generator, 1)
        assert ("low" in optimizer.state[params[0]]) == (mode is not None)
        assert "low" not in optimizer.state[params[1]]
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer.add_param_group({"params": [parameter(torch.float64)]})
        assert {group["master_weights"] for group in optimizer.param_groups} == {mode}


def test_nobody_has_to_ask(generator):
    """float32 parameters just work: constructed, saved, copied, and taken over from another optimizer."""
    params = [parameter(torch.float32), parameter(torch.float64)]
    optimizer = VSGD(params, lr=1e-2)
    assert type(optimizer.param_groups[0]["master_weights"]) is str
    train(optimizer, params, generator, 1)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    again = VSGD([{**group} for group in optimizer.param_groups])
    again.add_param_group({**VSGD([parameter(torch.float32)]).param_groups[0]})
    train(again, [p for group in again.param_groups for p in group["params"]], generator, 1)


def test_op_without_low(generator, backend):
    """The op as the optimizer launches it, with parameters of each kind."""
    params, optimizer = make(None, generator, backend)
    plain = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
    grads = [gradient(p, generator) for p in params]
    states = [torch.full_like(p, x, dtype=torch.float32) for p in plain for x in (0.0, 2e-8, 2 * 30 * 1e-8)]
    row = [float(optimizer.param_groups[0][name]) for name in optimizer.rule.hyper]
    operands = {
        "params": plain,
        "grads": grads,
        "lows": [],
        "states": states,
        "blocks": [],
        "steps": [torch.zeros(()) for _ in plain],
        "hyper": torch.tensor([row], dtype=torch.float64),
        "groups": [0, 0, 0],
        "rule": "vsgd",
        "backend": backend,
        "seed": 5,
        "without_low": [0, 1],
    }
    op = torch.ops.vsgd_kernels.step.default
    with pytest.raises(ValueError, match="without_low must hold places of 16-bit parameters in params, 0 to 2, got 2"):
        op(**{**operands, "without_low": [2]})
    message = r"must have 3, 1, those of 3 parameters, 3 and 3 entries for these params, got \[3, 0, 3, 3, 3\]"
    with pytest.raises(ValueError, match=message):
        op(**{**operands, "without_low": [0]})
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        op(**operands)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
