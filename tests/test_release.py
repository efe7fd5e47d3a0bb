"""`gradient_release`: parameters step in backward, and end to the bit as `step` would leave them."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import mse_loss

from tests.cases import CASES, assert_same_bits
from tests.releasing import assert_same, batches, pair, train, vsgd
from vsgd_kernels import VSGD
from vsgd_kernels.formats import MASTER_WEIGHTS
from vsgd_kernels.state_formats import FORMATS

#: Those rules whose gradients can be released.
each_rule = pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.optimizer.rule.samples])


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_rule_and_backend(name, dtype, backend):
    """Two groups, a scheduler, and no gradient left."""
    case = CASES[name]

    def groups(model):
        return [
            {"params": model.twice.parameters()},
            {"params": model.last.parameters(), "weight_decay": 0.3, "seed": 7},
        ]

    models, optimizers = pair(lambda *a, **k: case.optimizer(*a, **case.settings, **k, backend=backend), dtype, groups)
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3) for optimizer in optimizers]
    start = copy.deepcopy(models[0])
    for batch in batches(3, dtype):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            train(model, optimizer, [batch])
            scheduler.step()
        assert all(param.grad is None for param in models[0].parameters())
        assert all(param.grad is not None for param in models[1].parameters())
    assert_same(models, optimizers)
    assert not any(map(torch.equal, start.parameters(), models[0].parameters()))


@each_rule
@pytest.mark.parametrize("masters", list(MASTER_WEIGHTS), ids=str)
@pytest.mark.parametrize("state_format", FORMATS)
def test_every_format(name, state_format, masters):
    """Random bits are those of an ordinary step."""
    case = CASES[name]
    settings = {**case.settings, "state_format": state_format, "master_weights": masters, "seed": 3}
    models, optimizers = pair(lambda *a, **k: case.optimizer(*a, **settings, **k), torch.bfloat16)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(4, torch.bfloat16))
    assert_same(models, optimizers)


def test_each_gradient_is_freed_before_the_next():
    """The last layer has stepped when the first one's gradient comes."""
    models, (optimizer, _) = pair(vsgd)
    model = models[0]
    seen = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda p: seen.append([q.grad is not None for q in model.parameters()])
        )
    train(model, optimizer, batches(2))
    assert seen == [[False] * 4] * 8


def test_accumulation():
    """Gradients of all but the last backward are summed up, and nothing is stepped before; also nested."""
    models, optimizers = pair(vsgd)
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            *first, (x, y) = batches(3)
            before = [param.detach().clone() for param in model.parameters()]
            with optimizer.accumulate_gradients():
                for a, b in first:
                    with optimizer.accumulate_gradients():
                        mse_loss(model(a), b).backward()
                    assert_same_bits(model.parameters(), before)
            mse_loss(model(x), y).backward()
            assert (model is models[0]) == (model.last.weight.grad is None)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(models, optimizers)
    assert optimizers[0].state[models[0].last.weight]["step"] == 2


def test_step_takes_what_is_left():
    """Gradients that were kept, or that somebody set; and the context ends where an error leaves it."""
    models, optimizers = pair(vsgd)
    (x, y), other = batches(2)
    for model, optimizer in zip(models, optimizers, strict=True):
        loss = mse_loss(model(x), y)
        with pytest.raises(RuntimeError, match="second time"), optimizer.accumulate_gradients():
            [loss.backward() for _ in range(2)]
        optimizer.step()
        train(model, optimizer, [other])
        optimizer.zero_grad()
        model.last.bias.grad = torch.ones(3)
        optimizer.step()
    assert_same(models, optimizers)
    assert optimizers[0].state[models[0].last.bias]["step"] == 3
    assert optimizers[0].state[models[0].last.weight]["step"] == 2


def test_hooks_and_closures():
    models, optimizers = pair(vsgd)
    losses, seen = [], []
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))

        def closure(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        losses += [optimizer.step(partial(closure, x, y)).item() for x, y in batches(2)]
    assert losses[:2] == losses[2:]
    assert seen == [optimizers[0]] * 2 + [optimizers[1]] * 2
    assert_same(models, optimizers)


def test_settings_are_those_of_the_moment():
    models, optimizers = pair(vsgd)
    for i, batch in enumerate(batches(4)):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0].update(lr=1e-2 * (i + 1), weight_decay=0.1 * i, state_format=list(FORMATS)[i % 3])
            train(model, optimizer, [batch])
    assert_same(models, optimizers)


def test_a_first_step_of_nothing_counts():
    """lr and gradient 0 are no step of torch.distributed.checkpoint, if other parameters' gradients are not 0."""
    models, optimizers = pair(lambda *a, **k: VSGD(*a, lr=0.0, **k))
    for model, optimizer in zip(models, optimizers, strict=True):
        with torch.no_grad():
            model.last.weight.zero_()
        train(model, optimizer, batches(1))
        optimizer.param_groups[0]["lr"] = 1e-2
        train(model, optimizer, batches(2))
    assert_same(models, optimizers)
    assert optimizers[0].state[models[0].twice.weight]["step"] == 3
