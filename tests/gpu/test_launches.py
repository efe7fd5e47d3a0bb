"""How a step runs on a GPU: graphs, streams, launches, and without waiting for the device."""

import copy

import pytest
import torch

from bench.gpu_cost import kernels
from tests.cases import CASES, assert_stepped, check_step, gradient, make_params, reference_step, step_counts
from tests.gpu.tensors import GPU, give_gradients, on_gpu, sync_is_an_error, values_of

pytestmark = GPU


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


def test_capture_refused(case, backend, generator):
    """What a capture makes is there only from the first replay on: a step before that finds nothing of it."""
    params = on_gpu([torch.randn(5000, generator=generator)])
    give_gradients(params, generator)

    def refused(optimizer, message):
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        check_step(optimizer, params)

    optimizer = case.optimizer(params, lr=1e-2, capturable=False, backend=backend)
    refused(optimizer, "capturable=False")
    optimizer = case.optimizer(params, lr=1e-2, capturable=True, backend=backend)
    refused(optimizer, "has no state yet")
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["state_format"] = "bf16"
    optimizer.step()
    optimizer.param_groups[0]["state_format"] = "fp32"
    refused(optimizer, "is not yet as its group's settings")
    if case.optimizer.rule.samples:
        optimizer.load_state_dict(saved)
        refused(optimizer, "there is no variance of a parameter's samples yet")


@pytest.mark.parametrize("capturable", [False, True])
def test_scalars_in_turn(case, backend, generator, capturable):
    """A kernel that was compiled where there was a scalar does not serve where there is none."""
    params = on_gpu([torch.randn(n, generator=generator) for n in (100, 3000)])
    optimizer = case.optimizer(params, lr=1e-2, capturable=capturable, backend=backend)
    eights = torch.full((5,), 8.0, device="cuda")
    zeros = torch.zeros(5, device="cuda")
    for scale, found in 2 * [(None, None), (eights[:1], None), (eights[1:2], zeros[4:]), (None, zeros[1:2])]:
        give_gradients(params, generator)
        expected = reference_step(optimizer, params, [param.grad for param in params])
        optimizer.grad_scale, optimizer.found_inf = scale, found
        if scale is not None:
            torch._foreach_mul_([param.grad for param in params], 8.0)
        optimizer.step()
        assert_stepped(optimizer, params, expected)


def test_groups_with_rates_of_both_kinds(case, backend, generator):
    """A learning rate on the device and one that is a number; both are read at each step."""
    params = on_gpu([torch.randn(n, generator=generator) for n in (100, 3000, 5)])
    lr = torch.tensor(1e-2, device="cuda")
    groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": 5e-3}]
    optimizer = case.optimizer(groups, capturable=True, backend=backend)
    for _ in range(3):
        give_gradients(params, generator)
        check_step(optimizer, params)
        lr.mul_(0.5)
        optimizer.param_groups[1]["lr"] *= 0.7


def test_dropped_states(case, backend, generator):
    """Their memory is free at once, and the next step begins anew."""
    params = on_gpu([torch.randn(2**20, generator=generator)])
    give_gradients(params, generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    for _ in range(2):
        check_step(optimizer, params)
    before = torch.cuda.memory_allocated()
    optimizer.state.clear()
    assert before - torch.cuda.memory_allocated() >= len(case.optimizer.rule.states) * 4 * 2**20
    for _ in range(2):
        check_step(optimizer, params)


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


def test_many_addresses_do_not_wait(backend):
    """More than CUDA takes at once from memory that is not pinned."""
    params = on_gpu([torch.ones(3)] * 10_000)
    one = [torch.nn.Parameter(torch.ones(3))]
    optimizer = CASES["vsgd"].optimizer(params, lr=1e-2, backend=backend)
    expected = CASES["vsgd"].optimizer(one, lr=1e-2, backend="cpp")
    for _ in range(2):
        for param in (*params, *one):
            param.grad = torch.ones_like(param)
        expected.step()
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        optimizer.step()
    assert not torch.cuda.current_stream().query()
    optimizer.step()
    expected.step()
    found, wanted = values_of(optimizer, params), values_of(expected, one)
    for i, value in enumerate(wanted):
        assert torch.equal(torch.stack(found[i :: len(wanted)]).cpu(), value.expand(10_000, *value.shape))


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


@pytest.mark.parametrize(("capturable", "launches"), [(False, 1), (True, 2)])
def test_launches(case, backend, generator, capturable, launches):
    """A uniform model is stepped in one launch, and one more where the device counts."""
    params = on_gpu([p.detach() for p in make_params(generator, 50)])
    optimizer = case.optimizer(params, lr=1e-2, capturable=capturable, backend=backend)
    give_gradients(params, generator)
    optimizer.step()
    names = kernels(optimizer.step)
    assert len(names) == launches, names


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
