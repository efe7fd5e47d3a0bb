"""How states are stored, in plain torch (``csrc/states.h`` is the same in C++).

Rounding is stochastic and without bias: a rate moves by less than the distance of two codes a step, and would freeze
otherwise (docs/formats.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import packed16, q8
from .noise import CODES, STATE_NOISE, Noise, other_bits
from .rules import Rule, arithmetic_dtype

#: The key of a parameter's blocks in its state, and that of its states where one tensor holds them all.
BLOCKS, PACKED = "blocks", "packed"
#: The keys of what may be integers of 16 bits.
WITH_16_BITS = (PACKED, "low")
#: Parameters of fewer elements keep their states in float32.
SMALLEST = 4096
#: Formats by name, in the order of ``csrc/states.h``, with their bytes a parameter, blocks included: of all states
#: together, and of each.
FORMATS = {"fp32": (0, 4.0), "bf16": (0, 2.0), "q8": (0, 1.0 + 4.0 / CODES), "packed16": (2, 4.0 / CODES)}


def bytes_of(name: str, rule: Rule) -> float:
    """Bytes a parameter of a rule's states in a format."""
    together, each = FORMATS[name]
    return together + len(rule.states) * each


def format_for(name: str, dtype: torch.dtype, numel: float) -> str:
    """The format in which the states of a parameter of `dtype` and `numel` are kept where its group asks for `name`."""
    return "fp32" if dtype == torch.float64 or numel < SMALLEST else name


def format_of(states: Sequence[Tensor]) -> str:
    """The format of a parameter's states, by their number and the first one's dtype: no rule has less than two."""
    if len(states) == 1:
        return "packed16"
    return {torch.bfloat16: "bf16", torch.int8: "q8", torch.uint8: "q8"}.get(states[0].dtype, "fp32")


def has_blocks(name: str) -> bool:
    """Whether blocks belong to the states of a format."""
    return name in ("q8", "packed16")


def keys(name: str, rule: Rule) -> tuple[str, ...]:
    """The keys of a format's states in a parameter's state."""
    return (PACKED,) if name == "packed16" else rule.states


def elementwise(rule: Rule) -> tuple[str, ...]:
    """The keys of whatever a parameter's state may hold that has the parameter's shape."""
    return (*rule.states, *WITH_16_BITS)


def keys_in(state: Mapping[str, Any], rule: Rule) -> tuple[str, ...]:
    """The keys of a parameter's states, in whatever format they are."""
    return (PACKED,) if PACKED in state else rule.states


def stored(state: Mapping[str, Any], rule: Rule) -> list[Tensor]:
    """A parameter's states, in whatever format they are."""
    return [state[key] for key in keys_in(state, rule)]


