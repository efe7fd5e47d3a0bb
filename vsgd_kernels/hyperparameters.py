"""What a hyperparameter may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

_Limit = tuple[str, Callable[[float], bool]]
_NOT_NEGATIVE: _Limit = ("at least 0 and finite", lambda x: 0.0 <= x < math.inf)
_POSITIVE: _Limit = ("greater than 0 and finite", lambda x: 0.0 < x < math.inf)
_EXPONENT: _Limit = ("in (0, 1]", lambda x: 0.0 < x <= 1.0)

_LIMITS: dict[str, _Limit] = {
    "lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "shape_offset": _NOT_NEGATIVE,
    "ghattg": _POSITIVE,
    "ps": _POSITIVE,
    "tau1": _EXPONENT,
    "tau2": _EXPONENT,
}


def row(names: Iterable[str], group: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of a parameter group, in the order of `names`, as a row of the hyper table.

    Raises:
        KeyError: one is missing.
        TypeError: one is not a number, or `maximize` not a bool.
        ValueError: one is out of its range; the message has its name and value.
    """
    return tuple(_value(name, group[name]) for name in names)


def _value(name: str, value: Any) -> float:
    if name == "maximize":
        if not isinstance(value, bool):
            raise TypeError(f"maximize must be a bool, got {value!r}")
        return float(value)
    if isinstance(value, Tensor) and name == "lr":
        if value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"lr must be a real number, got {value!r}")
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    words, holds = _LIMITS[name]
    if not holds(float(value)):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return float(value)
