"""States that no training led to: checked before they are stepped, and stepped alike by all."""

from functools import partial

import pytest
import torch

from tests.cases import CASES, CODED, assert_same_bits, each_isa, train
from tests.codes import (
    IN_BLOCKS,
    LARGE,
    all_values,
    bits_of_codes,
    decoded,
    make,
    started_from,
    with_rates_that_barely_do_not_fit,
)
from vsgd_kernels import VSGD
from vsgd_kernels.noise import CODES


def every_other(codes):
    """The same ones, of other strides."""
    return torch.stack([codes, codes], -1)[..., 0]


BETWEEN_STEPS = {
    "q8": [
        ("blocks", lambda blocks: blocks[:-1].clone(), r"must be contiguous, torch.int32 and of shape \(33, 3\)"),
        ("bg", torch.Tensor.float, "must be torch.uint8"),
        ("mug", every_other, "must be dense and all of the same strides"),
    ],
    "packed16": [
        ("blocks", lambda blocks: blocks[:-1].clone(), r"must be contiguous, torch.int32 and of shape \(33, 3\)"),
        ("blocks", lambda blocks: None, "must be a tensor, got None"),
        ("packed", every_other, "must be dense and all of the same strides"),
        ("packed", lambda packed: packed[:-1].clone(), r"must have the parameter's shape \(4133,\), got \(4132,\)"),
    ],
}


@pytest.mark.parametrize("style", IN_BLOCKS)
def test_altered_between_steps(style, generator, backend):
    """Refused, and once it is as it was the training goes on."""
    params, optimizer = make(style, generator, backend=backend)
    train(optimizer, params, generator, 1)
    state = optimizer.state[params[0]]
    kept = dict(state)
    for key, alter, message in BETWEEN_STEPS[style]:
        state[key] = alter(state[key])
        with pytest.raises((TypeError, ValueError), match=f"state.* of parameter 0 of group 0 .*{message}"):
            optimizer.step()
        state.update(kept)
    train(optimizer, params, generator, 1)


@pytest.mark.parametrize(
    ("style", "key", "dtype"),
    [
        ("fp32", "mug", torch.int16),
        ("bf16", "mug", torch.int16),
        ("q8", "mug", torch.float32),
        ("packed16", "packed", torch.float32),
        ("packed16", "packed", torch.int32),
    ],
)
def test_another_dtype_between_steps(style, key, dtype, generator):
    """One of no format's, or of another format than the others."""
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 1)
    state = optimizer.state[params[0]]
    state[key] = state[key].to(dtype)
    before = [t.clone() for t in all_values(params, optimizer)]
    with pytest.raises((TypeError, ValueError), match=r"state '\w+' of parameter 0 of group 0 must be torch"):
        optimizer.step()
    assert_same_bits(all_values(params, optimizer), before)


def test_a_step_that_fails_leaves_every_format(generator):
    """Though the first parameter's state could be coded."""
    params, optimizer = make("fp32", generator)
    train(optimizer, params, generator, 1)
    removed = optimizer.state[params[2]].pop("bg")
    before = [dict(optimizer.state[param]) for param in params]
    optimizer.param_groups[0]["state_format"] = "packed16"
    with pytest.raises(ValueError, match="state of parameter 2 of group 0 has no 'bg'"):
        optimizer.step()
    for param, entries in zip(params, before, strict=True):
        own = optimizer.state[param]
        assert own.keys() == entries.keys()
        assert all(own[key] is entry for key, entry in entries.items())
    optimizer.state[params[2]]["bg"] = removed
    train(optimizer, params, generator, 1)
    assert "packed" in optimizer.state[params[0]]


@pytest.mark.parametrize("style", IN_BLOCKS)
def test_short_blocks_are_not_decoded_for_another_format(style, generator):
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 1)
    state = optimizer.state[params[0]]
    state["blocks"] = state["blocks"][:-1].clone()
    optimizer.param_groups[0]["state_format"] = "fp32"
    with pytest.raises(ValueError, match=r"state 'blocks' of parameter 0 of group 0 must be .*shape \(33, 3\)"):
        optimizer.step()


