"""The models and optimizers of the tests of `gradient_release`."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.cases import assert_same_bits
from vsgd_kernels import VSGD


class Net(nn.Module):
    """The first layer is large enough to be coded, and used twice."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Linear(72, 72, dtype=dtype)
        self.last = nn.Linear(72, 3, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def batches(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 72, generator=generator).to(dtype), torch.randn(16, 3, generator=generator).to(dtype))
        for _ in range(n)
    ]


def pair(make, dtype=torch.float32, groups=lambda model: model.parameters()):
    """Two equal models with an optimizer each; the first's releases gradients."""
    models = [Net(dtype), Net(dtype)]
    return models, [make(groups(model), gradient_release=i == 0) for i, model in enumerate(models)]


def train(model, optimizer, data, **backward):
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward(**backward)
        optimizer.step()


def assert_same(models, optimizers):
    released, ordinary = models
    assert_same_bits(released.parameters(), ordinary.parameters())
    for param, other in zip(released.parameters(), ordinary.parameters(), strict=True):
        mine, theirs = optimizers[0].state.get(param, {}), optimizers[1].state.get(other, {})
        assert mine.keys() == theirs.keys()
        assert_same_bits(mine.values(), theirs.values())


def vsgd(*args, **kwargs):
    return VSGD(*args, lr=1e-2, state_format="q8", **kwargs)
