"""What a state_dict must be made of, before a value in it is read: its entries, groups and states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .formats import MASTER_WEIGHTS
from .hyperparameters import entries
from .rules import Rule
from .state_formats import FORMATS, PACKED, WITH_16_BITS

#: Settings without which the checkpoints of older optimizers are loaded all the same.
_OPTIONAL = ("maximize",)


def check_kinds(state_dict: Mapping[str, Any], rule: Rule) -> None:
    """Raises TypeError or ValueError where an entry of a state_dict or of its groups is missing or of another kind."""
    for name, kind, words in (("state", Mapping, "a dict"), ("param_groups", Sequence, "a list of dicts")):
        if name not in state_dict:
            raise ValueError(f"state_dict: expected state and param_groups, found no {name}")
        _check_kind(name, state_dict[name], kind, words)
    for number, group in enumerate(state_dict["param_groups"]):
        _check_group(f"param_groups[{number}]", group, rule)


def check_owners(state_dict: Mapping[str, Any], rule: Rule) -> None:
    """Raises TypeError or ValueError where two parameters have one state, or a state has no parameter."""
    counts = Counter(i for group in state_dict["param_groups"] for i in group["params"])
    for i, count in counts.items():
        if count > 1:
            raise ValueError(f"param_groups: expected each parameter once, found {i!r} {count} times")
    for i, state in state_dict["state"].items():
        if i in counts:
            _check_kind(f"state of parameter {i}", state, Mapping, "a dict")
        elif isinstance(state, Mapping) and any(key in state for key in (*rule.states, PACKED)):
            raise ValueError(f"state: expected that of the parameters in param_groups, found one of {i!r}")


def count(name: str, step: Any) -> float:
    """A step count as a number; beyond 2^24 float32, in which it is kept, does not count."""
    is_number = isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex() and has_data(step)
    value = step.item() if is_number else step
    is_count = isinstance(value, Real) and not isinstance(value, bool) and not value < 0 and value <= 2**24
    if not is_count or not float(value).is_integer():
        raise ValueError(f"{name}: expected step to be a whole number from 0 to 2^24, found {step!r}")
    return float(value)


def has_data(tensor: Tensor) -> bool:
    """Whether its elements can be read."""
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def narrowed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as an optimizer keeps it.

    sharded_checkpoint.py widens what has 16 bits. In a flattened state dict torch puts an empty dict where the loading
    optimizer has an entry and the saved one had none.
    """
    own = {key: value for key, value in state.items() if not (isinstance(value, dict) and not value)}
    for key in WITH_16_BITS:
        value = own.get(key)
        if not isinstance(value, Tensor) or value.dtype != torch.int32 or is_traceable_wrapper_subclass(value):
            continue
        if has_data(value) and bool((value == value.to(torch.int16)).all()):
            own[key] = value.to(torch.int16)
    return own


def _check_group(name: str, group: Any, rule: Rule) -> None:
    _check_kind(name, group, Mapping, "a dict")
    if "params" not in group:
        raise ValueError(f"{name}: expected params, found none")
    _check_kind(f"params of {name}", group["params"], Sequence, "a list")
    for i in group["params"]:
        _check_kind(f"params of {name}", i, (int, str), "numbers or names")
    if (names := group.get("param_names")) is not None:
        _check_kind(f"param_names of {name}", names, Sequence, "a list")
        if len(names) != len(group["params"]):
            raise ValueError(f"param_names of {name}: expected {len(group['params'])}, found {len(names)}")
    for setting, names in (("state_format", FORMATS), ("master_weights", MASTER_WEIGHTS)):
        if setting in group and group[setting] not in tuple(names):
            expected = ", ".join(map(repr, names))
            raise ValueError(f"{name}: expected {setting} to be one of {expected}, found {group[setting]!r}")
    if "state_version" in group:  # this package's, whose groups name every setting
        required = [entry for entry in entries(rule.hyper) if entry not in _OPTIONAL]
        if missing := [entry for entry in required if entry not in group]:
            raise ValueError(f"{name}: expected {', '.join(required)}, found no {', '.join(missing)}")


def _check_kind(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        raise TypeError(f"{name}: expected {words}, found {value!r}")
