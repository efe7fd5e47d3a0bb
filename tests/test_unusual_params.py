"""Parameters, groups and states as one rarely meets them: stepped as torch's optimizers do, or refused in words."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.cases import assert_same_bits
from tests.test_bad_input import assert_refused, leaf, make
from vsgd_kernels import VSGD, SampleVSGD, arithmetic, authors_state_dict
from vsgd_kernels.state_formats import FORMATS


def negated(values):
    """A view that negates its memory."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg()
    assert torch.equal(view, values)
    return view


def test_negated_parameter(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].data = negated(torch.ones(3))
    assert_refused(optimizer, params, TypeError, "parameter 1 of group 0 must hold its own values.*resolve_neg")


@pytest.mark.parametrize("key", ["mug", "bg", "bhg"])
def test_negated_state(backend, key):
    optimizer, params = make(backend, stepped=True)
    optimizer.state[params[1]][key] = negated(torch.ones(3))
    assert_refused(optimizer, params, TypeError, f"state '{key}' of parameter 1 of group 0 must hold its own values")


def test_one_parameter_twice(backend):
    """torch warns that it will be an error; stepping it twice at once would be a race."""
    param = leaf()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = VSGD([leaf(), param, param], backend=backend)
    param.grad = torch.ones(3)
    assert_refused(optimizer, [param], ValueError, "parameter 2 of group 0 is parameter 1 of group 0 once more")
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64], ids=str)
def test_frozen_parameters_may_be_anything(dtype):
    """As quantised weights are, beside which others are trained."""
    frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    params, twin = [leaf(), frozen], leaf()
    optimizer, other = VSGD(params, lr=0.1), VSGD([twin], lr=0.1)
    params[0].grad = twin.grad = torch.ones(3)
    optimizer.step()
    other.step()
    assert_same_bits(params[:1], [twin])
    assert list(optimizer.state) == params[:1]


def test_parameters_in_a_tuple():
    param, twin = leaf(), leaf()
    optimizer, other = VSGD([param], lr=0.1), VSGD([twin], lr=0.1)
    optimizer.param_groups[0]["params"] = (param,)
    for _ in range(2):
        param.grad = twin.grad = torch.ones(3)
        optimizer.step()
        other.step()
    assert_same_bits([param], [twin])


def test_lazy_parameters_and_gradient_release():
    """Which torch cannot hook."""
    param = leaf()
    optimizer = VSGD([param], gradient_release=True)
    with pytest.raises(ValueError, match="parameter 0 of group 1 has no shape yet"):
        optimizer.add_param_group({"params": list(torch.nn.LazyLinear(3).parameters())})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer._release._handles) == [param]
    with pytest.raises(ValueError, match="parameter 0 of group 0 has no shape yet"):
        VSGD(torch.nn.LazyLinear(3).parameters(), gradient_release=True)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [torch.ones((), dtype=torch.float64), torch.ones(2), 1.0], ids=str)
def test_scalars_of_loss_scaling(backend, stepped, name, value):
    optimizer, params = make(backend, stepped)
    setattr(optimizer, name, value)
    assert_refused(optimizer, params, TypeError, name)


@pytest.mark.parametrize("bound", [math.inf, 1e39])
@pytest.mark.parametrize("gradient", [3e38, math.inf])
def test_an_infinite_norm_clips_nothing(backend, gradient, bound):
    """A bound beyond what the norm can be leaves the norm and nothing else, also where the norm overflows."""
    params, twins = [leaf(), leaf()], [leaf(), leaf()]
    optimizer, plain = VSGD(params, max_grad_norm=bound, backend=backend), VSGD(twins, backend=backend)
    for own in (params, twins):
        own[0].grad, own[1].grad = torch.tensor([gradient, gradient, 2.0]), torch.ones(3)
    optimizer.step()
    plain.step()
    assert optimizer.grad_norm == math.inf
    assert_same_bits(params, twins)


def test_authors_layout_beside_an_empty_state():
    """Merely asking the optimizer for a state makes one."""
    params = [leaf(), leaf()]
    optimizer = VSGD(params)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[params[1]] == {}
    assert list(authors_state_dict(optimizer)["state"]) == [0]


def test_authors_layout_of_samples():
    """The states are VSGD's, and so is the layout."""
    saved = []
    for rule in (VSGD, SampleVSGD):
        param = leaf()
        optimizer = rule([param])
        param.grad = torch.ones(3)
        optimizer.step()
        saved.append(authors_state_dict(optimizer)["state"][0])
    assert saved[0].keys() == saved[1].keys()
    assert_same_bits(saved[0].values(), saved[1].values())


def test_no_samples():
    param = leaf()
    optimizer = SampleVSGD([param])
    param.grad_sample = []
    with pytest.raises(ValueError, match=r"grad_sample of parameter 0 of group 0 must hold one or more .*, got \[\]"):
        optimizer.accumulate()


def test_samples_of_a_parameter_that_has_left():
    """They are forgotten, before anything asks whether a GradScaler has seen them."""
    params = [leaf(), leaf()]
    optimizer = SampleVSGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    params[1].grad = torch.ones(3)
    optimizer.accumulate()
    optimizer.param_groups.pop()
    params[0].grad, optimizer.found_inf = torch.ones(3), torch.zeros(())
    optimizer.step()
    assert params[1] not in optimizer._samples
    assert list(optimizer.state) == params[:1]
    assert torch.equal(params[1], leaf())


def test_lazy_parameters_are_stepped_once_they_have_a_shape():
    model = torch.nn.LazyLinear(2)
    optimizer = VSGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight < before).all()


def test_a_product_beyond_float32(backend):
    """The weight that a step leaves would be infinite, and times a parameter of 0 NaN."""
    optimizer, params = make(backend, stepped=True)
    optimizer.param_groups[0].update(lr=1e30, weight_decay=1e30)
    assert_refused(
        optimizer, params, ValueError, r"weight_decay times lr must be finite in float32, got 1e\+30 and 1e\+30"
    )


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("make_optimizer", [VSGD, SampleVSGD])
def test_fake_tensors(backend, style, make_optimizer):
    """Programs that estimate memory run steps of them: states are made, of the sizes of real ones."""
    arithmetic._is_fused.cache_clear()  # asked of them, it would have no values to find out with
    states = []
    for mode in (FakeTensorMode(), nullcontext()):
        with mode:
            params = [torch.nn.Parameter(torch.ones(70, 70, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
            optimizer = make_optimizer(params, lr=0.1, state_format=style, backend=backend)
            for _ in range(2):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            states.append([{k: (v.shape, v.dtype) for k, v in entries.items()} for entries in optimizer.state.values()])
    assert states[0] == states[1]
