"""What StochGradAdam draws: Philox 4x32-10, the same on every backend, in every layout, and in a resumed run."""

import copy

import pytest
import torch

from bench import stationarity
from tests.cases import (
    CODED,
    SIZES,
    STATIONARITY,
    STATIONARITY_OF_COARSE_ROOTS,
    gradient,
    layouts,
    through_a_file,
    train,
    words_of,
)
from vsgd_kernels import StochGradAdam, philox, state_formats
from vsgd_kernels.rules import BOUNDS

TINY = BOUNDS[torch.float32].tiny
LARGE = state_formats.SMALLEST


@pytest.mark.parametrize(
    ("key", "counter", "wanted"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, wanted):
    """Those that Random123 publishes with the algorithm."""
    words = philox.philox(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(word.item() for word in words) == wanted


@pytest.mark.parametrize("sampling_rate", [0.25, 0.8, 1.0])
def test_masks(backend, generator, sampling_rate):
    """Which elements a step leaves out, for all sizes in one launch, and layouts and misaligned views among them."""
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]
    params += [torch.nn.Parameter(param) for param, _ in layouts(torch.float32, generator).values()]
    optimizer = StochGradAdam(params, lr=1e-2, sampling_rate=sampling_rate, seed=2**62 + 5, backend=backend)
    for t in (1, 2):
        for param in params:
            param.grad = torch.ones_like(param)
        wanted = [words_of(optimizer, p, t).double() / 2**32 < sampling_rate for p in params]
        before = [optimizer.state[p]["exp_avg"].clone() if t > 1 else 0.0 for p in params]
        optimizer.step()
        for param, mask, mean in zip(params, wanted, before, strict=True):
            # m' = 0.9 m + 0.1 where an element is sampled, and less than m elsewhere
            assert torch.equal(optimizer.state[param]["exp_avg"] > mean, mask)
        sampled = torch.cat([mask.flatten() for mask in wanted]).double()
        assert (sampled.mean() - sampling_rate).abs() < 5 * (0.25 / sampled.numel()) ** 0.5


def test_elements_are_counted_in_memory_order(backend):
    """An element's word is that of its place in memory, as in a parameter of one dimension."""
    flat = torch.nn.Parameter(torch.zeros(6 * 5 * 4 * 3))
    last = torch.nn.Parameter(torch.zeros(6, 5, 4, 3).contiguous(memory_format=torch.channels_last))
    masks = []
    for param in (flat, last):
        param.grad = torch.ones_like(param)
        optimizer = StochGradAdam([param], lr=1e-2, sampling_rate=0.5, backend=backend)
        optimizer.step()
        masks.append(param.detach() != 0)
    assert torch.equal(masks[1].permute(0, 2, 3, 1).reshape(-1), masks[0])


def test_words_are_independent():
    """Of neighbours, of the next step, of another parameter and of another seed."""
    like = torch.empty(100_000)
    streams = [philox.words(*of, like) for of in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (2**32, 0, 1))]
    uniform = torch.stack([*streams, streams[0].roll(1), streams[0].roll(2)]).double() / 2**32
    assert (uniform.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / like.numel()) ** 0.5
    correlation = torch.corrcoef(uniform) - torch.eye(len(uniform), dtype=torch.float64)
    assert correlation.abs().max() < 5 / like.numel() ** 0.5


@pytest.mark.parametrize("style", state_formats.FORMATS)
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_a_resumed_run_draws_the_same_masks(backend, generator, style, how):
    """Seed and step are in the state dict; the constructor's seed does not matter then."""
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (LARGE, 50)]
    optimizer = StochGradAdam(params, lr=1e-2, sampling_rate=0.5, seed=11, state_format=style, backend=backend)
    train(optimizer, params, generator, 2)
    others = copy.deepcopy(params)
    if how == "file":
        resumed = StochGradAdam(others, state_format=style, backend="cpp" if backend == "triton" else backend)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        others, resumed = copy.deepcopy((params, optimizer))
    for own, own_params in ((optimizer, params), (resumed, others)):
        train(own, own_params, torch.Generator().manual_seed(5), 2)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_another_seed_draws_others(backend):
    steps = []
    for seed in (0, 1, 2**32, 0):
        param = torch.nn.Parameter(torch.zeros(1000))
        param.grad = torch.ones(1000)
        StochGradAdam([param], lr=1e-2, seed=seed, backend=backend).step()
        steps.append(param.detach())
    assert torch.equal(steps[0], steps[3])
    assert not any(torch.equal(steps[0], other) for other in steps[1:3])


@pytest.mark.parametrize("style", CODED)
def test_mean_squares_of_zero_in_codes(backend, generator, style):
    """Elements that never had a gradient stand beside others in a block, which then spans 100 octaves: none's mean
    square decodes to 0, and none is further from float32's than a code, an octave."""
    params = [torch.nn.Parameter(torch.zeros(LARGE)) for _ in range(2)]
    idle = torch.arange(LARGE) % 3 == 0
    grad = torch.where(idle, 0.0, gradient(params[0], generator))
    squares = []
    for param, own_style in zip(params, ("fp32", style), strict=True):
        optimizer = StochGradAdam([param], lr=1.0, eps=0.0, state_format=own_style, backend=backend)
        param.grad = grad
        optimizer.step()
        squares.append(state_formats.decoded(optimizer.state[param], optimizer.rule)[1])
    assert torch.equal(squares[1][idle], torch.full_like(squares[1][idle], TINY))
    assert torch.equal(params[1][idle], torch.zeros_like(params[1][idle]))
    ratio = squares[1] / squares[0]
    assert ((ratio >= 0.5) & (ratio <= 2.0)).all()


@pytest.mark.parametrize("style", CODED)
@pytest.mark.parametrize("problem", stationarity.PROBLEMS)
def test_stationary_in_codes(problem, style):
    """The step that is taken, as of VSGD in test_rounding.py, after 3000 steps."""
    wanted, (mean, spread) = _settled(problem, "fp32"), _settled(problem, style)
    coarse = problem == "mixed" and style == "q8"
    tolerance = STATIONARITY_OF_COARSE_ROOTS if coarse else STATIONARITY[style]
    assert mean == pytest.approx(wanted[0], rel=tolerance["mean"])
    assert spread == pytest.approx(wanted[1], rel=tolerance["spread"])


def _settled(problem, style):
    steps, last = 3000, 500
    param = torch.nn.Parameter(torch.zeros(stationarity.ELEMENTS))
    optimizer = StochGradAdam([param], lr=1.0, eps=0.0, state_format=style)
    for t, param.grad in enumerate(stationarity.gradients(problem, steps)):
        if t == steps - last:
            start = param.detach().clone()
        optimizer.step()
    taken = (start - param.detach()) / last
    return taken.mean().item(), taken.std().item()
