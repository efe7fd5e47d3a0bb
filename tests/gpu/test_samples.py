"""What SampleVSGD is fed on a GPU: the CPU's bits, in one launch, for which nothing waits."""

import pytest
import torch

from bench.gpu_cost import kernels
from tests.cases import SIZES, assert_same_bits, extreme_gradients, gradient, misaligned
from tests.gpu.tensors import GPU, on_gpu, sync_is_an_error
from tests.test_accumulate import moments_of
from vsgd_kernels import SampleVSGD

pytestmark = GPU


def fed(device, backend, steps):
    """Moments after micro-batches, and then samples of which several are given at a time."""
    params = [torch.nn.Parameter(torch.zeros_like(grad, device=device)) for grad in steps[0]]
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device)
        optimizer.accumulate()
    for i, param in enumerate(params):
        samples = torch.stack([grads[i] for grads in steps]).to(device)
        param.grad_sample = misaligned(samples) if i % 2 else samples
    optimizer.accumulate()
    return [t.cpu() for t in moments_of(optimizer, params)]


def test_backends_give_the_same_bits(dtype, generator):
    start = [torch.zeros(n, dtype=dtype) for n in SIZES] + [torch.zeros(40, 30, dtype=dtype)]
    steps = [[*(gradient(p, generator) for p in start), extreme_gradients().to(dtype)] for _ in range(3)]
    steps = [[grad.t() if grad.dim() == 2 else grad for grad in grads] for grads in steps]
    wanted = fed("cpu", "cpp", steps)
    for backend in ("triton", "cuda", "eager"):
        assert_same_bits(fed("cuda", backend, steps), wanted)


def test_transposed_samples(backend, dtype, generator):
    steps = [[gradient(torch.zeros(300, 70, dtype=dtype), generator).t()] for _ in range(3)]
    assert_same_bits(fed("cuda", backend, steps), fed("cpu", "cpp", steps))


def test_one_launch_and_nothing_waits(backend, generator):
    params = on_gpu([torch.randn(n, generator=generator) for n in (100, 3000, 5)])
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)

    def accumulate():
        for param in params:
            param.grad = torch.ones_like(param)
        sync_is_an_error()
        optimizer.accumulate()
        torch.cuda.set_sync_debug_mode("default")

    accumulate()
    names = [name for name in kernels(accumulate) if "add_" in name]
    assert len(names) == 1, names
    assert all(samples.count == 2 and (samples.mean == 1.0).all() for samples in optimizer._samples.values())


def test_another_stream(backend, generator):
    """Samples are added, and stepped on, where they are computed: after what that stream has to do before."""
    params = on_gpu([torch.randn(n, generator=generator) for n in (100, 3000)])
    twins = [torch.nn.Parameter(param.detach().cpu()) for param in params]
    optimizer = SampleVSGD(params, lr=1e-2, backend=backend)
    twin = SampleVSGD(twins, lr=1e-2)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for i in range(4):
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[i % 2]):
            for _ in range(2):
                grads = [gradient(other, generator) for other in twins]
                torch.cuda._sleep(10_000_000)
                for param, other, grad in zip(params, twins, grads, strict=True):
                    param.grad = grad.cuda(non_blocking=True)
                    other.grad = grad
                optimizer.accumulate()
                twin.accumulate()
            optimizer.step()
            twin.step()
    torch.cuda.synchronize()
    for param, other in zip(params, twins, strict=True):
        there = [param.detach(), *optimizer.state[param].values()]
        assert_same_bits([t.cpu() for t in there], [other.detach(), *twin.state[other].values()])


@pytest.mark.xdist_group("most of a GPU's memory")
def test_more_elements_than_32_bits_count(backend):
    """Both ends of a tensor."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    param = torch.nn.Parameter(torch.zeros(2**31 + 1000, device="cuda"))
    optimizer = SampleVSGD([param], lr=1e-2, backend=backend)
    for value in (1.0, 3.0):
        param.grad = torch.full_like(param, value)
        optimizer.accumulate()
    samples = optimizer._samples[param]
    for part in (slice(0, 1000), slice(-1000, None)):
        assert samples.mean[part].tolist() == [2.0] * 1000
        assert samples.variance[part].tolist() == [1.0] * 1000