def of_blocks(low, high, generator):
    """Positive, and in each block of some of the octaves from `low` to `high`."""
    bounds = low + (high - low) * torch.rand(2, LARGE // CODES + 1, 1, generator=generator).sort(0).values
    exponents = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(LARGE // CODES + 1, CODES, generator=generator)
    return exponents.exp2().flatten()[:LARGE]


def stepped_from(make_optimizer, backend, count, numbers, grad, steps):
    """A state that stands for these numbers after `count` steps, after some more.

    Every other block's gradients are its means, which leaves its rates as far from their squares as they are.
    """
    param, optimizer = started_from(make_optimizer, backend, count, numbers)
    is_own = torch.arange(LARGE) // CODES % 2 == 0
    for _ in range(steps):
        param.grad = torch.where(is_own, decoded(optimizer, param)[0], grad)
        optimizer.step()
    return optimizer.state[param].values()


@pytest.mark.parametrize("style", CODED)
@pytest.mark.parametrize(("count", "tau"), [(5.0, None), (0.0, None), (1.0, 0.005)])  # the others forget the rates
def test_any_state_is_stepped_alike(case, style, count, tau, generator, monkeypatch):
    """Means and rates of all magnitudes that are loaded, whose blocks span anything; NaN and large gradients."""
    rule = case.optimizer.rule
    taus = dict.fromkeys({"tau", "tau1", "tau2"} & set(rule.hyper), tau) if tau else {}
    make_optimizer = partial(case.optimizer, **{**case.settings, **taus}, state_format=style)
    numbers = [of_blocks(-100, 120 if key in rule.rates else 60, generator) for key in rule.states]
    for key, value in zip(rule.states, numbers, strict=True):
        value[: 3 * CODES] = 2.0**59
        if key in rule.rates:
            value[:CODES] = 2.0**-100
            value[2 * CODES : 3 * CODES] = 0.5
    for k, value in enumerate(numbers):
        value[3 * CODES : 4 * CODES] = 2.0 ** [60, 50, 20][k]
        value[4 * CODES : 5 * CODES] = 2.0 ** [58.9, -1.0, -24.0][k]  # a mean of more and more of its units
        value[5 * CODES : 12 * CODES] = 0.5
        value[(7 + 2 * k) * CODES] = torch.nan
    numbers[0] *= torch.randn(LARGE, generator=generator).sign()
    grad = of_blocks(-40, 40, generator)
    grad[5 * CODES : 6 * CODES] = 2.0**70
    grad *= torch.randn(LARGE, generator=generator).sign()
    grad[3 * CODES : 4 * CODES] = -0.49 * numbers[0][3 * CODES : 4 * CODES]  # leads to rates of more than 2^121
    others = [stepped_from(make_optimizer, backend, count, numbers, grad, 3) for backend in ("cuda", "triton")]
    # The reference's parameter differs in its last bits, and hence what it would draw and decay later.
    reference = stepped_from(make_optimizer, "eager", count, numbers, grad, 1)
    for _ in each_isa(monkeypatch):
        wanted = stepped_from(make_optimizer, "cpp", count, numbers, grad, 3)
        for other in others:
            assert_same_bits(other, wanted)
        assert_same_bits(reference, stepped_from(make_optimizer, "cpp", count, numbers, grad, 1))


def coarser(rates, k):
    """How much larger k is than where packed16 begins to look for it."""
    lengths = [bits_of_codes(rate.view(-1, CODES), 0) for rate in rates]
    first = torch.maximum(torch.maximum(*lengths) - 11, (sum(lengths) - 11 + 1) >> 1).clamp(min=5)
    return k - first.flatten()


def test_codes_of_rates_that_barely_do_not_fit(generator, monkeypatch):
    """Steps of up to three doublings are tried until they do, by each backend to the same codes."""
    numbers = with_rates_that_barely_do_not_fit(generator)

    def stepped(backend, style="packed16"):
        param, optimizer = started_from(partial(VSGD, state_format="packed16"), backend, 5.0, numbers)
        if style == "fp32":  # from the same numbers
            param, optimizer = started_from(VSGD, backend, 5.0, decoded(optimizer, param))
        param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer.state[param]

    wanted, uncoded = stepped("cpp"), stepped("cpp", "fp32")
    found = coarser((uncoded["bg"], uncoded["bhg"]), wanted["blocks"][:, 1] & 31)
    assert set(found.tolist()) == {0, 1, 2, 3}
    for _ in each_isa(monkeypatch):
        assert_same_bits(stepped("cpp").values(), wanted.values())
    for backend in ("eager", "cuda", "triton"):
        assert_same_bits(stepped(backend).values(), wanted.values())


def test_means_alone_are_nan():
    """Of a block whose largest mean is infinite, means of code 0 are NaN beside rates that are numbers."""

    def outcome(backend):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(LARGE, generator=generator))
        optimizer = CASES["stoch_grad_adam"].optimizer([param], lr=1e-2, state_format="packed16", backend=backend)
        train(optimizer, [param], generator, 2)
        state = optimizer.state[param]
        state["blocks"][::3, 0] = 0x7F800000
        mean, rate = decoded(optimizer, param)
        assert (mean.isnan() & rate.isfinite()).any()
        train(optimizer, [param], generator, 2)
        return [state["packed"], state["blocks"]]

    wanted = outcome("cpp")
    for backend in ("eager", "cuda", "triton"):
        assert_same_bits(outcome(backend), wanted)


#: about the floors, about what is stepped without them, and beyond
RATES = torch.tensor([-100, -99, -71, -70, -69, -24, 0, 53, 54, 55, 100.0]).exp2()


@pytest.mark.parametrize("style", CODED)
@pytest.mark.parametrize("count", [0.0, 5.0])  # the first step forgets the rates
@pytest.mark.parametrize("ps", [1e-300, 1e30])  # by which rates fall to their floors, and variances do
def test_floors_take_effect_alike(case, style, count, ps, monkeypatch):
    """Where no gradient keeps the rates up, and a variance that is not floored would show in the parameter's step."""
    rule = case.optimizer.rule
    settings = {**case.settings, "eps": 0.0, **({"ps": ps} if "ps" in rule.hyper else {})}
    make_optimizer = partial(case.optimizer, **settings, state_format=style)
    first, even, odd = torch.cartesian_prod(RATES, RATES, RATES)[..., None].expand(-1, -1, CODES).unbind(1)  # of blocks
    rates = [first.flatten(), torch.where(torch.arange(CODES) % 2 == 0, even, odd).flatten()]
    means = torch.full_like(rates[0], 2.0**-60)
    numbers = [means, *rates][: len(rule.states)]

    def stepped(backend):
        param, optimizer = started_from(make_optimizer, backend, count, numbers)
        for sign in (1.0, -1.0, 1.0):  # negative variances, too, which nothing but rounding makes
            param.grad = decoded(optimizer, param)[0].clone()
            if rule.samples:
                optimizer.accumulate()
                optimizer._samples[param].variance.copy_(sign * rates[0])
            optimizer.step()
        return [param.detach(), *optimizer.state[param].values()]

    wanted = stepped("cuda")
    for _ in each_isa(monkeypatch):
        assert_same_bits(stepped("cpp"), wanted)
