"""What a saved state of a parameter must be made of, before it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import state_formats
from .batch import DTYPES
from .checkpoint_layout import has_data
from .rules import Rule
from .state_formats import BLOCKS, PACKED


def check_states(name: str, state: Mapping[str, Any], rule: Rule, param: Tensor) -> None:
    """Raises ValueError where states are missing, there twice, or no tensors of the parameter's shape."""
    keys = state_formats.keys_in(state, rule)
    if missing := [key for key in keys if key not in state]:
        found = ", ".join(map(str, state))
        raise ValueError(f"{name}: expected {', '.join(rule.states)}, found no {', '.join(missing)}, but {found}")
    if PACKED in state and (others := [key for key in rule.states if key in state]):
        raise ValueError(
            f"{name}: expected {PACKED} or {', '.join(rule.states)}, found {PACKED} and {', '.join(others)}"
        )
    for key in keys:
        check_saved(f"{name}: expected {key}", state[key], param)


def check_codes(name: str, state: Mapping[str, Any], rule: Rule, param: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Raises ValueError where no format has such states, or no step writes such codes or words of blocks.

    Returns:
        The states and, where their format has them, the blocks' words.
    """
    keys = state_formats.keys_in(state, rule)
    saved = [state[key] for key in keys]
    style = state_formats.format_of(saved)
    if not state_formats.has_blocks(style):
        for key, own in zip(keys, saved, strict=True):
            if own.dtype not in DTYPES:
                raise ValueError(f"{name}: expected {key} of {', '.join(map(str, DTYPES))}, found {own.dtype}")
        if BLOCKS in state:
            raise ValueError(f"{name}: expected no {BLOCKS}, found them beside {saved[0].dtype}")
        return saved, None
    for key, codes in zip(keys, saved, strict=True):
        dtype = state_formats.state_dtype(style, key, rule, param.dtype)
        if codes.dtype != dtype or not state_formats.is_dense(codes):
            raise ValueError(f"{name}: expected {key} to be dense and {dtype}, found {codes.dtype}, {codes.stride()}")
    blocks = state.get(BLOCKS)
    shape = state_formats.blocks_shape(rule, param.numel())
    if not isinstance(blocks, Tensor) or blocks.shape != shape or blocks.dtype != torch.int32:
        found = f"{blocks.dtype}, {tuple(blocks.shape)}" if isinstance(blocks, Tensor) else repr(blocks)
        raise ValueError(f"{name}: expected {BLOCKS} of torch.int32 and shape {shape}, found {found}")
    if not has_data(blocks):
        raise ValueError(f"{name}: expected {BLOCKS} to have data, found it on {blocks.device}")
    if wrong := state_formats.wrong_word(rule, saved, blocks) or state_formats.wrong_code(rule, saved, blocks):
        raise ValueError(f"{name}: expected {BLOCKS} as this package writes them, found {wrong}")
    return saved, blocks


def check_saved(expected: str, saved: Any, param: Tensor) -> None:
    """Raises ValueError where an entry is no tensor of the parameter's shape that can be read."""
    if not isinstance(saved, Tensor):
        raise ValueError(f"{expected} to be a tensor, found {saved!r}")
    if saved.is_complex():
        raise ValueError(f"{expected} to be real, found {saved.dtype}")
    if saved.shape != param.shape:
        raise ValueError(f"{expected} of shape {tuple(param.shape)}, found {tuple(saved.shape)}")
    if not has_data(saved):
        raise ValueError(f"{expected} to be dense and have data, found {saved.layout}, {saved.device}")
