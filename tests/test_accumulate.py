"""How samples are added: on every backend, with every instruction set, as the reference does, whatever was prepared."""

import copy
import gc
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from tests.cases import SIZES, assert_same_bits, each_isa, extreme_gradients, gradient, layouts, misaligned
from vsgd_kernels import VSGD, SampleVSGD, sample_vsgd
from vsgd_kernels.backends.on_device import OnDevice
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.stepper import Stepper

#: of [M, *shape]
ARRANGEMENTS = {
    "contiguous": lambda samples: samples,
    "last": lambda samples: samples.movedim(0, -1).contiguous().movedim(-1, 0),
    "misaligned": misaligned,
    "one for all": lambda samples: samples[:1].expand(3, *samples.shape[1:]),
    "negative": lambda samples: torch.complex(samples, -samples).conj().imag,
    "in a list": lambda samples: list(samples.split(2)),
}


def moments_of(optimizer, params):
    """Count, mean and variance of each."""
    every = [optimizer._samples[param] for param in params if param in optimizer._samples]
    return [t for own in every for t in (torch.tensor(own.count), own.get_mean(), own.get_variance())]


def twins_of(params):
    return [torch.nn.Parameter(param.detach().clone(memory_format=torch.preserve_format)) for param in params]


def pairs_of(dtype, generator):
    """Parameters, and a gradient of each, in every size and layout."""
    pairs = list(layouts(dtype, generator).values())
    pairs += [(torch.zeros(n, dtype=dtype), torch.randn(n, generator=generator).to(dtype)) for n in SIZES]
    extreme = extreme_gradients().to(dtype)
    return [*pairs, (torch.zeros_like(extreme), extreme)]


def accumulated(params, steps, backend):
    """Moments after as many calls, each with what `steps` has for the parameters."""
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.accumulate()
    return moments_of(optimizer, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_micro_batches(backend, dtype, generator):
    """In every size and layout, also where they are not finite."""
    pairs = pairs_of(dtype, generator)
    params = [torch.nn.Parameter(param) for param, _ in pairs]
    steps = [[grad * factor for _, grad in pairs] for factor in (1.0, -0.5, 3.0)]
    steps[1][-1] = torch.ones_like(steps[1][-1])  # beside what is not finite
    assert_same_bits(accumulated(params, steps, backend), accumulated(twins_of(params), steps, "eager"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(dtype, generator, monkeypatch):
    pairs = pairs_of(dtype, generator)
    params = [torch.nn.Parameter(param) for param, _ in pairs]
    steps = [[grad * factor for _, grad in pairs] for factor in (1.0, -0.5, 3.0)]
    found = [accumulated(params, steps, "cpp") for _ in each_isa(monkeypatch)]
    assert len(found) > 1
    for moments in found[1:]:
        assert_same_bits(moments, found[0])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_per_sample_gradients(backend, arrangement, dtype, generator):
    """After a micro-batch, and again."""
    if arrangement == "negative" and dtype == torch.bfloat16:
        dtype = torch.float16  # there are no complex numbers of bfloat16
    outcomes = []
    for name in (backend, "eager"):
        generator.manual_seed(1)
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((), (7, 5), (5, 4, 300), (0, 3))]
        params.append(torch.nn.Parameter(torch.zeros(40, 30, dtype=dtype).t()))
        optimizer = SampleVSGD(params, lr=1e-2, backend=name)
        for _ in range(2):
            for param in params:
                param.grad = gradient(param, generator)
            optimizer.accumulate()
            for param in params:
                samples = torch.stack([gradient(param, generator) for _ in range(3)])
                param.grad_sample = ARRANGEMENTS[arrangement](samples)
            optimizer.accumulate()
            assert all(param.grad_sample is None for param in params)
        outcomes.append(moments_of(optimizer, params))
    assert {int(count) for count in outcomes[0][::3]} == {8}
    assert_same_bits(*outcomes)


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
    params[0].data = params[0].data.double()
    fresh[0] = fresh[0].double()


CHANGES = (
    *(set_another_layout, set_another_alignment, leave_one_out, give_samples, move, add, replace, discard, step),
    *(step_that_takes_some, leave_and_come_back, change_dtype),
)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_prepared(backend, change, generator):
    """Something changes after two calls that found the same; two more follow, as if nothing had been prepared."""
    outcomes = []
    for anew in (False, True):
        generator.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(5, 6, generator=generator)) for _ in range(3)]
        optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
        for i in range(5):
            fresh = [gradient(param, generator) for param in params]
            if i == 2:
                change(optimizer, params, fresh)
            for param, grad in zip(params, fresh, strict=True):
                param.grad = None if grad is None else grad.to(param.dtype)
            if anew:
                optimizer._forget_prepared()
            optimizer.accumulate()
            assert all(param.grad is None for param in params)
        outcomes.append([*moments_of(optimizer, params), *optimizer.param_groups[0]["params"]])
    assert len(outcomes[0]) > 6
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("accumulated", [False, True])
def test_one_sample_after_several(backend, generator, accumulated):
    """The variance of a step before is none of the next step's; and back."""
    param, twin = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizer, plain = SampleVSGD([param], lr=1e-2, backend=backend), VSGD([twin], lr=1e-2, backend=backend)
    for _ in range(2):
        for _ in range(2):
            param.grad = gradient(param, generator)
            optimizer.accumulate()
        optimizer.step()
        with torch.no_grad():
            twin.copy_(param)
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(3):
            param.grad = gradient(param, generator)
            twin.grad = param.grad.clone()
            if accumulated:
                optimizer.accumulate()
            optimizer.step()
            plain.step()
            assert torch.equal(param, twin)


def test_samples_after_gradients_alone(backend, generator):
    """A step that has found everything as before looks for samples nevertheless."""
    outcomes = []
    for how in ("accumulated", "given"):
        generator.manual_seed(1)
        param = torch.nn.Parameter(torch.ones(30))
        optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
        for _ in range(3):
            param.grad = gradient(param, generator)
            optimizer.step()
        samples = [gradient(param, generator) for _ in range(3)]
        if how == "given":
            param.grad_sample = torch.stack(samples)
        for param.grad in samples if how == "accumulated" else ():
            optimizer.accumulate()
        optimizer.step()
        outcomes.append([param, *optimizer.state[param].values()])
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
        for param in params:
            param.grad = gradient(param, generator)
        optimizer.step()
    left = weakref.ref(params.pop())
    del param, optimizer.state[optimizer.param_groups[0]["params"].pop()]
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


def test_graphs(generator, monkeypatch):
    """Samples are counted on the host, and of that no graph can be made; one of a step reads variances as they are."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    monkeypatch.setattr(Stepper, "has_captured", True)
    optimizer.step()
    assert not optimizer._samples[param].variance.any()
    monkeypatch.setattr(sample_vsgd, "capturing", lambda: True)
    param.grad = gradient(param, generator)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured, and samples are counted on the host"):
        optimizer.accumulate()
    assert param.grad is not None


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
