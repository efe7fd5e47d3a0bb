"""How states are stored: the same codes on every backend, bytes. Rounding is in test_rounding.py."""

import copy
import math

import pytest
import torch

from tests.cases import CASES, CODED, each_isa, extreme_gradients, gradient
from vsgd_kernels import VSGD, SampleVSGD, backends, state_formats
from vsgd_kernels.noise import CODES

LARGE = state_formats.SMALLEST


@pytest.fixture(params=CODED)
def style(request):
    return request.param


def large_layouts(dtype, generator):
    """The layouts of cases.py, large enough to be coded, with tails and a second chunk."""

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    channels_last = randn(6, 5, 14, 13).contiguous(memory_format=torch.channels_last)
    return [
        (randn(LARGE), randn(LARGE)),
        (randn(2 * LARGE + 1), randn(2 * LARGE + 1)),
        (randn(3 * LARGE - 130), randn(3 * LARGE - 130)),
        (randn(70, 90).t(), randn(90, 70)),
        (randn(90, 70), randn(70, 90).t()),
        (channels_last, randn(6, 5, 14, 13)),
        (randn(6, 5, 14, 13), channels_last.clone(memory_format=torch.preserve_format)),
        (randn(80, 120)[:, ::2], randn(80, 60)),
        (randn(LARGE + 1)[1:], randn(LARGE + 3)[3:]),
    ]


def stepped(case, pairs, style, backend, steps, **settings):
    """The parameters and states after some steps, gradients changing in a way that no backend can see."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p, _ in pairs]
    optimizer = case.optimizer(params, **case.settings, state_format=style, seed=7, backend=backend, **settings)
    for _ in range(steps):
        for _ in range(2 if optimizer.rule.samples else 1):
            for param, (_, grad) in zip(params, pairs, strict=True):
                param.grad = grad * torch.rand((), generator=generator)
            if optimizer.rule.samples:
                optimizer.accumulate()
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def assert_same(outcome, wanted, keys=None):
    for (param, state), (other, other_state) in zip(zip(*outcome, strict=True), zip(*wanted, strict=True), strict=True):
        assert state.keys() == other_state.keys()
        if keys is None:
            torch.testing.assert_close(param, other, rtol=0, atol=0, equal_nan=True)
        for key in state if keys is None else keys:
            codes, other_codes = (
                s[key].view(torch.int16) if s[key].dtype == torch.bfloat16 else s[key] for s in (state, other_state)
            )
            torch.testing.assert_close(codes, other_codes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("other", ["triton", "cuda"])
def test_kernels_give_the_same_bits(case, dtype, style, other, generator):
    """Parameters and codes after several steps, in every layout, extreme gradients and NaN among them."""
    pairs = large_layouts(dtype, generator)
    extreme = extreme_gradients().to(dtype).repeat(2)
    pairs.append((torch.linspace(-3, 3, len(extreme)).to(dtype), extreme))
    no_block = torch.linspace(-1, 1, LARGE).to(dtype)
    no_block[CODES : 2 * CODES] = math.nan
    pairs.append((torch.ones(LARGE).to(dtype), no_block))
    wanted = stepped(case, pairs, style, "cpp", 2)
    assert all(state_formats.format_of(state_formats.stored(s, case.optimizer.rule)) == style for s in wanted[1])
    assert_same(stepped(case, pairs, style, other, 2), wanted)
    assert_same(stepped(case, pairs[:3], style, other, 2, capturable=True), stepped(case, pairs[:3], style, "cpp", 2))


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_triton_in_the_blocks_that_ship(style, generator, shipped_triton_blocks):
    """Sizes about a chunk, and coded ones; the other tests take larger blocks, which are sooner interpreted."""
    chunk = backends.BACKENDS["triton"].chunk
    sizes = (1, chunk - 1, chunk, chunk + 1, LARGE + chunk - 1, LARGE + chunk + 1)
    pairs = [(torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in sizes]
    assert_same(*(stepped(CASES["vsgd"], pairs, style, backend, 1) for backend in ("triton", "cpp")))


@pytest.mark.parametrize("sizes", [(1, 127, 128), (129, 255, 256)])
def test_triton_in_fewer_warps(sizes, generator, shipped_triton_blocks):
    """One and two, which is as many as these have blocks for."""
    pairs = [(torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in sizes]
    assert_same(*(stepped(CASES["vsgd"], pairs, "fp32", backend, 1) for backend in ("triton", "cpp")))


def test_reference_gives_the_same_codes(case, style, generator):
    """Of the first steps, before the parameters' last bits differ."""
    pairs = large_layouts(torch.float32, generator)
    keys = (
        *state_formats.keys(style, case.optimizer.rule),
        *([state_formats.BLOCKS] * state_formats.has_blocks(style)),
    )
    assert_same(stepped(case, pairs, style, "eager", 3), stepped(case, pairs, style, "cpp", 3), keys)


