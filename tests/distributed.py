"""What the ranks of the distributed tests run: a small model, alone and shared among processes, on the same batches.

Every rank has the whole batch, so that an average of gradients is each rank's own to the bit.
"""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from tests.cases import CASES

#: Two processes hold 301 and 300 rows of the first weight, 4 and 3 of the next, and one and none of the last.
WIDTHS = (16, 601, 7, 1)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    into, hidden, narrow, out = WIDTHS
    layers = [torch.nn.Linear(into, hidden), torch.nn.Linear(hidden, narrow), torch.nn.Linear(narrow, out)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2]).to(dtype)


def shard(model, **settings):
    """The model under FSDP2, each layer by itself."""
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def make_optimizer(name, params, **settings):
    case = CASES[name]
    return case.optimizer(params, **{"lr": 1e-2, "weight_decay": 0.1, **settings})


def train(model, optimizer, steps, first=0):
    """Some steps; batch number `first` is the first of them."""
    parameter = next(model.parameters())
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        x, y = (torch.randn(8, width, generator=generator).to(parameter.dtype) for width in (WIDTHS[0], WIDTHS[-1]))
        optimizer.zero_grad()
        mse_loss(model(x).float(), y.float()).backward()  # outputs are of the policy's dtype
        optimizer.step()


def whole(tensor):
    if tensor.dtype == torch.int16:
        tensor = tensor.int()  # gloo sends no int16
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same_values(own, other):
    """Parameters, or states, of two models or optimizers, whoever holds them, are the same to the bit."""
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(whole(a.detach()), whole(b.detach()), rtol=0, atol=0)


def assert_same_training(model, optimizer, other, other_optimizer):
    assert_same_values(model.parameters(), other.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys()
        assert_same_values(optimizer.state[p].values(), other_optimizer.state[q].values())


def copies(params):
    """Plain parameters that hold what this process holds of others."""
    return [torch.nn.Parameter(held(param.detach()).clone()) for param in params]


def follow(steps, model, optimizer, stepped, params, reference, first=0):
    """Trains a model, and steps `params`, copies of `stepped`, with their gradients."""
    hook = optimizer.register_step_pre_hook(lambda *_: _copy_gradients(stepped, params))
    for number in range(first, first + steps):
        train(model, optimizer, 1, number)
        reference.step()
    hook.remove()


def _copy_gradients(params, others):
    for param, other in zip(params, others, strict=True):
        other.grad = held(param.grad).clone()
