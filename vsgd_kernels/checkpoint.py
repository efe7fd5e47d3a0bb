"""Checkpoints: what `load_state_dict` takes, including the authors' and pytorch_optimizer's, brought to one layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import checkpoint_layout, formats, hyperparameters, row_blocks, state_formats
from .checkpoint_layout import count, narrowed
from .formats import MASTER_WEIGHTS
from .rules import BOUNDS, VSGD, Rule, arithmetic_dtype
from .saved_states import check_codes, check_saved, check_states
from .state_formats import BLOCKS, PACKED

#: Of what `state_dict` returns.
VERSION = 1
#: Entries of a parameter group beside a rule's hyperparameters.
SETTINGS = ("capturable", "state_format", "master_weights", "seed", "state_version")

#: Group entries of pytorch_optimizer that are no settings of ours.
_FOREIGN_SETTINGS = ("step", "pa2", "pbg2", "pbhg2", "weight_decouple", "foreach")
#: Entries of the authors' states that are constants.
_FOREIGN_ENTRIES = ("pa2", "pbg2", "pbhg2")
#: The authors' constant, which neither implementation stores under a name.
_AUTHORS_SHAPE_OFFSET = 1e-4
#: Entries of a parameter group of the authors' class.
_AUTHORS_SETTINGS = ("ghattg", "ps", "tau1", "tau2", "lr", "weight_decay", "eps")


class Exact:
    """A state tensor on its way through `Optimizer.load_state_dict`, which would cast a bare one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@torch.no_grad()
