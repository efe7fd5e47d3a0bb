"""How states are rounded: without bias, by uniform and evenly spread bits; and their averages stay where they are."""

import math

import pytest
import torch

from bench import stationarity
from tests.cases import CODED, ROUNDINGS, STATIONARITY
from vsgd_kernels import rules, state_formats
from vsgd_kernels.noise import CODES, MASTER_NOISE, STATE_NOISE, Noise, other_bits, tensor_key


def coded(style, mean, *rates):
    """A mean and two rates as they are decoded, each rounding of its own."""
    rule = rules.VSGD
    states, blocks = state_formats.empty(style, rule, mean)
    state_formats.encode(rule, [mean, *rates], states, blocks, Noise.of(tensor_key(3, 0), 5))
    return state_formats.decode(rule, states, blocks)


@pytest.mark.parametrize("style", CODED)
@pytest.mark.parametrize("magnitude", [1e-20, 3.7e-6, 0.011, 1.9, 6e7])
def test_rounding_is_unbiased(style, magnitude):
    """100,000 roundings of a value average to it, in blocks whose other values are far larger or smaller."""
    n = 100_000
    for around in (1.0, 2.0**-6, 40.0):
        values = torch.full((2 * n,), magnitude)
        values[1::2] *= around
        values[::4] *= -1
        for name, decoded in zip(rules.VSGD.states, coded(style, values, values.abs(), values.abs()), strict=True):
            wanted = values if name == "mug" else values.abs()
            error = ((decoded - wanted) / magnitude).double()[::2]
            allowed = ROUNDINGS * error.std() / math.sqrt(n) + 2.0**-23
            assert error.mean().abs() <= allowed, (name, around)


@pytest.mark.parametrize("style", CODED)
def test_rounding_is_unbiased_in_blocks_of_many_octaves(style):
    """Where the rounding of a rate decides how its mean is coded."""
    blocks = 4000
    rates = 2.0 ** torch.linspace(0, 10, CODES)
    numbers = [0.3 * rates.sqrt(), rates, 3 * rates]
    values = [number.repeat(blocks) for number in numbers]
    for name, number, decoded in zip(rules.VSGD.states, numbers, coded(style, *values), strict=True):
        error = (decoded.view(blocks, CODES).double() - number) / number
        allowed = ROUNDINGS * error.std(0) / math.sqrt(blocks) + 2.0**-23
        assert (error.mean(0).abs() <= allowed).all(), name


def random_bits(step, stream, blocks=2000, of=lambda bits: bits):
    """As numbers from 0 to 1."""
    bits = Noise.of(tensor_key(11, 2), step).bits(blocks * CODES, torch.device("cpu"), stream)
    return of(bits).double() / 2**32


def test_random_bits_are_uniform_and_independent():
    """Of states and masters, of steps, of the same place in two blocks, of halves; as far as that many blocks tell."""
    own = random_bits(9, STATE_NOISE)
    others = [random_bits(9, MASTER_NOISE), random_bits(10, STATE_NOISE), own.roll(CODES), own.roll(-3 * CODES)]
    others.append(random_bits(9, STATE_NOISE, of=other_bits))
    columns = torch.stack([own, *others])
    blocks = columns.shape[1] / CODES
    assert (columns.mean(1) - 0.5).abs().max() < ROUNDINGS * math.sqrt(1 / 12 / blocks)
    correlation = torch.corrcoef(columns) - torch.eye(len(columns), dtype=torch.float64)
    assert correlation.abs().max() < ROUNDINGS / math.sqrt(blocks)
    for place in (0, 1, CODES - 1):
        counts = torch.histc(own[place::CODES], 64, 0, 1)
        wanted = blocks / 64
        assert ((counts - wanted) ** 2 / wanted).sum() < 63 + ROUNDINGS * math.sqrt(2 * 63)


def test_random_bits_of_a_block_are_evenly_spread():
    """One of its elements is in each 128th of what there is; of the other bits too."""
    for own in (random_bits(9, STATE_NOISE), random_bits(9, STATE_NOISE, of=other_bits)):
        bits = own.view(-1, CODES)
        torch.testing.assert_close((bits * CODES).long().sort(1).values, torch.arange(CODES).expand_as(bits))


@pytest.mark.parametrize("problem", stationarity.PROBLEMS)
def test_stationary(problem):
    """After 20,000 steps the step that is taken is float32's."""
    wanted = stationarity.settled(problem, "fp32")
    for style in CODED:
        mean, spread = stationarity.settled(problem, style)
        assert mean == pytest.approx(wanted[0], rel=STATIONARITY[style]["mean"]), style
        assert spread == pytest.approx(wanted[1], rel=STATIONARITY[style]["spread"]), style


@pytest.mark.parametrize("style", CODED)
def test_rounding_to_nearest_is_not_stationary(style):
    """What the test above would show if rounding froze the averages; sooner than it would."""
    mean, _ = stationarity.settled_in("equal", stationarity.nearest(style), steps=3000, last=200)
    wanted, _ = stationarity.settled("equal", "fp32", steps=3000, last=200)
    assert mean != pytest.approx(wanted, rel=max(0.05, STATIONARITY[style]["mean"]))
