"""How samples are added: on every backend, with every instruction set, as the reference does, in any layout."""

import copy

import pytest
import torch

from tests.cases import SIZES, assert_same_bits, each_isa, extreme_gradients, gradient, layouts, misaligned
from vsgd_kernels import VSGD, SampleVSGD
from vsgd_kernels.batch import DTYPES

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
    found = [accumulated(params, steps, "cpp")]  # by the best, and then by each
    found += [accumulated(params, steps, "cpp") for _ in each_isa(monkeypatch)]
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
    for how in ("accumulated", "given", "last one left"):
        generator.manual_seed(1)
        param = torch.nn.Parameter(torch.ones(30))
        optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
        for _ in range(3):
            param.grad = gradient(param, generator)
            optimizer.step()
        samples = [gradient(param, generator) for _ in range(3)]
        if how == "given":
            param.grad_sample = torch.stack(samples)
        else:
            for param.grad in samples[: 3 if how == "accumulated" else 2]:
                optimizer.accumulate()
        if how == "last one left":
            param.grad = samples[2]
        optimizer.step()
        outcomes.append([param, *optimizer.state[param].values()])
    assert_same_bits(outcomes[0], outcomes[1])
    assert_same_bits(outcomes[0], outcomes[2])
