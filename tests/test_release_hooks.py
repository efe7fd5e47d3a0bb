"""`gradient_release`: whom its hooks follow, and what it does not work with."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss

from tests.cases import assert_same_bits
from tests.releasing import Net, assert_same, batches, pair, train, vsgd
from vsgd_kernels import VSGD, SampleVSGD


def test_frozen_and_thawed():
    """A parameter that was frozen at first is released like others; one that is frozen later keeps its state."""
    models, optimizers = [Net(), Net()], []
    for i, model in enumerate(models):
        model.twice.requires_grad_(False)
        optimizers.append(vsgd(model.parameters(), gradient_release=i == 0))
        assert not model.twice.weight.requires_grad
    for i, batch in enumerate(batches(4)):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.twice.requires_grad_(i > 0)
            model.last.bias.requires_grad_(i != 2)
            train(model, optimizer, [batch])
        assert all(param.grad is None for param in models[0].parameters())
    assert_same(models, optimizers)
    assert [int(optimizers[0].state[p]["step"]) for p in models[0].parameters()] == [3, 3, 4, 3]


def test_groups_added_and_parameters_taken_away():
    """The bits depend on a parameter's place, which is the one that it has now."""
    models, optimizers = pair(vsgd, groups=lambda model: model.last.parameters())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(1))
        optimizer.zero_grad()
        optimizer.add_param_group({"params": model.twice.parameters(), "lr": 3e-3})
        train(model, optimizer, batches(2))
        assert (model is models[0]) == (model.twice.weight.grad is None)
        del optimizer.param_groups[0]["params"][0]
        train(model, optimizer, batches(2))
    assert_same(models, optimizers)
    counts = [int(optimizers[0].state[p]["step"]) for p in models[0].parameters()]
    assert counts == [4, 4, 3, 5]
    assert models[0].last.weight.grad is not None  # it is nobody's now


def test_a_group_that_is_refused_leaves_no_hook():
    model = Net()
    optimizer = vsgd(model.last.parameters(), gradient_release=True)
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": model.twice.parameters(), "lr": -1.0})
    with pytest.raises(ValueError, match="master_weights"):
        VSGD(model.twice.parameters(), gradient_release=True, master_weights="split8")
    before = copy.deepcopy(model.twice)
    train(model, optimizer, batches(1))
    assert_same_bits(model.twice.parameters(), before.parameters())
    assert model.twice.weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_release_too(copied):
    models, optimizers = pair(vsgd)
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        train(model, optimizer, batches(1))
        optimizer.zero_grad()
        models[i], optimizers[i] = copied((model, optimizer))
    originals = [param.detach().clone() for param in pair(vsgd)[0][0].parameters()]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(3))
    assert_same(models, optimizers)
    assert all(param.grad is None for param in models[0].parameters())
    assert not any(map(torch.equal, originals, models[0].parameters()))
    alone = copied(models[0])  # a copy of the model alone has no optimizer
    mse_loss(alone(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert_same_bits(alone.parameters(), models[0].parameters())


def test_load_state_dict():
    models, optimizers = pair(vsgd)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(2))
        saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        train(model, optimizer, batches(2))
        optimizer.load_state_dict(saved)
        model.load_state_dict(weights)
        train(model, optimizer, batches(3))
    assert_same(models, optimizers)
    assert optimizers[0].state[models[0].last.weight]["step"] == 5
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


def test_an_optimizer_that_is_gone():
    """It leaves no hook, and gradients are as ever."""
    model = Net()
    optimizer = vsgd(model.parameters(), gradient_release=True)
    train(model, optimizer, batches(1))
    gone = weakref.ref(optimizer)
    before = copy.deepcopy(model)
    del optimizer
    gc.collect()
    assert gone() is None
    mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert_same_bits(model.parameters(), before.parameters())
    assert all(param.grad is not None for param in model.parameters())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_an_error_leaves_its_parameter_as_it_was():
    """It comes out of backward, and has the parameter's name."""
    models, optimizers = pair(vsgd, groups=lambda model: [{"params": m.named_parameters()} for m in model.children()])
    model, optimizer = models[0], optimizers[0]
    train(model, optimizer, batches(1))
    weight = model.last.weight
    before, kept = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    optimizer.state[weight]["mug"] = torch.zeros(2)
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match=r"state 'mug' of parameter 0 of group 1 \(weight\)"):
        mse_loss(model(x), y).backward()
    assert torch.equal(weight, before)
    assert weight.grad is not None
    optimizer.state[weight] = kept
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2


def test_what_is_excluded():
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 with gradient_release=True"):
        VSGD(params, max_grad_norm=1.0, gradient_release=True)
    with pytest.raises(ValueError, match="gradient_release=True: a rule that takes samples"):
        SampleVSGD(params, gradient_release=True)
    with pytest.raises(TypeError, match="gradient_release must be a bool, got 1"):
        VSGD(params, gradient_release=1)
    optimizer = VSGD(params, gradient_release=True)
    with pytest.raises(ValueError, match=r"max_grad_norm=2\.0 with gradient_release=True"):
        optimizer.max_grad_norm = 2.0
    assert optimizer.max_grad_norm is None


@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler_is_noticed(unscaled):
    models, optimizers = pair(vsgd)
    scaler = GradScaler("cpu")
    x, y = batches(1)[0]
    scaler.scale(mse_loss(models[0](x), y)).backward()
    if unscaled:
        scaler.unscale_(optimizers[0])
    with pytest.raises(RuntimeError, match="gradient_release=True does not work with GradScaler"):
        scaler.step(optimizers[0])


def test_gradients_that_come_later_are_noticed():
    """As DistributedDataParallel sets them, when it has averaged them."""
    models, optimizers = pair(vsgd)
    x, y = batches(1)[0]
    mse_loss(models[0](x), y).backward()
    models[0].last.bias.grad = torch.ones(3)
    before = copy.deepcopy(models[0])
    with pytest.raises(RuntimeError, match="parameter 3 of group 0 was stepped in backward and has been given a grad"):
        optimizers[0].step()
    assert_same_bits(models[0].parameters(), before.parameters())
