"""One parameter's state: made at its first step, changed where its group's settings have changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import formats, state_formats
from .batch import step_device
from .hyperparameters import Settings
from .rules import Rule, arithmetic_dtype


def complete(state: dict[str, Any], rule: Rule, param: Tensor, numel: int, settings: Settings) -> None:
    """Gives a parameter's state what it lacks; one that does not fit its parameter is left for the checks.

    Args:
        state: the state, empty where the parameter has not stepped yet.
        rule: the update rule.
        param: the parameter, or the part of it that this process holds.
        numel: the whole parameter's number of elements, which decides whether it is coded.
        settings: its group's.
    """
    device = step_device(param, settings.capturable)
    style = state_formats.format_for(settings.state_format, param.dtype, numel)
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        initial = rule.initial(settings.row, arithmetic_dtype(param.dtype))
        state.update(state_formats.initial(style, rule, param, initial))
    elif _is_in_another_format(state, rule, param, style):
        converted = state_formats.converted(style, rule, param, state)
        for key in (*state_formats.keys_in(state, rule), state_formats.BLOCKS):
            state.pop(key, None)
        state.update(converted)
    _complete_low(state, param, formats.low_dtype(settings.master_weights, param.dtype))
    if isinstance(step := state.get("step"), Tensor) and step.device != device:
        state["step"] = step.to(device)  # it was loaded, or the group has become capturable


def _complete_low(state: dict[str, Any], param: Tensor, dtype: torch.dtype | None) -> None:
    """Gives a state the `low` of its group's setting."""
    low = state.get("low")
    if dtype is None:
        state.pop("low", None)
    elif "low" not in state:
        state["low"] = formats.converted_low(param, None, dtype)
    elif (
        isinstance(low, Tensor)
        and low.dtype != dtype
        and low.dtype in formats.MASTER_WEIGHTS.values()
        and low.shape == param.shape
    ):
        state["low"] = formats.converted_low(param, low, dtype)


def _is_in_another_format(state: dict[str, Any], rule: Rule, param: Tensor, style: str) -> bool:
    """Whether a group's format has changed: whether the state is one of another format, and nothing else is wrong."""
    keys = state_formats.keys_in(state, rule)
    states = [own for key in keys if isinstance(own := state.get(key), Tensor)]
    if len(states) < len(keys) or any(own.shape != param.shape for own in states):
        return False
    found = state_formats.format_of(states)
    dtypes = [state_formats.state_dtype(found, key, rule, param.dtype) for key in keys]
    blocks = state.get(state_formats.BLOCKS)
    shape = state_formats.blocks_shape(rule, param.numel()) if state_formats.has_blocks(found) else None
    is_whole = [own.dtype for own in states] == dtypes and getattr(blocks, "shape", None) == shape
    return found != style and is_whole
