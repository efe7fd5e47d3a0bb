"""packed16's codes, in plain torch (``csrc/packed.h`` is the same in C++ and says what they mean).

Elements are flat, [numel], in the order in which they lie in memory; each `CODES` of them are a block, which has a word
for each state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .q8 import (
    HAS_NAN,
    TINY_BITS,
    bit_length,
    by_block,
    each,
    highest_codes,
    magnitude_codes,
    magnitudes,
    marked,
    rate_range,
)
from .rules import Rule

#: The bits of 2^121; rates beyond count as that.
MOST_RATE = 0x7C000000
#: Bits of a mean's code, by the number of states; those that are left are the rates'.
MEAN_BITS = {2: 7, 3: 5}
#: A mean's largest code leads to a little more than this; steps are twice as long in the upper half.
SPANS = {2: 2.9373, 3: 2.7498}


def mean_shift(states: int) -> int:
    """A mean's codes are steps of 2^this in the bits of 1 + SPAN m / (the block's largest)."""
    return 25 - MEAN_BITS[states]


def rate_bits(states: int) -> int:
    """Bits of the codes of all rates."""
    return 16 - MEAN_BITS[states]


def encode(values: Sequence[Tensor], random: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Words of elements, int16, and the blocks' words, [blocks, states] int32.

    Args:
        values: the numbers of a mean, and of one or two rates, float32.
        random: 32 random bits for each element, int64, that round its rates.
        others: the same for its mean, whose units the rates decide on.
    """
    states, numel = len(values), values[0].numel()
    nan = torch.stack([value.isnan() for value in values]).any(0)
    mean, *rates = values
    bits = [rate.view(torch.int32).long() for rate in rates]
    rate_words = _rate_words(bits, nan)
    k = each(rate_words[0] & 31, numel)
    bases = [each(word & ~31, numel) for word in rate_words]
    codes = [
        (own.clamp(max=MOST_RATE) - base + (random >> (32 - k))) >> k for own, base in zip(bits, bases, strict=True)
    ]
    per_root_scale = ((190 - (bases[0] + (codes[0] << k) >> 24)) << 23).int().view(torch.float32)
    in_units = torch.where(nan, 0.0, mean.abs() * per_root_scale)
    largest = by_block(in_units.view(torch.int32), 0).amax(1).clamp(min=TINY_BITS)
    code = magnitude_codes(in_units, largest, others, SPANS[states], mean_shift(states))
    packed = torch.where(mean.signbit(), -code, code) & _mean_mask(states) | codes[0] << MEAN_BITS[states]
    words = torch.stack([marked(largest, nan), *(word.int() for word in rate_words)], 1)
    if states == 3:
        packed |= codes[1] << (MEAN_BITS[states] + each(_first_length(words), numel))
    return torch.where(nan, _nan_code(states), packed).to(torch.int16), words


def decode(packed: Tensor, words: Tensor) -> list[Tensor]:
    """The numbers of elements' words, each of which has its block's own, [numel, states]."""
    states = words.shape[1]
    bits = rates_of(packed, words)
    code = packed.int() & _mean_mask(states)
    code = torch.where(code >= _nan_code(states), code - 2 * _nan_code(states), code)
    unscaled = magnitudes(code.abs(), words[:, 0] & ~HAS_NAN, SPANS[states], mean_shift(states)) * code.sign()
    scale = (((bits[0] >> 24) + 64) << 23).int().view(torch.float32)
    values = [unscaled * scale, *(rate.int().view(torch.float32) for rate in bits)]
    is_nan = (code == -_nan_code(states)) & (words[:, 0] < 0)
    return [torch.where(is_nan, torch.nan, value) for value in values]


def rates_of(packed: Tensor, words: Tensor) -> list[Tensor]:
    """The bits of the rates of elements' words, int64."""
    states = words.shape[1]
    k, length = words[:, 1].long() & 31, _first_length(words)
    codes = (packed.long() & 0xFFFF) >> MEAN_BITS[states]
    both = (codes & ((1 << length) - 1), codes >> length)
    return [(word.long() & ~31 & ~HAS_NAN) + (code << k) for word, code in zip(words.unbind(1)[1:], both, strict=False)]


def wrong_word(rule: Rule, words: Tensor) -> str | None:
    """What is wrong with words that `encode` did not write, if anything is."""
    own = words.long()
    k, length = own[:, 1] & 31, _first_length(words)
    bad = torch.zeros_like(own, dtype=torch.bool)
    bad[:, 0] = ((own[:, 0] & 0x7FFFFFFF) < TINY_BITS) | ((own[:, 0] & 0x7FFFFFFF) >= 0x7F800000)
    bad[:, 1] = (k < 5) | (k > 26)
    for word, wrong in zip(own.unbind(1)[1:], bad.unbind(1)[1:], strict=True):
        base: Tensor = word & ~31
        wrong |= (base < 2**23) | (base > MOST_RATE) | ((base >> k) << k != base)
    bad[:, -1] |= length > rate_bits(len(rule.states))
    for key, word, wrong in zip(rule.states, words.unbind(1), bad.unbind(1), strict=True):
        if wrong.any():
            return f"{int(word[wrong][0].item()) & 0xFFFFFFFF:#x} for {key!r}"
    return None


def wrong_code(rule: Rule, packed: Tensor, words: Tensor) -> str | None:
    """What is wrong with elements' words that `encode` did not write, each of which has its block's own.

    That is a NaN in a block whose word does not say so, or a rate beyond what is kept.
    """
    is_nan = packed.int() & _mean_mask(len(rule.states)) == _nan_code(len(rule.states))
    if (is_nan & (words[:, 0] >= 0)).any():
        return "a NaN in a block without NaN"
    for key, bits in zip(rule.states[1:], rates_of(packed, words), strict=True):
        if (wrong := ~is_nan & (bits > MOST_RATE)).any():
            return f"{bits[wrong][0].item():#x} for {key!r}"
    return None


def _mean_mask(states: int) -> int:
    return (1 << MEAN_BITS[states]) - 1


def _nan_code(states: int) -> int:
    return 1 << (MEAN_BITS[states] - 1)


def _first_length(words: Tensor) -> Tensor:
    """Bits of the first rate's codes."""
    states = words.shape[1]
    return words[:, 2].long() & 31 if states == 3 else torch.full_like(words[:, 1].long(), rate_bits(states))


def _rate_words(rates: Sequence[Tensor], nan: Tensor) -> list[Tensor]:
    """The rates' words of blocks, int64, for the bits of the rates; NaN do not count."""
    ranges = [rate_range(own, nan) for own in rates]
    low, high = ([bound.clamp(max=MOST_RATE) for bound in bounds] for bounds in zip(*ranges, strict=True))
    # At most three steps too fine: a code that is rounded up, from a base below the lowest, may have a bit or two more.
    bits = rate_bits(1 + len(rates))
    lengths = torch.stack([bit_length(most - least) for least, most in zip(low, high, strict=True)])
    finest = lengths.amax(0) - bits
    if len(rates) == 2:
        finest = torch.maximum(finest, (lengths.sum(0) - bits + 1) >> 1)
    k = finest.clamp(min=5)
    for _ in range(3):
        lengths = torch.stack([bit_length(highest_codes(*bounds, k)) for bounds in zip(low, high, strict=True)])
        k = k + (lengths.sum(0) > bits)
    words = [least >> k << k for least in low]
    words[0] = words[0] | k
    if len(rates) == 2:
        words[1] = words[1] | bit_length(highest_codes(low[0], high[0], k))
    return words
