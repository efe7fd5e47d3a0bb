"""One step of every rule on every backend against the reference in float64: dtypes, sizes, layouts, groups."""

import pytest
import torch

from tests.cases import (
    CASES,
    SIZES,
    assert_same_bits,
    assert_stepped,
    each_isa,
    extreme_gradients,
    gradient,
    layouts,
    master_of,
    reference_step,
    step_counts,
    train,
)
from vsgd_kernels.batch import DTYPES


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def check_steps(optimizer, params, generator, grads=None, steps=4):
    for _ in range(steps):
        for param, grad in zip(params, grads or [gradient(p, generator) for p in params], strict=True):
            param.grad = grad
        seen = [p.grad.clone() for p in params]
        expected = reference_step(optimizer, params, [p.grad for p in params])
        optimizer.step()
        assert_stepped(optimizer, params, expected)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, seen, strict=True)), "a gradient was written to"


def test_sizes_together(case, dtype, backend, generator):
    """Every size in one launch, empty tensors among them, in both orders."""
    for sizes in (SIZES, SIZES[::-1], [0, 0, 5, 0], [0]):
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
        check_steps(case.optimizer(params, lr=1e-2, backend=backend), params, generator, steps=2)


@pytest.mark.parametrize("layout", list(layouts(torch.float32, torch.Generator())))
def test_layouts(case, dtype, backend, layout, generator):
    param, grad = layouts(dtype, generator)[layout]
    neighbour = torch.nn.Parameter(torch.randn(100, generator=generator).to(dtype))
    params = [torch.nn.Parameter(param), neighbour]
    assert params[0].stride() == param.stride()
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    check_steps(optimizer, params, generator, [grad, gradient(neighbour, generator)])


def test_layout_of_gradient_changes(case, backend, generator):
    """The same storage, seen with other strides, between two steps."""
    param = torch.nn.Parameter(torch.randn(40, 40, generator=generator))
    grad = torch.randn(40, 40, generator=generator)
    optimizer = case.optimizer([param], lr=1e-2, backend=backend)
    for view in (grad, grad.t(), grad[0].expand(40, 40), grad):
        check_steps(optimizer, [param], generator, [view], steps=1)


@pytest.mark.engine
def test_elements_outside_a_view_stay(case, dtype, backend, generator):
    base = torch.randn(60, 44, generator=generator).to(dtype)
    before = base.clone()
    param = torch.nn.Parameter(base[:, ::2])
    param.grad = gradient(param, generator)
    case.optimizer([param], lr=1e-2, backend=backend).step()
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert not torch.equal(base[:, ::2], before[:, ::2])


def test_mixed_dtypes_and_groups(case, backend, generator):
    """One launch for all: two groups of different settings, every dtype in each."""
    first, second = (
        [torch.nn.Parameter(torch.randn(n, generator=generator).to(d)) for d in DTYPES for n in (3, 1500)]
        for _ in range(2)
    )
    optimizer = case.optimizer([{"params": first, **case.settings}, {"params": second}], lr=1e-2, backend=backend)
    check_steps(optimizer, first + second, generator)


@pytest.mark.parametrize("change", [{"maximize": True}, {"eps": 0.0}, {"lr": 0.0}, {"weight_decay": 0.5}])
def test_settings(case, backend, generator, change):
    params = [torch.nn.Parameter(torch.randn(300, generator=generator))]
    check_steps(case.optimizer(params, **{**case.settings, **change}, backend=backend), params, generator)


@pytest.mark.parametrize("lr", [0.0, -0.0])
def test_the_sign_of_a_learning_rate_of_zero(case, backend, lr):
    """It does not decide what becomes of parameters of -0."""
    param = torch.nn.Parameter(torch.tensor([-0.0, 0.0, 1.0]))
    optimizer = case.optimizer([param], lr=lr, backend=backend)
    param.grad = torch.ones(3)
    optimizer.step()
    assert_same_bits([param], [torch.tensor([-0.0, 0.0, 1.0])])
    assert param.signbit().tolist() == [True, False, False]


def test_more_steps_than_float32_counts(case, backend, generator):
    """The count stays, and with it the scalars, which float64 parameters tell apart."""
    outcomes = []
    for name in ("cpp", backend):
        generator.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))]
        optimizer = case.optimizer(params, lr=1e-2, backend=name)
        train(optimizer, params, generator, 1)
        optimizer.state[params[0]]["step"].fill_(2**24 - 2)
        train(optimizer, params, generator, 4)
        assert step_counts(optimizer, params) == [2**24]
        outcomes.append([*params, *(optimizer.state[params[0]][key] for key in optimizer.rule.states)])
    assert_same_bits(*outcomes)


