"""What is kept from one call of `accumulate` to the next: it is noticed to be out of date; and what is refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from tests.cases import assert_same_bits, gradient, misaligned
from tests.test_accumulate import moments_of
from vsgd_kernels import SampleVSGD
from vsgd_kernels.backends.device_samples import PreparedSamples
from vsgd_kernels.backends.on_device import OnDevice
from vsgd_kernels.batch import SampleBatch
from vsgd_kernels.rules import arithmetic_dtype


def set_another_layout(optimizer, params, fresh):
    fresh[0] = fresh[0].t().contiguous().t()


def set_another_alignment(optimizer, params, fresh):
    fresh[0] = misaligned(fresh[0])


def leave_one_out(optimizer, params, fresh):
    fresh[0] = None


def give_samples(optimizer, params, fresh):
    params[0].grad_sample = torch.stack([fresh[0], 2 * fresh[0]])


def move(optimizer, params, fresh):
    params[0].data = params[0].data.clone()


def add(optimizer, params, fresh):
    params.append(torch.nn.Parameter(torch.ones(4, 3)))
    fresh.append(torch.full((4, 3), 2.0))
    optimizer.add_param_group({"params": params[-1:]})


def replace(optimizer, params, fresh):
    params[0] = torch.nn.Parameter(torch.ones(params[0].shape))
    optimizer.param_groups[0]["params"][0] = params[0]


def replace_by_one_of_the_same_memory(optimizer, params, fresh):
    params[0] = torch.nn.Parameter(params[0].data)
    optimizer.param_groups[0]["params"][0] = params[0]


def discard(optimizer, params, fresh):
    optimizer.discard()


def step(optimizer, params, fresh):
    optimizer.step()


def step_that_takes_some(optimizer, params, fresh):
    """Of one parameter that has samples; of another that has none it takes the gradient alone."""
    optimizer.discard()
    params[1].grad = torch.ones_like(params[1])
    optimizer.accumulate()
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 100.0 * i)
    optimizer.step()


def leave_and_come_back(optimizer, params, fresh):
    own = optimizer.param_groups[0]["params"]
    optimizer.discard()
    first = own.pop(0)
    for param in own:
        param.grad = torch.ones_like(param)
    optimizer.step()
    own.insert(0, first)


def change_dtype(optimizer, params, fresh):
    optimizer.discard()
    del optimizer.state[params[0]]
    params[0].data = params[0].data.double()
    fresh[0] = fresh[0].double()


def take_in_inference_mode(optimizer, params, fresh):
    """Gradients of another layout, so that something is prepared there; they are made outside, as the next ones are."""
    set_another_layout(optimizer, params, fresh)
    for param, grad in zip(params, fresh, strict=True):
        param.grad = 2 * grad
    with torch.inference_mode():
        optimizer.accumulate()


CHANGES = (
    *(set_another_layout, set_another_alignment, leave_one_out, give_samples, move, add, replace, discard, step),
    *(replace_by_one_of_the_same_memory, step_that_takes_some, leave_and_come_back, change_dtype),
    take_in_inference_mode,
)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_prepared(backend, change, generator):
    """Something changes after a step and two calls that found the same; then all is as if nothing had been prepared."""
    outcomes = []
    for anew in (False, True):
        generator.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(5, 6, generator=generator)) for _ in range(3)]
        optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
        for i in range(6):
            fresh = [gradient(param, generator) for param in params]
            if i == 1:
                optimizer.step()
            if i == 3:
                change(optimizer, params, fresh)
            for param, grad in zip(params, fresh, strict=True):
                param.grad = None if grad is None else grad.to(param.dtype)
            if anew:
                optimizer._forget_prepared()
            optimizer.accumulate()
            assert all(param.grad is None for param in params)
        outcomes.append(moments_of(optimizer, params))
        optimizer.step()
        outcomes[-1] += [t.detach().clone() for t in params]
    assert_same_bits(*outcomes)


def test_what_is_kept(backend, generator):
    """The gradients are not; mean and variance stay where they are."""
    params = [torch.nn.Parameter(torch.randn(4000, generator=generator)) for _ in range(2)]
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    places = set()
    for i in range(6):
        grads = [gradient(param, generator) for param in params]
        dying = [weakref.ref(grad) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        del grad, grads
        optimizer.accumulate()
        gc.collect()
        assert [ref() for ref in dying] == [None, None]
        places.add(tuple(t.data_ptr() for own in optimizer._samples.values() for t in (own.mean, own.variance)))
        if i == 3:
            optimizer.step()
    assert len(places) == 1
    twin = copy.deepcopy(optimizer)
    assert all(own.count == 2 and own.mean is not None for own in twin._samples.values())
    optimizer.step()
    assert all(own.mean is None for own in copy.deepcopy(optimizer)._samples.values())


def test_a_parameter_that_has_left(generator):
    """It is freed, also after steps that took gradients alone."""
    params = [torch.nn.Parameter(torch.randn(40, generator=generator)) for _ in range(2)]
    optimizer = SampleVSGD(params, lr=1e-2)
    for _ in range(2):
        params[0].grad = gradient(params[0], generator)
        optimizer.step()
    left = weakref.ref(params.pop())
    del optimizer.param_groups[0]["params"][1]
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(3))})  # which takes note of what there is
    params[0].grad = gradient(params[0], generator)
    optimizer.accumulate()
    optimizer.step()
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("where", ["grad", "grad_sample"])
def test_samples_without_memory(where):
    """They are refused, and nothing is taken."""
    params = [torch.nn.Parameter(torch.ones(2, 4000)) for _ in range(2)]
    optimizer = SampleVSGD(params, lr=1e-2)
    for _ in range(2):
        params[0].grad = torch.ones(2, 4000)
        setattr(params[1], where, torch._efficientzerotensor((2, 4000) if where == "grad" else (3, 2, 4000)))
        with pytest.raises(TypeError, match="what parameter 1 of group 0 is fed has no memory of its own"):
            optimizer.accumulate()
        assert params[0].grad is not None
        setattr(params[1], where, None)
        optimizer.accumulate()
    assert [own.count for own in optimizer._samples.values()] == [2, 0]
    params[1].grad_sample = TwoTensor(torch.ones(3, 2, 4000), torch.ones(3, 2, 4000))
    with pytest.raises(TypeError, match=r"grad_sample of parameter 1 .* got a wrapper of other tensors, TwoTensor"):
        optimizer.accumulate()


@pytest.mark.usefixtures("looks")
def test_gradients_that_negate_their_memory(generator):
    """They lie as those before, and are refused."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    param.grad = torch._neg_view(gradient(param, generator))
    with pytest.raises(TypeError, match=r"the gradient of parameter 0 .* negates its memory"):
        optimizer.accumulate()
    assert optimizer._samples[param].count == 2