@pytest.mark.parametrize("style", ["q8", "packed16"])
def test_reference_gives_the_same_codes_of_many(style):
    """Of elements so many that the last bit of what is rounded decides some of their codes."""
    grad = torch.randn(2**22, generator=torch.Generator().manual_seed(4))
    outcomes = []
    for backend in ("eager", "cpp"):
        param = torch.nn.Parameter(torch.zeros_like(grad))
        param.grad = grad
        optimizer = VSGD([param], lr=1e-2, state_format=style, backend=backend)
        optimizer.step()
        outcomes.append(state_formats.stored(optimizer.state[param], optimizer.rule))
    for own, other in zip(*outcomes, strict=True):
        assert torch.equal(own, other)


def test_instruction_sets_give_the_same_bits(case, style, generator, monkeypatch):
    pairs = large_layouts(torch.float32, generator)
    wanted = stepped(case, pairs, style, "cpp", 3)
    for _ in each_isa(monkeypatch):
        assert_same(stepped(case, pairs, style, "cpp", 3), wanted)


@pytest.mark.parametrize("scale", [0.01, 2.0**75])
def test_instruction_sets_give_the_same_bits_of_opposite_samples(style, scale, monkeypatch):
    """Whose mean is 0, and whose variance, divided by the scale's square, is anything; 2^-150 is not a float32."""
    grad = extreme_gradients()[:4000].repeat(2)  # those that are finite
    outcomes = []
    for _ in each_isa(monkeypatch):
        param = torch.nn.Parameter(torch.ones_like(grad))
        optimizer = SampleVSGD([param], lr=1e-2, maximize=True, state_format=style, backend="cpp")
        for _ in range(3):
            for param.grad in (grad.clone(), -grad, 0.5 * grad, -0.5 * grad):
                optimizer.accumulate()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        outcomes.append(([param], [optimizer.state[param]]))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])


def test_instruction_sets_give_the_same_bits_where_rates_overflow(style, monkeypatch):
    """Where steps make NaN of numbers none of which was; packed16, which has no infinite rates, makes none."""
    outcomes = []
    for _ in each_isa(monkeypatch):
        param = torch.nn.Parameter(torch.ones(LARGE))
        param.grad = torch.linspace(-1, 1, LARGE)
        optimizer = VSGD([param], lr=1e-2, ps=1e-29, state_format=style, backend="cpp")
        optimizer.step()
        state = optimizer.state[param]
        state["step"].zero_()  # the next divides by twice ps
        if style == "q8":
            state["blocks"][3:5, 1:] = 0x7E000005  # rates of 4e37
        elif style == "packed16":
            state["blocks"][3:5, 1] = 0x7E000005
            state["blocks"][3:5, 2] = 0x7E000000 | (state["blocks"][3:5, 2] & 31)
        else:
            for rate in optimizer.rule.rates:
                state[rate][3 * CODES : 5 * CODES] = 4e37
        optimizer.step()
        optimizer.step()
        values = state_formats.decoded(state, optimizer.rule)
        bad = values[1].isnan().view(-1, CODES).any(1)
        assert bad.nonzero().flatten().tolist() == ([] if style == "packed16" else [3, 4])
        outcomes.append(([param], [state]))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])