@pytest.mark.engine
def test_offsets_beyond_32_bits(case, generator):
    """A view whose last element lies more than 2^31 elements after its first; the pages between are never touched."""
    stride = 2**30 + 1
    base = torch.empty(2 * stride + 1, dtype=torch.bfloat16)
    view = base[::stride]
    view.copy_(torch.tensor([1.0, 2.0, 3.0]))
    params = [torch.nn.Parameter(view)]
    check_steps(case.optimizer(params, lr=1e-2, backend="cpp"), params, generator)


def test_one_pass_equals_many_threads(case, generator):
    """The result does not depend on how blocks fall to threads."""
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (100_000, 7, 70_001)]
        optimizer = case.optimizer(params, lr=1e-2, backend="cpp")
        check_steps(optimizer, params, generator)
        outcomes.append(params)
    torch.set_num_threads(2)
    for params in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, outcomes[0], strict=True))


def test_instruction_sets_give_the_same_bits(case, dtype, monkeypatch, generator):
    """Baseline, AVX2 and AVX-512 code, over magnitudes from subnormal to the largest, NaN and Inf included."""
    grads = torch.cat([gradient(torch.empty(5000), generator), extreme_gradients()]).to(dtype)
    outcomes = []
    for _ in each_isa(monkeypatch):
        param = torch.nn.Parameter(torch.linspace(-3, 3, grads.numel(), dtype=dtype))
        optimizer = case.optimizer([param], **case.settings, backend="cpp")
        for i in range(5):
            param.grad = grads.roll(i * 997)
            optimizer.step()
        state = optimizer.state[param]
        outcomes.append([param.detach(), *(state[name] for name in ("low", *optimizer.rule.states) if name in state)])
    assert outcomes[0][0].isnan().any()
    assert outcomes[0][0].isfinite().any()
    for tensors in outcomes[1:]:
        for first, other in zip(outcomes[0], tensors, strict=True):
            assert torch.equal(bits(first), bits(other))


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_written(dtype, backend):
    """lr 0 reads each of the 65,536 values and writes it back."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.nn.Parameter(values.clone())
    param.grad = torch.zeros_like(param)
    CASES["vsgd"].optimizer([param], lr=0.0, backend=backend).step()
    nan = values.isnan()
    assert torch.equal(param[~nan], values[~nan])
    assert param[nan].isnan().all()


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_read_exactly(case, dtype, backend):
    """Every finite gradient, subnormals included, does to the bit what its float32 twin does."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    outcomes = []
    for grads in (values, values.float()):
        param = torch.nn.Parameter(torch.ones(grads.numel(), dtype=grads.dtype))
        param.grad = grads
        optimizer = case.optimizer([param], lr=1e-2, backend=backend)
        optimizer.step()
        outcomes.append(
            [master_of(optimizer, param), *(optimizer.state[param][name] for name in optimizer.rule.states)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_train_as_float32_to_the_bit(case, dtype, backend, generator):
    """1000 steps (interpreted: 50): the masters are what float32 parameters would have been."""
    start = 1 + torch.rand(300, generator=generator)
    params = [torch.nn.Parameter(start.to(dtype)), torch.nn.Parameter(start.to(dtype).float())]
    optimizer = case.optimizer(params, lr=1e-4, backend=backend)
    for _ in range(50 if backend == "triton" else 1000):
        params[0].grad = gradient(params[0], generator)
        params[1].grad = params[0].grad.float()
        optimizer.step()
    assert torch.equal(master_of(optimizer, params[0]), params[1])
    assert not torch.equal(params[1], start.to(dtype).float())


@pytest.mark.engine
def test_a_16_bit_parameter_overwritten_by_hand_is_the_new_master(case, backend, generator):
    for dtype in (torch.bfloat16, torch.float16):
        param = torch.nn.Parameter(torch.randn(300, generator=generator).to(dtype))
        optimizer = case.optimizer([param], lr=1e-2, backend=backend)
        check_steps(optimizer, [param], generator)
        with torch.no_grad():
            param.copy_(torch.randn(300, generator=generator))
            param[::3] = 0.0  # as pruning does
            param[::6] *= -1.0
        master = master_of(optimizer, param)
        exponent = torch.frexp(param.detach().float()).exponent
        half_a_unit = torch.ldexp(torch.full_like(master, torch.finfo(dtype).eps), exponent - 2)
        assert ((master - param).abs() <= half_a_unit)[master.abs() > 0.01].all()
        check_steps(optimizer, [param], generator)
