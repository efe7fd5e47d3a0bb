"""Parameters whose states are in codes; and how near those are to numbers: to half the distance of two of them."""

import torch

from tests.cases import CASES
from vsgd_kernels import q8, state_formats
from vsgd_kernels.noise import CODES

LARGE = state_formats.SMALLEST + 37
#: those of the formats that have blocks
IN_BLOCKS = [name for name in state_formats.FORMATS if state_formats.has_blocks(name)]
#: packed16, by a rule's number of states: bits of all rates, and codes of means where they are furthest apart in their
#: block's largest; the last 7 of 15 for three states, and the last 31 of 63 for two
RATE_BITS = {2: 9, 3: 11}
DISTANCES_IN_LARGEST = {2: 47.0, 3: 11.0}


def make(style, generator, case=CASES["vsgd"], **settings):
    params = [
        torch.nn.Parameter(torch.randn(LARGE, generator=generator)),
        torch.nn.Parameter(torch.randn(9, 10, 8, 7, generator=generator).contiguous(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(LARGE, generator=generator).bfloat16()),
        torch.nn.Parameter(torch.randn(50, generator=generator)),
    ]
    return params, case.optimizer(params, lr=1e-2, state_format=style, seed=5, **settings)


def started_from(make_optimizer, backend, count, numbers):
    """A parameter of zeros, and its optimizer with a state that stands for these numbers after `count` steps."""
    param = torch.nn.Parameter(torch.zeros_like(numbers[0]))
    optimizer = make_optimizer([param], backend=backend)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": torch.tensor(count), **dict(zip(optimizer.rule.states, numbers, strict=True))}}
    optimizer.load_state_dict(saved)
    return param, optimizer


def with_rates_that_barely_do_not_fit(generator, blocks=1200):
    """Means and rates for VSGD: in each block the rates' bits span a few less than a power of two."""

    def rates():
        low = torch.randint(0x30000000, 0x4E000000, (blocks, 1), generator=generator)
        less = torch.randint(0, 64, (blocks, 1), generator=generator)
        span = (1 << torch.randint(5, 26, (blocks, 1), generator=generator)) - less
        inside = torch.rand(blocks, CODES, generator=generator)
        inside[:, :2] = torch.tensor([0.0, 1.0])
        return (low + (span * inside.double()).long()).int().view(torch.float32).flatten()

    return [torch.randn(blocks * CODES, generator=generator), rates(), rates()]


def all_values(params, optimizer):
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def decoded(optimizer, param):
    return state_formats.decoded(optimizer.state[param], optimizer.rule)


def assert_near(optimizer, param, values):
    """What a parameter's states stand for is within half the distance of q8's or packed16's codes."""
    state, rule = optimizer.state[param], optimizer.rule
    if "packed" in state:
        assert_near_in_packed16(state, decoded(optimizer, param), values)
        return
    for key, now, value in zip(rule.states, decoded(optimizer, param), values, strict=True):
        # Where a block's rates span 40 octaves, or of the largest mean's, of which codes are 8/247 apart.
        allowed = value / 8 if key in rule.rates else value.abs().max() * 4.001 / q8.SPAN
        assert ((now - value).abs() <= allowed).all(), key


def assert_near_in_packed16(state, now, values):
    """A block's rates are coded in steps of 2^k of their bits, the finest that fit; its means, in units of the power of
    two nearest to their first rate's root, in steps of the block's largest.
    """
    (now, *now_rates), (mean, *rates) = ([by_block(value, state["packed"]) for value in own] for own in (now, values))
    k = state["blocks"][:, 1:2] & 31
    for own, rate in zip(now_rates, rates, strict=True):
        assert ((own.view(torch.int32) - rate.view(torch.int32)).abs() <= 1 << (k - 1)).all()
    finer = sum(bits_of_codes(rate, k - 1) for rate in rates)
    assert ((finer > RATE_BITS[len(values)]) | (k == 5)).all(), "they fit in finer steps"
    unit = torch.exp2(torch.frexp(now_rates[0]).exponent // 2)  # 1 for rates from 1/2 to 2
    largest = (mean.abs() / unit).amax(1, keepdim=True)
    allowed = 0.5 * largest / DISTANCES_IN_LARGEST[len(values)] * unit
    assert ((now - mean).abs() <= 1.001 * allowed).all()


def bits_of_codes(rates, k):
    """Of a block's highest, rounded up, from the lowest on, in steps of 2^k of the rates' bits."""
    bits = rates.view(torch.int32)
    base = bits.amin(1, keepdim=True) >> k << k
    return torch.frexp(((bits.amax(1, keepdim=True) - base + (1 << k) - 1) >> k).double()).exponent


def by_block(tensor, codes):
    """[blocks, CODES], in the order of memory of the codes; the last block is filled up by its last element."""
    flat = torch.empty_like(codes, dtype=torch.float32).copy_(tensor)
    flat = flat.as_strided((flat.numel(),), (1,))
    return torch.cat([flat, flat[-1:].expand(-len(flat) % CODES)]).view(-1, CODES)
