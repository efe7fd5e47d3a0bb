"""The host's side of the GPU backends, and the CUDA kernels' blocks: on the CPU, without a GPU."""

import gc
import weakref

import pytest
import torch

from tests.cases import (
    SIZES,
    assert_same_bits,
    check_step,
    extreme_gradients,
    gradient,
    layouts,
    make_params,
    misaligned,
)
from vsgd_kernels.backends.device import Prepared
from vsgd_kernels.batch import DTYPES


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture
def copies(monkeypatch):
    """What is copied to the device, in numbers of elements."""
    seen = []
    copy = Prepared.copy

    def recorded(self, to, host):
        seen.append(host.numel())
        return copy(self, to, host)

    monkeypatch.setattr(Prepared, "copy", recorded)
    return seen


def launches(optimizer):
    return [inner for launch, _ in optimizer._stepper._plan._launches for inner in launch._prepared.launches]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_equal_the_cpu_kernel_to_the_bit(case, dtype, generator):
    """Sizes, layouts and extreme gradients, over several steps."""
    pairs = [(p, g) for p, g in layouts(dtype, generator).values()]
    pairs += [(torch.randn(n, generator=generator).to(dtype), torch.randn(n).to(dtype)) for n in SIZES]
    extreme = extreme_gradients().to(dtype)
    pairs.append((torch.linspace(-3, 3, len(extreme), dtype=dtype), extreme))
    outcomes = []
    for name in ("cpp", "cuda"):
        generator.manual_seed(1)
        params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p, _ in pairs]
        optimizer = case.optimizer(params, **case.settings, backend=name)
        for scale in (1.0, 1024.0, 3.0):
            for param, (_, grad) in zip(params, pairs, strict=True):
                param.grad = grad
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        outcomes.append([t for p in params for t in (p, *optimizer.state[p].values())])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.engine
def test_one_launch_for_a_uniform_model(case, backend, generator):
    """Whatever the groups, step counts and odd or empty shapes."""
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (0, 5, 5000, 0, 16384, 1)]
    optimizer = case.optimizer([{"params": params[:2], **case.settings}, {"params": params[2:]}], backend=backend)
    for first in (3, 0, 1):
        for param in params[first:]:
            param.grad = gradient(param, generator)
        check_step(optimizer, [p for p in params if p.grad is not None])
    assert len(launches(optimizer)) == 1
    assert len(launches(optimizer)[0].rows) == 6


@pytest.mark.engine
def test_in_inference_mode(case, backend):
    """Steps as elsewhere, those after a change of the learning rate too."""
    outcomes = []
    for inference in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = make_params(generator, 3)
        optimizer = case.optimizer(params, lr=1e-2, backend=backend)
        with torch.inference_mode(inference):
            for lr in (1e-2, 1e-2, 5e-3, 5e-3):
                optimizer.param_groups[0]["lr"] = lr
                for param in params:
                    param.grad = gradient(param, generator)
                optimizer.step()
            outcomes.append([value.clone() for p in params for value in (p, *optimizer.state[p].values())])
    assert_same_bits(*outcomes)


@pytest.mark.engine
@pytest.mark.parametrize(
    "change", [lambda state: state.update(own=1), lambda state: state["step"].fill_(7)], ids=["prepared", "counts"]
)
def test_out_of_inference_mode(case, backend, generator, change):
    """What a step has made there can be written to outside."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    with torch.inference_mode():
        change(optimizer.state[params[0]])
        optimizer.step()
    for lr in (1e-2, 1e-2, 5e-3):
        optimizer.param_groups[0]["lr"] = lr
        for param in params:
            param.grad = gradient(param, generator)
        check_step(optimizer, params)


@pytest.mark.engine
def test_dropped_at_once(case, backend, generator):
    """What is no more in use, and what is prepared anew, waits for no garbage collector."""
    params = make_params(generator, 3)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    prepared = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            optimizer.state[params[0]]["own"] = object()
            check_step(optimizer, params)
            prepared.append(weakref.ref(optimizer._stepper._plan._launches[0][0]._prepared))
        assert [each() is not None for each in prepared] == [False, False, True]
        param = weakref.ref(params[0])
        del params, optimizer
        assert (param(), prepared[-1]()) == (None, None)
    finally:
        gc.enable()


@pytest.mark.engine
def test_nothing_changed(case, backend, copies, generator):
    """Then only scalars go to the device: a row for each distinct group and count, of two steps, of four, and so on."""
    params = make_params(generator, 20)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    row = case.optimizer.rule.scalar_count
    check_step(optimizer, params)
    copies.clear()
    for _ in range(6):
        check_step(optimizer, params)
    assert copies == [2 * row, 4 * row]
    optimizer.param_groups[0]["lr"] = 0.02
    for _ in range(2):
        check_step(optimizer, params)
    assert copies == [2 * row, 4 * row, row, 2 * row]


@pytest.mark.engine
def test_nothing_changed_capturable(case, backend, copies, generator):
    """Then nothing does; and where a number has changed, the hyperparameters."""
    params = make_params(generator, 20)
    optimizer = case.optimizer(params, lr=torch.tensor(1e-2), capturable=True, backend=backend)
    check_step(optimizer, params)
    copies.clear()
    for _ in range(2):
        check_step(optimizer, params)
    assert copies == []
    optimizer.param_groups[0]["weight_decay"] = 0.5
    check_step(optimizer, params)
    assert copies == [len(case.optimizer.rule.hyper)]


@pytest.mark.engine
def test_gradients_elsewhere(case, backend, copies, generator):
    """New gradients cost one address each; those of another alignment another launch."""
    params = [torch.nn.Parameter(torch.randn(64, generator=generator)) for _ in range(4)]
    optimizer = case.optimizer(params, lr=1e-2, capturable=True, backend=backend)
    buffer = torch.zeros(2, 4, 68)
    for i, start in ((0, 0), (1, 4), (0, 1), (1, 0)):
        for k, param in enumerate(params):
            param.grad = buffer[i, k, start : start + 64].copy_(gradient(param, generator))
        copies.clear()
        check_step(optimizer, params)
        assert [launch.path.aligned for launch in launches(optimizer)] == [start % 4 == 0]
        if start == 4:
            assert copies == [4]


@pytest.mark.engine
@pytest.mark.usefixtures("looks")
def test_gradients_elsewhere_in_a_skipped_step(case, backend, generator):
    """They are of another alignment from a step on that is skipped because of an infinity."""
    params = [torch.nn.Parameter(torch.randn(64, generator=generator)) for _ in range(2)]
    for param in params:
        param.grad = gradient(param, generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    for param in params:
        param.grad = misaligned(gradient(param, generator))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    for _ in range(2):
        check_step(optimizer, params)
    assert [launch.path.aligned for launch in launches(optimizer)] == [False]


@pytest.mark.engine
@pytest.mark.parametrize("how", ["data", "grad", "state"])
def test_replaced_by_misaligned(case, backend, generator, how):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    state = optimizer.state[params[0]][optimizer.rule.states[-1]]
    old = {"data": params[0].data, "grad": params[0].grad, "state": state}[how]
    new = misaligned(old)
    if how == "data":
        params[0].data = new
    elif how == "grad":
        params[0].grad = new
    else:
        state.data = new
    for _ in range(2):
        check_step(optimizer, params)
    assert sorted(launch.path.aligned for launch in launches(optimizer)) == [False, True]
