"""q8's codes, and what packed16 shares of them, in plain torch (``csrc/states.h`` says in C++ what they mean).

Elements are flat, [numel], in the order in which they lie in memory; each `CODES` of them are a block, which has a word
for each state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arithmetic import fma
from .noise import CODES
from .rules import BOUNDS, Rule

_LAST_RATE, _NAN_RATE, _NAN_MEAN = 254, 255, -128
#: Its place among every rule's states; it is rounded by bits of its own.
FIRST_RATE = 1
#: As an int32: the sign bit of a word, which says that there are NaN in its block.
HAS_NAN = -(2**31)
#: The bits of 1.
ONE = 0x3F800000
#: A mean's magnitude m is the float32 bits of 1 + m SPAN / (the block's largest), in steps of 2^MEAN_SHIFT.
SPAN, MEAN_SHIFT = 246.98, 19
TINY_BITS: int = int(torch.tensor(BOUNDS[torch.float32].tiny, device="cpu").view(torch.int32).item())


def dtype_of(key: str, rule: Rule) -> torch.dtype:
    """The dtype of a state."""
    return torch.uint8 if key in rule.rates else torch.int8


def encode(rule: Rule, values: Sequence[Tensor], random: Tensor, others: Tensor) -> tuple[list[Tensor], Tensor]:
    """Codes of each state's numbers, and the blocks' words, [blocks, states] int32.

    Args:
        rule: says which states are rates.
        values: float32.
        random: 32 random bits for each element, int64.
        others: the same for its first rate (docs/formats.md, Rounding, has the reason).
    """
    coded = [
        (_encode_rates if key in rule.rates else _encode_means)(value, others if k == FIRST_RATE else random)
        for k, (key, value) in enumerate(zip(rule.states, values, strict=True))
    ]
    return [codes for codes, _ in coded], torch.stack([word for _, word in coded], 1)


def decode(rule: Rule, states: Sequence[Tensor], words: Tensor) -> list[Tensor]:
    """The numbers of codes, each of which has its own words, [numel, states]."""
    return [
        _decode_codes(key in rule.rates, codes, word)
        for key, codes, word in zip(rule.states, states, words.unbind(1), strict=True)
    ]


def wrong_word(rule: Rule, words: Tensor) -> str | None:
    """What is wrong with words that `encode` did not write, if anything is."""
    for key, word in zip(rule.states, (words & ~HAS_NAN).unbind(1), strict=True):
        if key in rule.rates:
            step, base = word & 31, word & ~31
            bad = (step < 5) | (step > 24) | (base < 2**23) | (base >= 0x7F800000) | ((base >> step) << step != base)
        else:
            bad = (word < TINY_BITS) | (word >= 0x7F800000)
        if bad.any():
            return f"{word[bad][0].item():#x} for {key!r}"
    return None


def wrong_code(rule: Rule, states: Sequence[Tensor], words: Tensor) -> str | None:
    """What is wrong with codes that `encode` did not write, each of which has its own words.

    That is a NaN in a block whose word does not say so, or a rate that is not finite.
    """
    for key, codes, word in zip(rule.states, states, words.unbind(1), strict=True):
        nan = _NAN_RATE if key in rule.rates else _NAN_MEAN
        if ((codes == nan) & (word >= 0)).any():
            return f"code {nan} for {key!r} in a block without NaN"
        bits = (word & 0x7FFFFFE0).long() + (codes.long() << (word & 31).long())
        if key in rule.rates and (wrong := (codes != nan) & (bits >= 0x7F800000)).any():
            return f"code {codes[wrong][0].item()} for {key!r} with {word[wrong][0].item():#x}"
    return None


def by_block(flat: Tensor, fill: float) -> Tensor:
    """[blocks, CODES], the last block filled up."""
    return pad(flat, (0, -flat.numel() % CODES), value=fill).view(-1, CODES)


def each(words: Tensor, numel: int) -> Tensor:
    """Each element's word, or words."""
    return words.repeat_interleave(CODES, 0)[:numel]


def marked(word: Tensor, nan: Tensor) -> Tensor:
    """Words as int32, with the mark of those blocks that have NaN."""
    return torch.where(by_block(nan, False).any(1), word.int() | HAS_NAN, word.int())


def _encode_rates(flat: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    bits = flat.view(torch.int32).long()
    low, high = rate_range(bits, flat.isnan())
    # The finest steps of 2^k in which the block's range fits, even rounded up: by its length in bits, or one more.
    k = 5 + bit_length((high - low) >> 13)
    k = k + (highest_codes(low, high, k) > _LAST_RATE)
    word = (low >> k << k) | k
    own = each(word, flat.numel())
    k = own & 31
    codes = (bits - (own & ~31) + (random >> (32 - k))) >> k
    return torch.where(flat.isnan(), _NAN_RATE, codes).to(torch.uint8), marked(word, flat.isnan())


def rate_range(bits: Tensor, nan: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest bits of each block's rates; where all are NaN, those of the least rate there is."""
    high = by_block(torch.where(nan, 0, bits), 0).amax(1).clamp(min=TINY_BITS)
    low = by_block(torch.where(nan, 2**31, bits), 2**31).amin(1)
    return torch.minimum(low, high), high


def highest_codes(low: Tensor, high: Tensor, k: Tensor) -> Tensor:
    """Each block's highest code of a rate, rounded up, in steps of 2^k."""
    return (high - (low >> k << k) + (1 << k) - 1) >> k


def bit_length(x: Tensor) -> Tensor:
    """How many bits integers have, from their highest set one on."""
    return torch.frexp(x.double()).exponent.long()


def _encode_means(flat: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = flat.abs().view(torch.int32)
    word = by_block(torch.where(flat.isnan(), 0, magnitude), 0).amax(1).clamp(min=TINY_BITS)
    code = magnitude_codes(flat.abs().nan_to_num(0.0), word, random, SPAN, MEAN_SHIFT)
    code = torch.where(flat.isnan(), _NAN_MEAN, torch.where(flat.signbit(), -code, code))
    return code.to(torch.int8), marked(word, flat.isnan())


def magnitude_codes(x: Tensor, word: Tensor, random: Tensor, span: float, shift: int) -> Tensor:
    """Codes of magnitudes x, none of which exceeds its block's largest, of which the block's word is the bits."""
    largest = word.view(torch.float32)
    y = fma(x, each(_as_tensor(span, largest) / largest, x.numel()), 1.0)
    return (y.view(torch.int32).long() - ONE + (random >> (32 - shift))) >> shift


def magnitudes(codes: Tensor, word: Tensor, span: float, shift: int) -> Tensor:
    """The magnitudes of `magnitude_codes`, with each one's word."""
    largest = word.view(torch.float32)
    y = (ONE + (codes.int() << shift)).view(torch.float32)
    return (y - 1.0) * (largest / _as_tensor(span, largest))


def _as_tensor(span: float, largest: Tensor) -> Tensor:
    """For torch may divide by a number, and divides a number, with a reciprocal, which rounds otherwise."""
    return torch.full_like(largest, span)


def _decode_codes(is_rate: bool, codes: Tensor, word: Tensor) -> Tensor:
    """The numbers of codes, with each one's word."""
    own = word & ~HAS_NAN
    if is_rate:
        value = ((own & ~31) + (codes.int() << (own & 31))).view(torch.float32)
    else:
        value = magnitudes(codes.int().abs(), own, SPAN, MEAN_SHIFT) * codes.sign()
    is_nan = (codes == (_NAN_RATE if is_rate else _NAN_MEAN)) & (word < 0)
    return torch.where(is_nan, torch.nan, value)
