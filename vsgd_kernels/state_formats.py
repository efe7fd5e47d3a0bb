"""How states are stored, in plain torch (``csrc/states.h`` is the same in C++).

Rounding is stochastic and without bias: a rate moves by less than the distance of two codes a step, and would freeze
otherwise (docs/formats.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .noise import CODES, STATE_NOISE, Noise
from .rules import BOUNDS, Rule, arithmetic_dtype

#: The key of a parameter's blocks in its state.
BLOCKS = "blocks"
#: Parameters of fewer elements keep their states in float32.
SMALLEST = 4096
#: Formats by name, in the order of ``csrc/states.h``'s Format, with bytes a parameter and state, blocks included.
FORMATS = {"fp32": 4.0, "bf16": 2.0, "q8": 1.0 + 4.0 / CODES}

_LAST_RATE, _NAN_RATE, _NAN_MEAN = 254, 255, -128
#: As an int32: the sign bit of a word, which says that there are NaN in its block.
_HAS_NAN = -(2**31)
_ONE = 0x3F800000
#: A mean's magnitude m is the float32 bits of 1 + m SPAN / (the block's largest), in steps of 2^MEAN_SHIFT.
SPAN, MEAN_SHIFT = 246.98, 19
_TINY_BITS = torch.tensor(BOUNDS[torch.float32].tiny, device="cpu").view(torch.int32).item()


def format_for(name: str, dtype: torch.dtype, numel: int) -> str:
    """The format in which the states of a parameter of `dtype` and `numel` are kept where its group asks for `name`."""
    return "fp32" if dtype == torch.float64 or numel < SMALLEST else name


def format_of(states: Sequence[Tensor]) -> str:
    """The format of a parameter's states."""
    return {torch.bfloat16: "bf16", torch.int8: "q8", torch.uint8: "q8"}.get(states[0].dtype, "fp32")


