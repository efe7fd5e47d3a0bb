"""`gradient_release`: parameters step in backward, and end to the bit as `step` would leave them."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss

from tests.cases import CASES, assert_same_bits
from vsgd_kernels import VSGD, SampleVSGD
from vsgd_kernels.formats import MASTER_WEIGHTS
from vsgd_kernels.state_formats import FORMATS

#: Those rules whose gradients can be released.
each_rule = pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.optimizer.rule.samples])


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


def vsgd(*args, **kwargs):
    return VSGD(*args, lr=1e-2, state_format="q8", **kwargs)


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
