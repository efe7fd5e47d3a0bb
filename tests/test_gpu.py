"""On a GPU: every backend against the reference in float64, graphs, streams, large tensors and many."""

import copy

import pytest
import torch

from tests.cases import (
    CASES,
    SIZES,
    check_step,
    extreme_gradients,
    gradient,
    layouts,
    make_params,
    step_counts,
)
from vsgd_kernels import backends
from vsgd_kernels.batch import DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = backends.BACKENDS[request.param].why_unavailable()
    assert reason is None, reason
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def on_gpu(tensors):
    params = [torch.nn.Parameter(t.cuda()) for t in tensors]
    assert all(p.stride() == t.stride() for p, t in zip(params, tensors, strict=True) if t.is_contiguous())
    return params


def give_gradients(params, generator):
    for param in params:
        param.grad = gradient(param, generator)


def values_of(optimizer, params):
    return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]


def sync_is_an_error():
    """Makes torch raise where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")


@pytest.fixture(autouse=True)
def sync_is_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
@pytest.mark.parametrize("capturable", [False, True])
def test_sizes(case, dtype, name, capturable, generator):
    params = on_gpu([torch.randn(n, generator=generator).to(dtype) for n in SIZES])
    optimizer = case.optimizer(params, **case.settings, capturable=capturable, backend=name)
    for _ in range(3):
        give_gradients(params, generator)
        check_step(optimizer, params)


@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
def test_layouts(case, dtype, name, generator):
    """As views of GPU memory, with the strides that they have on the CPU."""

    def moved(tensor):
        base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype, device="cuda")
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)

    def moved_gradient(tensor):
        storage = tensor.untyped_storage()
        base = torch.tensor([], dtype=dtype).set_(storage).cuda()
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    pairs = layouts(dtype, generator).values()
    params = [torch.nn.Parameter(moved(p)) for p, _ in pairs]
    optimizer = case.optimizer(params, lr=1e-2, backend=name)
    for _ in range(3):
        for param, (_, grad) in zip(params, pairs, strict=True):
            param.grad = moved_gradient(grad)
        check_step(optimizer, params)


def test_backends_give_the_same_bits(case, dtype, generator):
    """Triton, CUDA and the CPU, extreme gradients included."""
    grads = torch.cat([gradient(torch.empty(5001), generator), extreme_gradients()]).to(dtype)
    outcomes = []
    for name, device in (("cpp", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        param = torch.nn.Parameter(torch.linspace(-3, 3, len(grads)).to(dtype).to(device))
        optimizer = case.optimizer([param], **case.settings, backend=name)
        for _ in range(3):
            param.grad = grads.to(device)
            optimizer.step()
        outcomes.append([t.cpu() for t in (param.detach(), *optimizer.state[param].values())])
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_graph(case, backend, dtype, generator):
    """Replays follow the gradients, and a learning rate that is changed in place."""
    start = [torch.randn(n, generator=generator).to(dtype) for n in (5, 5000, 33)]
    grads = [[gradient(t, generator).cuda() for t in start] for _ in range(6)]
    rates = [1e-2, 1e-2, 5e-3, 5e-3, 2e-2, 1e-3]
    outcomes = []
    for captured in (False, True):
        params = on_gpu(start)
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = case.optimizer(params, lr=lr, weight_decay=0.1, capturable=True, backend=backend)
        static = [torch.zeros_like(p) for p in params]
        for param, grad in zip(params, static, strict=True):
            param.grad = grad
        graph = torch.cuda.CUDAGraph()
        for i, (new, rate) in enumerate(zip(grads, rates, strict=True)):
            lr.fill_(rate)
            torch._foreach_copy_(static, new)
            if captured and i == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and i != 0:
                graph.replay()
            else:
                optimizer.step()
        assert step_counts(optimizer, params) == [len(grads)] * 3
        outcomes.append(values_of(optimizer, params))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_graph_with_backward(case, backend, generator):
    """The whole iteration, with gradients that only the capture allocates; then a step outside of the graph."""
    outcomes = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).cuda()
        optimizer = case.optimizer(model.parameters(), lr=1e-2, capturable=True, backend=backend)
        inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1)).cuda()

        def iterate(model=model, optimizer=optimizer, inputs=inputs):
            optimizer.zero_grad(set_to_none=True)
            model(inputs).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                iterate()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                iterate()
            for _ in range(4):
                graph.replay()
        else:
            for _ in range(4):
                iterate()
        for _ in range(2):
            iterate()
        outcomes.append(values_of(optimizer, list(model.parameters())))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_capture_refused(case, backend):
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    for capturable, message in ((False, "capturable=False"), (True, "has no state yet")):
        optimizer = case.optimizer([param], lr=1e-2, capturable=capturable, backend=backend)
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_nothing_waits_for_the_device(case, backend, generator, found):
    """A capturable step with grad_scale, found_inf and a tensor lr, while the host may not synchronise."""
    params = on_gpu([torch.randn(n, generator=generator) for n in (100, 3000)])
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = case.optimizer(params, lr=lr, capturable=True, backend=backend)
    give_gradients(params, generator)
    check_step(optimizer, params)
    before = values_of(optimizer, params)
    twins = copy.deepcopy(optimizer)
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.tensor(found, device="cuda")
    for param in params:
        param.grad = param.grad * 8.0
    sync_is_an_error()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    after = values_of(optimizer, params)
    if found:
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    else:
        twin_params = twins.param_groups[0]["params"]
        for twin, param in zip(twin_params, params, strict=True):
            twin.grad = param.grad / 8.0
        twins.step()
        assert all(torch.equal(a, b) for a, b in zip(after, values_of(twins, twin_params), strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_two_streams(case, backend, generator, capturable):
    """Two models step on two streams at once, and one model on two streams in turn."""
    models = [on_gpu([torch.randn(2_000_000, generator=generator)]) for _ in range(2)]
    optimizers = [case.optimizer(m, lr=1e-2, capturable=capturable, backend=backend) for m in models]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for params in models:
        give_gradients(params, generator)
    twins = copy.deepcopy(list(zip(models, optimizers, strict=True)))
    for (params, _), (originals) in zip(twins, models, strict=True):
        for param, original in zip(params, originals, strict=True):
            param.grad = original.grad.clone()
    torch.cuda.synchronize()
    for i in range(6):
        for k, optimizer in enumerate(optimizers):
            stream = streams[(k + i // 3) % 2]
            if i == 3:
                stream.wait_stream(streams[k])
            with torch.cuda.stream(stream):
                optimizer.step()
        if i == 3:
            for stream in streams:  # what the tables' allocator gives away too early would be overwritten here
                with torch.cuda.stream(stream):
                    torch.randint(0, 2**62, (2**20,), device="cuda")
    torch.cuda.synchronize()
    for (params, optimizer), originals, own in zip(twins, models, optimizers, strict=True):
        for _ in range(6):
            optimizer.step()
        for a, b in zip(values_of(optimizer, params), values_of(own, originals), strict=True):
            assert torch.equal(a, b)


def test_more_elements_than_32_bits_count(case, backend, generator):
    """Both ends of a bf16 tensor of more than 2^31 elements, against a small tensor of the same elements."""
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free GPU memory")
    n, end = 2**31 + 4099, 1000
    small = on_gpu([torch.randn(2 * end, generator=generator).bfloat16()])
    big = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))]
    with torch.no_grad():
        big[0][:end], big[0][-end:] = small[0][:end], small[0][end:]
    optimizers = [case.optimizer(p, lr=1e-2, backend=backend) for p in (small, big)]
    big[0].grad = torch.zeros_like(big[0])
    for _ in range(2):
        give_gradients(small, generator)
        big[0].grad[:end], big[0].grad[-end:] = small[0].grad[:end], small[0].grad[end:]
        for optimizer in optimizers:
            optimizer.step()
    for key in ("param", "low", *case.optimizer.rule.states):
        a, b = (o.param_groups[0]["params"][0] if key == "param" else o.state[p[0]][key]
                for o, p in zip(optimizers, (small, big), strict=True))  # fmt: skip
        assert torch.equal(a[:end], b[:end]), key
        assert torch.equal(a[end:], b[-end:]), key
    assert (big[0][end:-end] == 0).all()


def test_ten_thousand_tensors(case, backend, generator):
    params = on_gpu([torch.randn(1 + i % 97, generator=generator) for i in range(10_000)])
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    for _ in range(2):
        give_gradients(params, generator)
        check_step(optimizer, params)


@pytest.mark.parametrize(("capturable", "launches"), [(False, 1), (True, 2)])
def test_launches(case, backend, generator, capturable, launches):
    """A uniform model is stepped in one launch, and one more where the device counts."""
    params = on_gpu([p.detach() for p in make_params(generator, 50)])
    optimizer = case.optimizer(params, lr=1e-2, capturable=capturable, backend=backend)
    give_gradients(params, generator)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if not e.name.startswith(("Mem", "cuda", "cu"))]
    assert len(kernels) == launches, kernels


def test_moved_to_another_device(case, backend, generator):
    """A state that stayed behind is refused; one that a checkpoint brings along is moved."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2)
    check_step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    for param in params:
        param.data, param.grad = param.data.cuda(), None
    give_gradients(params, generator)
    with pytest.raises(ValueError, match=r"must be on the parameter's device cuda:0, got cpu"):
        optimizer.step()
    for capturable in (False, True):
        moved = case.optimizer(params, lr=1e-2, backend=backend)
        moved.load_state_dict(saved)
        moved.param_groups[0]["capturable"] = capturable
        check_step(moved, params)
        assert step_counts(moved, params) == [2, 2, 2]


def test_mixed_devices(case, generator):
    params = [*make_params(generator), *on_gpu([p.detach() for p in make_params(generator)])]
    give_gradients(params, generator)
    optimizer = case.optimizer(params, lr=1e-2)
    for _ in range(2):
        check_step(optimizer, params)
    assert {launch.backend.name for launch, _ in optimizer._plan._launches} == {"cpp", "triton"}


def test_grad_scaler(backend):
    """GradScaler leaves unscaling and the skipping of a step to the optimizer."""
    param = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = CASES["vsgd"].optimizer([param], lr=1e-2, capturable=True, backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for factor, counted in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert int(optimizer.state[param]["step"]) == counted
    assert param.isfinite().all()
    assert scaler.get_scale() == 2.0
