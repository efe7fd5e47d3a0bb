"""Words of blocks by rows of a parameter, for checkpoints of parameters that several processes hold some rows of each.

A block is `CODES` elements of what one process holds, so that its words mean nothing where the parameter is cut
otherwise. By rows they do: a row has the words of all blocks that it touches, and the number of its first element in
the first of them. A checkpoint can be cut anew between any rows; each element keeps its value, and where the cuts are
the old ones each block its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import state_formats
from .noise import CODES
from .rules import Rule
from .state_formats import BLOCKS, keys_in


def width(rule: Rule, shape: Sequence[int]) -> int:
    """Words of a row of a parameter of this shape."""
    return _touched(shape) * len(rule.states) + 1


def by_rows(rule: Rule, blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """[rows, width] int32, from a parameter's blocks; `shape` is what the process holds of it, contiguous."""
    rows, length = shape[0], prod(shape[1:])
    start = torch.arange(rows, device=blocks.device) * length
    touched = start[:, None] // CODES + torch.arange(_touched(shape), device=blocks.device)
    words = blocks[touched.clamp(max=max(len(blocks) - 1, 0))] if blocks.numel() else blocks.new_empty(rows, 0)
    words = words.reshape(rows, width(rule, shape) - 1)
    return torch.cat([words, (start % CODES).int()[:, None]], 1)


def to_blocks(rule: Rule, rows: Tensor, shape: Sequence[int]) -> Tensor | None:
    """What `by_rows` was made from; None where a row then lay otherwise in its blocks."""
    length = prod(shape[1:])
    first = torch.arange(-(-prod(shape) // CODES), device=rows.device) * CODES  # elements of the blocks
    row = first // max(length, 1)
    own = _words(rule, rows, shape)[row, (rows[row, -1] + first - row * length) // CODES]
    return own if torch.equal(by_rows(rule, own, shape), rows) else None


def each_word(rule: Rule, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[elements, states] int32, each element's words."""
    length = prod(shape[1:])
    block = (rows[:, -1:] + torch.arange(length, device=rows.device)) // CODES
    words = _words(rule, rows, shape)[torch.arange(len(rows), device=rows.device)[:, None], block]
    return words.reshape(-1, len(rule.states))


def resolved(name: str, rule: Rule, shape: Sequence[int], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved state with its blocks in place of words by rows; where they lay otherwise, with its codes decoded.

    Args:
        name: what errors call the state.
        rule: the update rule.
        shape: of the parameter, or of what this process holds of it.
        state: any; one without words by rows is returned as it is.

    Raises:
        ValueError: the words are none that this package writes.
    """
    rows, keys = state.get(BLOCKS), keys_in(state, rule)
    codes = [own for key in keys if isinstance(own := state.get(key), Tensor) and own.shape == shape]
    if not isinstance(rows, Tensor) or not shape or rows.shape != (shape[0], width(rule, shape)):
        return state
    if len(codes) < len(keys):
        return state  # the checks of a state say so
    if rows.dtype != torch.int32 or bool(((rows[:, -1] < 0) | (rows[:, -1] >= CODES)).any()):
        raise ValueError(f"{name}: expected {BLOCKS} by rows as this package writes them, found {rows.dtype}, {rows}")
    if (blocks := to_blocks(rule, rows, shape)) is not None:
        return {**state, BLOCKS: blocks}
    words = each_word(rule, rows, shape)
    flat = [own.reshape(-1) for own in codes]
    if wrong := state_formats.wrong_word(rule, codes, words) or state_formats.wrong_code_by_words(rule, flat, words):
        raise ValueError(f"{name}: expected {BLOCKS} as this package writes them, found {wrong}")
    values = state_formats.decode_by_words(rule, codes, words)
    others = {key: value for key, value in state.items() if key not in (*keys, BLOCKS)}
    return {**others, **dict(zip(rule.states, values, strict=True))}


def _touched(shape: Sequence[int]) -> int:
    """How many blocks a row may touch."""
    return (prod(shape[1:]) + 2 * (CODES - 1)) // CODES


def _words(rule: Rule, rows: Tensor, shape: Sequence[int]) -> Tensor:
    return rows[:, :-1].reshape(len(rows), _touched(shape), len(rule.states))
