"""Parameters on a GPU."""

import pytest
import torch

from tests.cases import gradient

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
