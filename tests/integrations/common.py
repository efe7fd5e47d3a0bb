"""What the tests of all frameworks share: a model, data, and when two trainings are equal."""

import torch
from torch import nn

from tests.cases import assert_same_bits

STEPS = 8  # of a run; at half of it a checkpoint is written
CLIP = 0.05  # the gradients' norm is above it
MICRO_BATCH, FEATURES = 4, 64


def make_model(dropout=0.0):
    """Its first weight is large enough for coded states."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 80), nn.ReLU(), nn.Dropout(dropout), nn.Linear(80, 3))


def make_data(batches):
    """Features and classes, for as many batches."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batches * MICRO_BATCH, FEATURES, generator=generator)
    return torch.utils.data.TensorDataset(features, features[:, :3].argmax(1))


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_training(optimizer, twin, steps=STEPS):
    """Parameters, states, counts and learning rates are equal to the bit, after as many steps."""
    params, twins = params_of(optimizer), params_of(twin)
    assert_same_bits(params, twins)
    for param, other in zip(params, twins, strict=True):
        state, expected = optimizer.state[param], twin.state[other]
        assert state.keys() == expected.keys()
        assert state["step"] == steps
        assert_same_bits(state.values(), expected.values())
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in twin.param_groups]