def convert(
    state_dict: dict[str, Any], rule: Rule, params: list[Tensor], own_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """A state_dict of this package, of the authors' class or of pytorch_optimizer, as ours.

    Args:
        state_dict: as `Optimizer.state_dict` returns it; it is not changed, and nothing in it is shared with the
            result's tensors.
        rule: the rule of the optimizer that loads.
        params: its parameters, in order.
        own_groups: its groups; their `state_format` and `master_weights` stay theirs.

    Returns:
        A state_dict with states and masters as their group asks, on the parameters' devices and in their layouts, each
        inside an `Exact`; a step count for each parameter that has states; and groups with the settings of this
        package.

    Raises:
        TypeError: an entry is of another kind.
        ValueError: entries are missing, have another shape, dtype or no data, hold rates that are not positive or what
            is infinite, were saved by another version, or were made with coupled weight decay.
    """
    checkpoint_layout.check_kinds(state_dict, rule)
    groups = [_convert_group(group) for group in state_dict["param_groups"]]
    for group, own in zip(groups, own_groups, strict=False):  # the base class says where their numbers differ
        group.update((name, own[name]) for name in ("state_format", "master_weights"))
        for name in (*hyperparameters.entries(rule.hyper), *SETTINGS):
            group.setdefault(name, own[name])  # what other classes and older versions do not save
    ids = [(group, i) for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(params):
        return state_dict  # the base class says what does not fit
    checkpoint_layout.check_owners(state_dict, rule)
    states = dict(state_dict["state"])
    owners = [group for group in own_groups for _ in group["params"]]
    for (group, i), param, own in zip(ids, params, owners, strict=True):
        if i in states:
            if "state_version" not in group and (ours := [key for key in (PACKED, BLOCKS, "low") if key in states[i]]):
                raise ValueError(f"state_version: expected {VERSION} beside {ours[0]}, found none in the checkpoint")
            states[i] = _convert_held(f"state of parameter {i}", states[i], group, rule, param, own)
    return {**state_dict, "state": states, "param_groups": groups}


def authors_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The state_dict that the authors' class would have in place of a `VSGD`, whatever format its states are kept in.

    Their class and `VSGD` both load it and go on. What completes 16-bit parameters to masters is not in it.

    Args:
        optimizer: a `VSGD` or `SampleVSGD`; it is not changed, and shares nothing with the result.

    Returns:
        ``state``: for each parameter's number ``mug``, ``bg`` and ``bhg`` (2b_g and 2b_ĝ), of the parameter's shape and
        in the dtype in which they are computed, float32 or float64; and ``step``, ``pa2``, ``pbg2`` and ``pbhg2``,
        0-dimensional float32, for their class counts in place. ``param_groups``: their settings, as numbers.

    Raises:
        TypeError: the optimizer is of another rule.
        ValueError: a setting is one that their class does not have.
    """
    rule = getattr(optimizer, "rule", None)
    if not isinstance(rule, Rule) or rule.states != VSGD.states:
        raise TypeError(f"optimizer must be a vsgd_kernels.VSGD or SampleVSGD, got {type(optimizer).__name__}")
    numbers = itertools.count()
    states, groups = {}, []
    for group in optimizer.param_groups:
        for name, value in (("maximize", False), ("shape_offset", _AUTHORS_SHAPE_OFFSET)):
            if group[name] != value:
                raise ValueError(
                    f"{name} must be {value} for the authors' class, which has no other, got {group[name]!r}"
                )
        settings = {name: float(group[name]) for name in _AUTHORS_SETTINGS}
        ps, ghattg = settings["ps"], settings["ghattg"]
        scalars = {"pa2": 2.0 * ps + 1.0 + _AUTHORS_SHAPE_OFFSET, "pbg2": 2.0 * ps, "pbhg2": 2.0 * ghattg * ps}
        own = {next(numbers): param for param in group["params"]}
        groups.append({**settings, "params": list(own)})
        for i, param in own.items():
            if not (state := optimizer.state.get(param)):
                continue
            scalars["step"] = float(state["step"])
            values = values_of(rule, param, state)
            states[i] = {key: value.clone() for key, value in zip(rule.states, values, strict=True)}
            states[i].update(
                (key, torch.tensor(value, dtype=torch.float32, device="cpu")) for key, value in scalars.items()
            )
    return {"state": states, "param_groups": groups}


def values_of(rule: Rule, param: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """The numbers of a parameter's state in an optimizer, in the rule's order; DTensors where the parameter is one."""
    if not is_traceable_wrapper_subclass(param):
        return state_formats.decoded(state, rule)
    from .sharded_checkpoint import decoded_state  # here, for torch.distributed.tensor takes long to import

    return decoded_state(rule, param, state)


def _convert_group(group: dict[str, Any]) -> dict[str, Any]:
    settings = dict(group)
    version = settings.setdefault("state_version", VERSION)
    if type(version) is not int or version != VERSION:  # True is 1
        raise ValueError(f"state_version: expected {VERSION}, found {version!r} in the checkpoint")
    if "shape_offset" not in group and "ghattg" in group:  # the authors'
        settings["shape_offset"] = _AUTHORS_SHAPE_OFFSET
    if "pa2" in group:  # pytorch_optimizer's
        if not group.get("weight_decouple", True) and group.get("weight_decay"):
            raise ValueError(
                f"weight_decouple=False with weight_decay={group['weight_decay']} in the checkpoint: "
                "only decoupled weight decay is implemented"
            )
        for name in ("pbg2", "pbhg2"):
            if not isinstance(group.get(name), Real):
                raise TypeError(f"{name} in the checkpoint: expected a number, found {group.get(name)!r}")
        if not group["pbg2"] > 0:
            raise ValueError(f"ps={group['pbg2'] / 2.0} in the checkpoint: expected it to be greater than 0")
        settings = {name: value for name, value in group.items() if name not in _FOREIGN_SETTINGS}
        settings["ps"] = group["pbg2"] / 2.0
        settings["ghattg"] = group["pbhg2"] / group["pbg2"]
        settings["shape_offset"] = group.get("shape_offset", _AUTHORS_SHAPE_OFFSET)
    return settings


def _convert_held(
    name: str, state: dict[str, Any], group: dict[str, Any], rule: Rule, param: Tensor, own_group: dict[str, Any]
) -> dict[str, Any]:
    """`_convert_state` of what this process holds."""
    style = state_formats.format_for(own_group["state_format"], param.dtype, param.numel())
    state = narrowed(state)
    if not any(map(is_traceable_wrapper_subclass, (param, *state.values()))):
        return _convert_state(name, state, group, rule, param, style, own_group)
    from . import sharded_checkpoint, sharding  # here, for torch.distributed.tensor takes long to import

    if BLOCKS in state and not any(map(is_traceable_wrapper_subclass, state.values())):  # it will be decoded
        check_states(name, state, rule, param)
        state = dict(row_blocks.resolved(name, rule, param.shape, state))
        check_codes(name, state, rule, param)
    held, own = sharded_checkpoint.held_state(name, rule, param, state), sharding.local(param)
    converted = _convert_state(name, narrowed(held), group, rule, own, style, own_group)
    for key in state_formats.elementwise(rule):
        if key in converted:
            converted[key] = Exact(sharding.like(param, converted[key].tensor))
    return converted


def _convert_state(
    name: str,
    state: Mapping[str, Any],
    group: dict[str, Any],
    rule: Rule,
    param: Tensor,
    style: str,
    own_group: dict[str, Any],
) -> dict[str, Any]:
    if not state:
        return {}  # not stepped yet: it starts from the prior
    step = count(name, state.get("step", group.get("step")))
    keys = state_formats.keys_in(state, rule)
    if step == 0 and not any(key in state for key in keys):
        return {}
    check_states(name, state, rule, param)
    converted: dict[str, Any] = {
        key: Exact(value.detach().clone()) if isinstance(value, Tensor) else value
        for key, value in state.items()  # what somebody else keeps there, as torch's optimizers do
        if key not in (*state_formats.elementwise(rule), BLOCKS, *_FOREIGN_ENTRIES)
    }
    converted["step"] = Exact(torch.tensor(step, dtype=torch.float32, device="cpu"))
    state = row_blocks.resolved(name, rule, param.shape, state)
    saved, blocks = check_codes(name, state, rule, param)
    values = state_formats.decode(rule, saved, blocks)
    if step == 0 and not any(map(torch.any, values)):
        return {}  # as other implementations keep a state before its first step
    for key, value in zip(rule.states, values, strict=True):
        if value.isinf().any():
            raise ValueError(f"{name}: expected {key} to be finite or NaN, found {value[value.isinf()][0].item()}")
        if key in rule.rates and not _all_positive(value):
            raise ValueError(f"{name}: expected {key} to be greater than 0, found {value.min().item()}")
    converted.update(
        (key, Exact(entry)) for key, entry in _in_format(style, rule, param, saved, blocks, values).items()
    )
    if (low := _convert_low(name, state, param, own_group["master_weights"])) is not None:
        converted["low"] = Exact(low)
    return converted


def _in_format(
    style: str, rule: Rule, param: Tensor, saved: list[Tensor], blocks: Tensor | None, values: list[Tensor]
) -> dict[str, Tensor]:
    """The saved states, which stand for `values`, as a parameter keeps them: as they are, or coded anew."""
    states, own_blocks = state_formats.empty(style, rule, param)
    as_saved = style == state_formats.format_of(saved) and (
        blocks is None or all(old.stride() == new.stride() for old, new in zip(saved, states, strict=True))
    )
    if as_saved and style != "fp32":
        for own, old in zip(states, saved, strict=True):
            own.copy_(old)
        if own_blocks is not None and blocks is not None:
            own_blocks.copy_(blocks)
        return state_formats.entries(rule, states, own_blocks)
    here = [torch.empty_like(param, dtype=arithmetic_dtype(param.dtype)).copy_(value) for value in values]
    for key, value in zip(rule.states, here, strict=True):
        tiny, big = BOUNDS[value.dtype]  # float64's may lie beyond float32's range in which the step stays finite
        value.clamp_(*((tiny, big**2) if key in rule.rates else (-big, big)))
    state_formats.encode(rule, here, states, own_blocks, None)
    return state_formats.entries(rule, states, own_blocks)


def _convert_low(name: str, state: Mapping[str, Any], param: Tensor, master_weights: str | None) -> Tensor | None:
    low: Any = state.get("low")
    if "low" in state:
        check_saved(f"{name}: expected low", low, param)
        if (found := low.dtype) not in (dtypes := [dtype for dtype in MASTER_WEIGHTS.values() if dtype]):
            raise ValueError(f"{name}: expected low of {' or '.join(map(str, dtypes))}, found {found}")
    return formats.converted_low(param, low, formats.low_dtype(master_weights, param.dtype))


def _all_positive(rates: Tensor) -> bool:
    # NaN passes: a NaN gradient leaves it in its own element, and resuming is not the moment to object.
    return not bool((rates <= 0).any())


def unwrap(state: Iterable[tuple[Any, dict[str, Any]]]) -> None:
    """Replaces every `Exact` in loaded states by its tensor, in place."""
    for _, entries in state:
        # Whatever stands under a key that is no parameter is somebody else's.
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, Exact):
                entries[key] = value.tensor
