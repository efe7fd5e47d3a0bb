"""What a `torch.optim.Optimizer` promises: groups, closures, hooks, schedulers, copies, version counters, memory."""

import copy
import io
import pickle
import threading

import pytest
import torch

from tests.cases import check_step, gradient, make_params, step_counts
from vsgd_kernels import VSGD

pytestmark = pytest.mark.engine


def test_no_gradient_no_step_no_state(case, backend, generator):
    params = make_params(generator)
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = None
    optimizer = case.optimizer(params, lr=1e-2, weight_decay=0.1, backend=backend)
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_each_parameter_has_its_own_step_count(case, backend, generator):
    """A first gradient that comes late is that parameter's step 1; a frozen one waits."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    grads = [p.grad for p in params]
    for present in ([1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]):
        for param, grad, there in zip(params, grads, present, strict=True):
            param.grad = grad if there else None
        check_step(optimizer, params)
    assert step_counts(optimizer, params) == [4, 3, 2]


def test_groups_added_later_have_their_own_settings(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params[:1], lr=1e-2, backend=backend)
    check_step(optimizer, params[:1])
    optimizer.add_param_group({"params": params[1:], **case.settings})
    for _ in range(3):
        check_step(optimizer, params)
    assert step_counts(optimizer, params) == [4, 3, 3]


def test_settings_changed_between_steps(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    for name, value in case.settings.items():
        optimizer.param_groups[0][name] = value
        check_step(optimizer, params)


def test_named_parameters(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer([(f"layer{i}", p) for i, p in enumerate(params)], lr=1e-2, backend=backend)
    check_step(optimizer, params)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["layer0", "layer1", "layer2"]


def test_closure(case, backend):
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = case.optimizer([param], lr=0.1, backend=backend)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[0] == 9.0
    assert losses[-1] < 1.0
    assert optimizer.step() is None


def test_hooks(case, backend, generator):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", params[0].detach().clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", params[0].detach().clone())))
    start = params[0].detach().clone()
    optimizer.step()
    assert [name for name, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], start)
    assert torch.equal(seen[1][1], params[0])
    assert not torch.equal(start, params[0])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12, cycle_momentum=False),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(case, backend, generator, schedule, as_tensor):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=torch.tensor(1e-2) if as_tensor else 1e-2, backend=backend)
    scheduler = schedule(optimizer)
    seen = set()
    for _ in range(10):
        check_step(optimizer, params)
        seen.add(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    assert len(seen) > 3


def test_lr_tensor_changed_in_place(case, backend, generator):
    params = make_params(generator)
    lr = torch.tensor([1e-2])
    optimizer = case.optimizer(params, lr=lr, backend=backend)
    for value in (1e-2, 3e-2, 0.0):
        lr.fill_(value)
        check_step(optimizer, params)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(case, backend, generator, how):
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_step(optimizer, params)
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    twins = twin.param_groups[0]["params"]
    assert not {id(p) for p in params} & {id(p) for p in twins}
    for _ in range(2):
        for param, other in zip(params, twins, strict=True):
            param.grad = gradient(param, generator)
            other.grad = param.grad.clone()
        check_step(optimizer, params)
        twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert twin._backend == backend
    assert repr(twin) == repr(optimizer)


@pytest.mark.parametrize("backend", ["cpp", "eager"])  # Triton's interpreter keeps its program's number in a global
def test_two_optimizers_in_two_threads(case, backend, generator):
    """Disjoint parameters stepped at the same time end as if stepped one after the other."""
    sets = [make_params(generator) for _ in range(2)]
    twins = copy.deepcopy(sets)
    for params, copies in zip(sets, twins, strict=True):
        for param, other in zip(params, copies, strict=True):
            other.grad = param.grad.clone()

    def run(params):
        optimizer = case.optimizer(params, lr=1e-2, backend=backend)
        for _ in range(50):
            optimizer.step()

    threads = [threading.Thread(target=run, args=(params,)) for params in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for params in twins:
        run(params)
    for a, b in zip((p for s in sets for p in s), (p for s in twins for p in s), strict=True):
        assert torch.equal(a, b)


def test_compiled_training_step(case, backend):
    """torch.compile of a whole training step: forward and backward compiled, step() as it is."""
    models = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [case.optimizer(model.parameters(), lr=1e-2, backend=backend) for model in models]

    def train(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(train, backend="aot_eager")
    for i in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(
            train(models[0], optimizers[0], x), compiled(models[1], optimizers[1], x), rtol=1e-5, atol=1e-6
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert optimizers[1].state[b]["step"] == 3


def test_a_thousand_tensors(case, generator):
    params = [torch.nn.Parameter(torch.randn(64, generator=generator)) for _ in range(1000)]
    for param in params:
        param.grad = gradient(param, generator)
    optimizer = case.optimizer(params, lr=1e-2, backend="cpp")
    for _ in range(3):
        check_step(optimizer, params)


def test_swap_is_the_authors_signature():
    """A swap changes nothing: positional lr, and the authors' defaults."""
    optimizer = VSGD([torch.nn.Parameter(torch.ones(1))], 0.02)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert group == {
        "lr": 0.02, "ghattg": 30.0, "ps": 1e-8, "tau1": 0.81, "tau2": 0.9, "weight_decay": 0.0, "eps": 1e-8,
        "shape_offset": 1e-4, "maximize": False, "capturable": False, "state_format": "fp32", "seed": 0,
        "master_weights": "exact", "state_version": 1,
    }  # fmt: skip