def state_dtype(name: str, key: str, rule: Rule, param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state."""
    if name == "q8":
        return q8.dtype_of(key, rule)
    return {"bf16": torch.bfloat16, "packed16": torch.int16}.get(name, arithmetic_dtype(param_dtype))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order."""
    expected = 1
    for d in reversed(_order(tensor)):
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return tensor.numel() == 0
        expected *= tensor.shape[d]
    return True


def blocks_shape(rule: Rule, numel: int) -> tuple[int, int]:
    """Of the blocks: a word for each block and state."""
    return -(-numel // CODES), len(rule.states)


def empty(name: str, rule: Rule, param: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Uninitialised states of a parameter, of its shape, layout and device; and the blocks, [blocks, states] int32."""
    states = [
        torch.empty_like(param, dtype=state_dtype(name, key, rule, param.dtype), requires_grad=False)
        for key in keys(name, rule)
    ]
    if not has_blocks(name):
        return states, None
    return states, torch.empty(blocks_shape(rule, param.numel()), dtype=torch.int32, device=param.device)


def decode(rule: Rule, states: Sequence[Tensor], blocks: Tensor | None) -> list[Tensor]:
    """The states as numbers, in the dtype in which they are computed, of their shapes."""
    if blocks is None:
        return [state.float() if state.dtype == torch.bfloat16 else state for state in states]
    values = _decode_flat(rule, list(map(_memory_order, states)), q8.each(blocks, states[0].numel()))
    return [from_memory_order(value, states[0]) for value in values]


def decode_by_words(rule: Rule, states: Sequence[Tensor], words: Tensor) -> list[Tensor]:
    """The numbers of codes, each of which has its own words, [elements, states] in the order of a contiguous tensor."""
    values = _decode_flat(rule, [codes.reshape(-1) for codes in states], words)
    return [value.view(states[0].shape) for value in values]


def decoded(state: Mapping[str, Any], rule: Rule) -> list[Tensor]:
    """The states of a parameter as numbers, as `decode`."""
    return decode(rule, stored(state, rule), state.get(BLOCKS))


def encode(
    rule: Rule, values: Sequence[Tensor], states: Sequence[Tensor], blocks: Tensor | None, noise: Noise | None
) -> None:
    """Writes numbers to states, in place.

    Args:
        rule: says which states are rates.
        values: the numbers, of the states' shapes.
        states: in any format.
        blocks: those of a format that has them.
        noise: what to round by; None rounds to nearest, which is for values that will not be rounded again.
    """
    style = format_of(states)
    if style == "fp32":
        for state, value in zip(states, values, strict=True):
            state.copy_(value)
        return
    numel, device = states[0].numel(), states[0].device
    if noise is None:
        random = others = torch.full((numel,), 2**31, dtype=torch.int64, device=device)
    else:
        random = noise.bits(numel, device, STATE_NOISE)
        others = other_bits(random)
    flat = [_memory_order(value, states[0]).float() for value in values]
    if blocks is None:
        codes = [_encode_bf16(value, random) for value in flat]
    elif style == "q8":
        codes, words = q8.encode(rule, flat, random, others)
        blocks.copy_(words)
    else:
        packed, words = packed16.encode(flat, random, others)
        codes = [packed]
        blocks.copy_(words)
    for state, code in zip(states, codes, strict=True):
        state.copy_(from_memory_order(code, state))


def initial(name: str, rule: Rule, param: Tensor, values: Sequence[float]) -> dict[str, Tensor]:
    """The entries of a parameter's state, each filled with its value, rounded to nearest."""
    filled = [torch.full_like(param, value, dtype=arithmetic_dtype(param.dtype)) for value in values]
    return _encoded(name, rule, param, filled)


def entries(rule: Rule, states: Sequence[Tensor], blocks: Tensor | None) -> dict[str, Tensor]:
    """States and blocks under their keys."""
    own = dict(zip(keys(format_of(states), rule), states, strict=True))
    return own if blocks is None else {**own, BLOCKS: blocks}


def converted(name: str, rule: Rule, param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a parameter's state in another format: decoded, and rounded to nearest."""
    return _encoded(name, rule, param, decoded(state, rule))


def wrong_word(rule: Rule, states: Sequence[Tensor], words: Tensor) -> str | None:
    """What is wrong with the words of states, [any, states], that `encode` did not write, if anything is."""
    return q8.wrong_word(rule, words) if format_of(states) == "q8" else packed16.wrong_word(rule, words)


def wrong_code(rule: Rule, states: Sequence[Tensor], blocks: Tensor) -> str | None:
    """What is wrong with codes in blocks that `encode` did not write, if anything is."""
    return wrong_code_by_words(rule, list(map(_memory_order, states)), q8.each(blocks, states[0].numel()))


def wrong_code_by_words(rule: Rule, states: Sequence[Tensor], words: Tensor) -> str | None:
    """The same of codes each of which has its own words, [elements, states]."""
    if format_of(states) == "q8":
        return q8.wrong_code(rule, states, words)
    return packed16.wrong_code(rule, states[0], words)


def _encoded(name: str, rule: Rule, param: Tensor, values: Sequence[Tensor]) -> dict[str, Tensor]:
    states, blocks = empty(name, rule, param)
    encode(rule, values, states, blocks, None)
    return entries(rule, states, blocks)


def _decode_flat(rule: Rule, states: Sequence[Tensor], words: Tensor) -> list[Tensor]:
    """The numbers of codes in memory's order, with each one's words."""
    if format_of(states) == "q8":
        return q8.decode(rule, states, words)
    return packed16.decode(states[0], words)


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