def state_dtype(name: str, key: str, rule: Rule, param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state."""
    if name == "q8":
        return torch.uint8 if key in rule.rates else torch.int8
    return torch.bfloat16 if name == "bf16" else arithmetic_dtype(param_dtype)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order."""
    expected = 1
    for d in reversed(_order(tensor)):
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return tensor.numel() == 0
        expected *= tensor.shape[d]
    return True


def blocks_shape(rule: Rule, numel: int) -> tuple[int, int]:
    """Of q8's blocks: a word for each block and state."""
    return -(-numel // CODES), len(rule.states)


def empty(name: str, rule: Rule, param: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Uninitialised states of a parameter, of its shape, layout and device; and q8's blocks, [blocks, states] int32."""
    states = [
        torch.empty_like(param, dtype=state_dtype(name, key, rule, param.dtype), requires_grad=False)
        for key in rule.states
    ]
    if name != "q8":
        return states, None
    return states, torch.empty(blocks_shape(rule, param.numel()), dtype=torch.int32, device=param.device)


def decode(rule: Rule, states: Sequence[Tensor], blocks: Tensor | None) -> list[Tensor]:
    """The states as numbers, in the dtype in which they are computed, of their shapes."""
    if blocks is None:
        return [state.float() if state.dtype == torch.bfloat16 else state for state in states]
    words = _each(blocks, states[0].numel())
    return [
        from_memory_order(_decode_codes(key in rule.rates, _memory_order(codes), word), codes)
        for key, codes, word in zip(rule.states, states, words.unbind(1), strict=True)
    ]


def decode_by_words(rule: Rule, states: Sequence[Tensor], words: Tensor) -> list[Tensor]:
    """The numbers of codes, each of which has its own words, [elements, states] in the order of a contiguous tensor."""
    return [
        _decode_codes(key in rule.rates, codes.reshape(-1), word).view(codes.shape)
        for key, codes, word in zip(rule.states, states, words.unbind(1), strict=True)
    ]


def encode(
    rule: Rule, values: Sequence[Tensor], states: Sequence[Tensor], blocks: Tensor | None, noise: Noise | None
) -> None:
    """Writes numbers to states, in place.

    Args:
        rule: says which states are rates.
        values: the numbers, of the states' shapes.
        states: in any format.
        blocks: q8's.
        noise: what to round by; None rounds to nearest, which is for values that will not be rounded again.
    """
    if format_of(states) == "fp32":
        for state, value in zip(states, values, strict=True):
            state.copy_(value)
        return
    numel, device = states[0].numel(), states[0].device
    if noise is None:
        random = torch.full((numel,), 2**31, dtype=torch.int64, device=device)
    else:
        random = noise.bits(numel, device, STATE_NOISE)
    for k, (key, state, value) in enumerate(zip(rule.states, states, values, strict=True)):
        flat = _memory_order(value, state).float()
        if blocks is None:
            codes = _encode_bf16(flat, random)
        elif key in rule.rates:
            codes, word = _encode_rates(flat, random)
            blocks[:, k] = word
        else:
            codes, word = _encode_means(flat, random)
            blocks[:, k] = word
        state.copy_(from_memory_order(codes, state))


def initial(name: str, rule: Rule, param: Tensor, values: Sequence[float]) -> dict[str, Tensor]:
    """The entries of a parameter's state, each filled with its value, rounded to nearest."""
    states, blocks = empty(name, rule, param)
    filled = [torch.full_like(param, value, dtype=arithmetic_dtype(param.dtype)) for value in values]
    encode(rule, filled, states, blocks, None)
    return entries(rule, states, blocks)


def entries(rule: Rule, states: Sequence[Tensor], blocks: Tensor | None) -> dict[str, Tensor]:
    """States and blocks under their keys."""
    return {**dict(zip(rule.states, states, strict=True)), **({} if blocks is None else {BLOCKS: blocks})}


def converted(name: str, rule: Rule, param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a parameter's state in another format: decoded, and rounded to nearest."""
    states, blocks = empty(name, rule, param)
    encode(rule, decode(rule, [state[key] for key in rule.states], state.get(BLOCKS)), states, blocks, None)
    return entries(rule, states, blocks)


def wrong_word(rule: Rule, blocks: Tensor) -> str | None:
    """What is wrong with blocks that `encode` did not write, if anything is."""
    for key, word in zip(rule.states, (blocks & ~_HAS_NAN).unbind(1), strict=True):
        if key in rule.rates:
            step = word & 31
            # The last code must stand for a float32 that is finite.
            bad = (step < 5) | (step > 24) | ((word & ~31).long() + (_LAST_RATE << step.long()) >= 0x7F800000)
            bad |= (word & ~31) < 2**23  # and the first for one that is normal
        else:
            bad = (word < _TINY_BITS) | (word >= 0x7F800000)
        if bad.any():
            return f"{word[bad][0].item():#x} for {key!r}"
    return None


def wrong_code(rule: Rule, states: Sequence[Tensor], blocks: Tensor) -> str | None:
    """What is wrong with q8's codes that `encode` did not write: a NaN in a block whose word does not say so."""
    for key, codes, word in zip(rule.states, states, blocks.unbind(1), strict=True):
        nan = _NAN_RATE if key in rule.rates else _NAN_MEAN
        if ((_memory_order(codes) == nan) & (_each(word, codes.numel()) >= 0)).any():
            return f"code {nan} for {key!r} in a block without NaN"
    return None


def _memory_order(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The elements as they lie in the memory of `like`, a dense tensor of the same shape: [numel]."""
    return tensor.permute(_order(tensor if like is None else like)).reshape(-1)


def from_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """Elements [numel] that lie as those of `like` do in memory, in the shape of `like`."""
    order = _order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[d] for d in order]).permute(inverse)


def _order(tensor: Tensor) -> list[int]:
    """Dimensions by descending strides; those of one element lie anywhere."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: 0 if tensor.shape[d] == 1 else -strides[d])


def _encode_bf16(flat: Tensor, random: Tensor) -> Tensor:
    bits = flat.view(torch.int32).long() & 0xFFFFFFFF
    codes = torch.where(flat.isnan(), 0x7FC0, (bits + (random >> 16)) >> 16)
    return codes.to(torch.int16).view(torch.bfloat16)  # int64 to int16 keeps the lowest bits


def _by_block(flat: Tensor, fill: float) -> Tensor:
    """[blocks, CODES], the last block filled up."""
    return pad(flat, (0, -flat.numel() % CODES), value=fill).view(-1, CODES)


def _each(words: Tensor, numel: int) -> Tensor:
    """Each element's word, or words."""
    return words.repeat_interleave(CODES, 0)[:numel]


def _marked(word: Tensor, flat: Tensor) -> Tensor:
    """Words as int32, with the mark of those blocks that have NaN."""
    return torch.where(_by_block(flat.isnan(), False).any(1), word.int() | _HAS_NAN, word.int())


def _encode_rates(flat: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    bits = flat.view(torch.int32).long()
    low = _by_block(torch.where(flat.isnan(), 2**31, bits), 2**31).amin(1)
    high = _by_block(torch.where(flat.isnan(), 0, bits), 0).amax(1)
    low = torch.minimum(low, high)
    # The finest steps of 2^k in which the block's range fits, even rounded up: by its length in bits, or one more.
    length = torch.frexp(((high - low) >> 13).double()).exponent.long()
    k = 5 + length
    k = k + ((((high - (low >> k << k)) + (1 << k) - 1) >> k) > _LAST_RATE)
    word = (low >> k << k) | k
    each = _each(word, flat.numel())
    k = each & 31
    codes = (bits - (each & ~31) + (random >> (32 - k))) >> k
    return torch.where(flat.isnan(), _NAN_RATE, codes).to(torch.uint8), _marked(word, flat)


def _encode_means(flat: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = flat.abs().view(torch.int32)
    word = _by_block(torch.where(flat.isnan(), 0, magnitude), 0).amax(1).clamp(min=_TINY_BITS)
    largest = word.view(torch.float32)
    y = flat.abs().nan_to_num(0.0) * _each(_span(largest) / largest, flat.numel()) + 1.0
    code = (y.view(torch.int32).long() - _ONE + (random >> (32 - MEAN_SHIFT))) >> MEAN_SHIFT
    code = torch.where(flat.isnan(), _NAN_MEAN, torch.where(flat.signbit(), -code, code))
    return code.to(torch.int8), _marked(word, flat)


def _span(largest: Tensor) -> Tensor:
    """As a tensor: torch may divide by a number, and divides a number, with a reciprocal, which rounds otherwise."""
    return torch.full_like(largest, SPAN)


def _decode_codes(is_rate: bool, codes: Tensor, word: Tensor) -> Tensor:
    """The numbers of codes, with each one's word."""
    own = word & ~_HAS_NAN
    if is_rate:
        value = ((own & ~31) + (codes.int() << (own & 31))).view(torch.float32)
    else:
        y = (_ONE + (codes.int().abs() << MEAN_SHIFT)).view(torch.float32)
        largest = own.view(torch.float32)
        value = (y - 1.0) * (largest / _span(largest)) * codes.sign()
    is_nan = (codes == (_NAN_RATE if is_rate else _NAN_MEAN)) & (word < 0)
    return torch.where(is_nan, torch.nan, value)