def test_another_seed_rounds_otherwise(case, style, backend, generator):
    pairs = large_layouts(torch.float32, generator)[:1]
    codes = []
    for seed in (0, 0, 1):
        params = [torch.nn.Parameter(pairs[0][0].clone()) for _ in range(2)]
        optimizer = case.optimizer(params, lr=1e-2, state_format=style, seed=seed, backend=backend)
        for param in params:
            param.grad = pairs[0][1]
        optimizer.step()
        codes += [state_formats.stored(optimizer.state[p], optimizer.rule)[0] for p in params]
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(codes[1], codes[3])
    for a, b in ((0, 1), (0, 4)):  # another parameter of the same values; another seed
        assert not torch.equal(codes[a], codes[b])


def test_nan_stays_in_its_own_element(case, style, backend, generator):
    param = torch.nn.Parameter(torch.ones(LARGE))
    param.grad = gradient(param, generator)
    param.grad[300] = math.nan
    optimizer = case.optimizer([param], lr=1e-2, state_format=style, backend=backend)
    for _ in range(3):
        optimizer.step()
        param.grad[300] = 0.1  # what is NaN stays so
    state = optimizer.state[param]
    for value in (param, *state_formats.decoded(state, optimizer.rule)):
        assert value.isnan().nonzero().flatten().tolist() == [300]


def test_small_and_double_parameters_stay_as_they_are(case, style, backend, generator):
    params = [
        torch.nn.Parameter(torch.randn(LARGE - 1, generator=generator)),
        torch.nn.Parameter(torch.randn(LARGE, generator=generator).double()),
        torch.nn.Parameter(torch.randn(LARGE, generator=generator)),
    ]
    for param in params:
        param.grad = gradient(param, generator)
    optimizer = case.optimizer(params, lr=1e-2, state_format=style, backend=backend)
    optimizer.step()
    dtypes = [state_formats.stored(optimizer.state[p], optimizer.rule)[-1].dtype for p in params]
    assert dtypes[:2] == [torch.float32, torch.float64]
    assert dtypes[2] == {"bf16": torch.bfloat16, "q8": torch.uint8, "packed16": torch.int16}[style]


def test_bytes(case, style):
    """What a format promises, counted from the tensors."""
    param = torch.nn.Parameter(torch.ones(100_000))
    param.grad = torch.ones_like(param)
    optimizer = case.optimizer([param], lr=1e-2, state_format=style)
    optimizer.step()
    state = optimizer.state[param]
    size = sum(value.untyped_storage().nbytes() for key, value in state.items() if key != "step")
    states = len(case.optimizer.rule.states)
    assert size / param.numel() == pytest.approx(state_formats.bytes_of(style, optimizer.rule), rel=1e-3)
    assert size / param.numel() <= {"bf16": 2.0 * states, "q8": 3.2 / 3 * states, "packed16": 2.3}[style]


def test_settings_changed_between_steps(backend, generator):
    """A group's format and seed hold from the next step on."""
    param = torch.nn.Parameter(torch.randn(LARGE, generator=generator))
    optimizer = VSGD([param], lr=1e-2, backend=backend)
    param.grad = gradient(param, generator)
    outcomes = []
    for style in ("q8", "packed16", "fp32", "packed16", "bf16"):
        optimizer.param_groups[0]["state_format"] = style
        optimizer.step()
        state = optimizer.state[param]
        assert state_formats.format_of(state_formats.stored(state, optimizer.rule)) == style
        assert len(state) == 1 + len(state_formats.keys(style, optimizer.rule)) + state_formats.has_blocks(style)
    twin = copy.deepcopy(optimizer)
    twin_param = twin.param_groups[0]["params"][0]
    for own, own_param, seed in ((optimizer, param, 0), (twin, twin_param, 1)):
        own_param.grad = param.grad.clone()
        own.step()
        own.param_groups[0]["seed"] = seed
        own.step()
        outcomes.append(own.state[own_param]["bg"])
    assert not torch.equal(*outcomes)


def test_refused():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="state_format must be one of 'fp32', 'bf16', 'q8', 'packed16', got 'int4'"):
        VSGD([param], state_format="int4")
    with pytest.raises(ValueError, match=r"seed must be at least 0 and below 2\^63, got -1"):
        VSGD([param], seed=-1)
    with pytest.raises(TypeError, match=r"seed must be an int, got 0\.5"):
        VSGD([param], seed=0.5)
