"""Parameters on a GPU."""

import pytest
import torch

from tests.cases import assert_same_bits, gradient

#: of every test in this folder
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def on_gpu(tensors):
    params = [torch.nn.Parameter(t.cuda()) for t in tensors]
    assert all(p.stride() == t.stride() for p, t in zip(params, tensors, strict=True) if t.is_contiguous())
    return params


def give_gradients(params, generator):
    for param in params:
        param.grad = gradient(param, generator)


def values_of(optimizer, params):
    return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]


def outcome(case, backend, start, grads, **settings):
    """What steps of a backend make of all parameters and states, on the CPU: of each name and dtype, all in one."""
    device = "cpu" if backend == "cpp" else "cuda"
    params = [torch.nn.Parameter(t.to(device, copy=True)) for t in start]
    optimizer = case.optimizer(params, **settings, backend=backend)
    for new in grads:
        for param, grad in zip(params, new, strict=True):
            param.grad = grad.to(device)
        optimizer.step()
    values = {}
    for param in params:
        for key, value in {"param": param.detach(), **optimizer.state[param]}.items():
            values.setdefault((key, value.dtype), []).append(value.flatten())
    return [torch.cat(own).cpu() for own in values.values()]


def compare(first, *others):
    """Asserts that outcomes are the same to the bit, but for the bits of NaN."""
    for other in others:
        assert_same_bits(other, first)


def sync_is_an_error():
    """Makes torch raise where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
