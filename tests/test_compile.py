"""Training steps under torch.compile: one graph, compiled once, and the same numbers."""

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.nn.functional import mse_loss

from vsgd_kernels import VSGD, SampleVSGD

from .cases import CASES


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()
    # torch 2.13 leaves in its one None where it has last been read from a gradient, and the next function that returns
    # None would read it there.
    if none := getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None):
        none.source = None


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 640), torch.nn.ReLU(), torch.nn.Linear(640, 1))


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.randn(16, 1, generator=generator)) for _ in range(steps)]


def train(model, optimizer, steps, compiler=None, scheduled=True):
    """Trains, each step inside of one function, which `compiler` compiles."""

    def step(x, y):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) if scheduled else None
    compiled = torch.compile(step, backend=compiler, fullgraph=True) if compiler else step
    for x, y in batches(steps):
        compiled(x, y)
        if scheduler:
            scheduler.step()


def assert_same(model, optimizer, other, other_optimizer):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # The gradients' kernels are the compiler's, and those of aot_eager are torch's own.
        assert torch.equal(p, q)
        own, others = optimizer.state.get(p, {}), other_optimizer.state.get(q, {})
        assert own.keys() == others.keys()
        assert all(torch.equal(own[key], others[key]) for key in own)


@pytest.mark.parametrize("state_format", ["fp32", "q8", "packed16"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_training_steps_are_one_graph(model, case, state_format):
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (case.optimizer(m.parameters(), state_format=state_format) for m in (model, other))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, optimizer, 100, "aot_eager")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    train(other, other_optimizer, 100)
    assert_same(model, optimizer, other, other_optimizer)


def test_inductor(model):
    """Its kernels of the backward pass round otherwise than torch's; the step is made from the same gradients."""
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (VSGD(m.parameters(), lr=1e-2) for m in (model, other))
    step = torch.compile(optimizer.step, backend="inductor", fullgraph=True)
    for x, y in batches(5):
        mse_loss(model(x), y).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        step()
        other_optimizer.step()
        optimizer.zero_grad()
    assert_same(model, optimizer, other, other_optimizer)


def test_closure_and_zeroed_gradients(model):
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (VSGD(m.parameters(), lr=1e-2) for m in (model, other))

    def step(m, o, x, y):
        def closure():
            o.zero_grad(set_to_none=False)
            loss = mse_loss(m(x), y)
            loss.backward()
            return loss.detach()

        return o.step(closure)

    compiled = torch.compile(step, backend="aot_eager")
    for x, y in batches(4):
        loss = compiled(model, optimizer, x, y)
        assert torch.equal(loss, step(other, other_optimizer, x, y))
    assert_same(model, optimizer, other, other_optimizer)


def test_found_inf_and_settings_are_read_when_the_program_runs(model):
    optimizer = VSGD(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    expected = copy.deepcopy(model)
    reference = VSGD(expected.parameters(), lr=1e-2)
    for lr, found_inf in ((1e-2, 0.0), (3e-2, 1.0), (5e-2, 0.0)):
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            p.grad = torch.full_like(p, lr)
            q.grad = p.grad.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        optimizer.found_inf = torch.tensor(found_inf)
        step()
        if not found_inf:
            reference.step()
    assert_same(model, optimizer, expected, reference)
    assert counters["stats"]["unique_graphs"] == 1


def test_frozen_parameters_and_another_optimizer(model):
    """What is compiled for one set of gradients is not used for another."""
    other = copy.deepcopy(model)
    optimizers = [VSGD(m.parameters(), lr=1e-2) for m in (model, other)]
    compiled = torch.compile(lambda optimizer: optimizer.step(), backend="aot_eager", fullgraph=True)
    for frozen in ([], [0, 2], [1]):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        for i in frozen:
            list(model.parameters())[i].grad = list(other.parameters())[i].grad = None
        compiled(optimizers[0])
        optimizers[1].step()
    assert_same(model, optimizers[0], other, optimizers[1])
    compiled(optimizers[1])
    assert [s["step"].item() for s in optimizers[1].state.values()] == [3.0, 2.0, 3.0, 4.0]
    assert [s["step"].item() for s in optimizers[0].state.values()] == [2.0, 2.0, 2.0, 3.0]


def test_parameters_that_were_taken_away_are_noticed(model):
    optimizer = VSGD(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    step()
    before = [param.clone() for param in model.parameters()]
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="param_groups hold other parameters"):
        step()
    assert all(map(torch.equal, model.parameters(), before))


def test_gradients_of_the_step_before_do_not_count(model):
    """Those that a program has set to None are still there while it runs."""
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (VSGD(m.parameters(), lr=1e-2) for m in (model, other))

    def step(m, o, x, y):
        o.zero_grad()
        mse_loss(m[2](x), y).backward()
        o.step()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x, y = torch.ones(4, 640), torch.ones(4, 1)
    for m in (model, other):
        for param in m.parameters():
            param.grad = torch.ones_like(param)
    compiled(model, optimizer, x, y)
    step(other, other_optimizer, x, y)
    assert_same(model, optimizer, other, other_optimizer)
    assert [param.grad is None for param in model.parameters()] == [True, True, False, False]


def test_clipping(model):
    """The norm is taken, and the setting read, when the program runs."""
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (VSGD(m.parameters(), lr=1e-2, max_grad_norm=1e-2) for m in (model, other))
    for max_norm in (1e-2, 1e-3, None):
        optimizer.max_grad_norm = other_optimizer.max_grad_norm = max_norm
        train(model, optimizer, 3, "aot_eager", scheduled=False)
        train(other, other_optimizer, 3, scheduled=False)
        assert optimizer.grad_norm > 1e-2
        assert torch.equal(optimizer.grad_norm, other_optimizer.grad_norm)
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("traced", [False, True], ids=["backward outside", "backward inside"])
def test_gradient_release(model, traced):
    """What a program accumulates, its step takes; gradients of a backward that it leaves to Python are released."""
    other = copy.deepcopy(model)
    optimizer, other_optimizer = VSGD(model.parameters(), gradient_release=True), VSGD(other.parameters())

    def step(x, y):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()

    with torch._dynamo.config.patch(trace_autograd_ops=traced):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=traced)
        for x, y in batches(3):
            compiled(x, y)
    train(other, other_optimizer, 3, scheduled=False)
    assert all((param.grad is None) != traced for param in model.parameters())
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("left", [False, True], ids=["all accumulated", "the last one left"])
def test_samples(model, left):
    """A compiled step takes what was fed before it, gradients that were not accumulated among it."""
    other = copy.deepcopy(model)
    outcomes = []
    for own in (model, other):
        optimizer = SampleVSGD(own.parameters(), lr=1e-2)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if own is model else optimizer.step
        for i, (x, y) in enumerate(batches(6)):
            mse_loss(own(x), y).backward()
            if i % 2 == 0 or not left:
                optimizer.accumulate()
            if i % 2:
                step()
                assert all(param.grad is None for param in own.parameters())
        outcomes.append(optimizer)
    assert_same(model, outcomes[0], other, outcomes[1])


def test_samples_are_accumulated_outside_of_graphs(model):
    other = copy.deepcopy(model)
    optimizers = [SampleVSGD(own.parameters(), lr=1e-2) for own in (model, other)]
    accumulate = torch.compile(optimizers[0].accumulate, backend="aot_eager")
    for x, y in batches(4):
        for own, take in ((model, accumulate), (other, optimizers[1].accumulate)):
            mse_loss(own(x), y).backward()
            take()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(model, optimizers[0], other, optimizers[1])


def test_zeroed_gradients_leave_their_graph():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = VSGD([param])
    param.grad = (param * 2).clone()
    assert param.grad.grad_fn is not None
    torch.compile(optimizer.zero_grad, backend="aot_eager")(set_to_none=False)
    assert param.grad.grad_fn is None
    assert torch.equal(param.grad, torch.zeros(3))