@pytest.mark.parametrize(
    ("samples", "aligned"),
    [
        (torch.ones(1, 5), True),
        (torch.ones(2, 8), True),
        (torch.ones(2, 5), False),
        (torch.ones(2, 5, dtype=torch.float64), False),
        (torch.ones(2, 4, dtype=torch.bfloat16), False),
        (misaligned(torch.ones(1, 8)), False),
    ],
)
def test_alignment(samples, aligned):
    """Of every sample."""
    mean, variance = (torch.zeros(samples.shape[1:], dtype=arithmetic_dtype(samples.dtype)) for _ in range(2))
    prepared = PreparedSamples(SampleBatch(["x"], [mean], [variance]), [samples], 1024)
    assert [launch.path.aligned for launch in prepared.launches] == [aligned]


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_alignment_changes(backend, generator):
    """Kernels that take 16 bytes at once get no other addresses."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    found = []
    for lay in (torch.clone, torch.clone, misaligned, torch.clone):
        param.grad = lay(gradient(param, generator))
        optimizer.accumulate()
        (_, prepared, _), *_ = optimizer._intake._launches
        found += [launch.path.aligned for launch in prepared.launches]
    assert found == [True, True, False, True]


def test_one_parameter_twice(backend):
    """Refused, as its step is, and nothing is taken."""
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SampleVSGD([param, param], lr=1e-2, backend=backend)
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="parameter 1 of group 0 is parameter 0 of group 0 once more"):
        optimizer.accumulate()
    assert param.grad is not None
    assert param not in optimizer._samples


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_nothing_changed(backend, generator, monkeypatch):
    """Then only addresses and counts go to a device."""
    params = [torch.nn.Parameter(torch.randn(40, generator=generator)) for _ in range(5)]
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    copied = []
    copy = OnDevice.copy
    monkeypatch.setattr(OnDevice, "copy", lambda self, to, host: copied.append(host.numel()) or copy(self, to, host))
    for _ in range(2):
        copied.clear()
        for param in params:
            param.grad = gradient(param, generator)
        optimizer.accumulate()
    assert copied == [5, 5]
