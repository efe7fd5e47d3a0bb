"""The state of parameters of which several processes hold parts, as a checkpoint has it: however they are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from . import row_blocks, state_formats
from .rules import Rule
from .sharding import is_of_rows, like, local
from .state_formats import BLOCKS, PACKED, WITH_16_BITS


def saved_state(rule: Rule, param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state for a state_dict: words of blocks by rows or, where no rows are held, codes decoded.

    What has 16 bits, as `low` may have, has 32 there: neither gloo nor NCCL sends 16-bit integers.
    """
    if not isinstance(param, DTensor):
        return dict(state)
    if BLOCKS not in state:
        return _widened(state)
    if is_of_rows(param):
        rows = row_blocks.by_rows(rule, state[BLOCKS], local(param).shape)
        return {**_widened(state), BLOCKS: like(param, rows, (param.shape[0], rows.shape[1]))}
    decoded = dict(zip(rule.states, decoded_state(rule, param, state), strict=True))
    return {**_widened(_without_codes(state)), **decoded}


def decoded_state(rule: Rule, param: DTensor, state: Mapping[str, Any]) -> list[Tensor]:
    """The numbers of a parameter's state in an optimizer, in the rule's order, as DTensors."""
    values = state_formats.decoded({key: local(value) for key, value in state.items()}, rule)
    return [like(param, value) for value in values]


def held_state(name: str, rule: Rule, param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as that of what this process holds of a parameter, in plain tensors.

    Args:
        name: what errors call the state.
        rule: the update rule.
        param: the parameter.
        state: as `saved_state` made it, in parts or gathered, or that of a parameter which nobody had cut; the codes of
            a whole one must have been checked.

    Raises:
        ValueError: an entry does not fit the parameter.
    """
    is_whole = not any(isinstance(value, DTensor) for value in state.values())
    if isinstance(param, DTensor) and is_whole and BLOCKS in state:  # which mean nothing for a part
        values = state_formats.decoded(state, rule)
        state = {**_without_codes(state), **dict(zip(rule.states, values, strict=True))}
    return {
        key: _held(f"{name}: expected {key}", param, value, key != BLOCKS)
        if isinstance(value, Tensor) and key in (*state_formats.elementwise(rule), BLOCKS)
        else value
        for key, value in state.items()
    }


def _without_codes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in (PACKED, BLOCKS)}


def _widened(state: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(state)
    for key in WITH_16_BITS:
        if key in own and own[key].dtype == torch.int16:
            own[key] = own[key].int()
    return own


def _held(expected: str, param: Tensor, value: Tensor, is_elementwise: bool) -> Tensor:
    if not isinstance(param, DTensor):
        if isinstance(value, DTensor):
            raise ValueError(f"{expected} as a plain tensor, as the parameter is, found a DTensor: gather it first")
        return value
    if is_elementwise and value.shape != param.shape:
        raise ValueError(f"{expected} of shape {tuple(param.shape)}, found {tuple(value.shape)}")
    if not isinstance(value, DTensor):
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    elif value.placements != param.placements or value.device_mesh != param.device_mesh:
        value = value.redistribute(param.device_mesh, param.placements)
    own: Tensor = local(value)
    return own
