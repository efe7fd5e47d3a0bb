"""What a hyperparameter may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from .formats import DEFAULT_MASTER_WEIGHTS, MASTER_WEIGHTS
from .state_formats import FORMATS

#: How many seeds there are.
SEEDS = 2**63

_Limit = tuple[str, Callable[[float], bool]]
#: From here on a float32 is infinite, and times 0 would be NaN.
_INFINITE = 2.0**128 - 2.0**103
#: A learning rate from here to 0 counts as 0.
_ROUNDED_ZERO = -1e-9
_NOT_NEGATIVE: _Limit = ("at least 0 and finite", lambda x: 0.0 <= x < math.inf)
_FACTOR: _Limit = ("at least 0 and finite in float32", lambda x: 0.0 <= x < _INFINITE)
_POSITIVE: _Limit = ("greater than 0 and finite", lambda x: 0.0 < x < math.inf)
_TO_ONE: _Limit = ("in (0, 1]", lambda x: 0.0 < x <= 1.0)
_BELOW_ONE: _Limit = ("in [0, 1)", lambda x: 0.0 <= x < 1.0)

_LIMITS: dict[str, _Limit] = {
    "maximize": ("0 or 1", lambda x: x in (0.0, 1.0)),
    "lr": _FACTOR,
    "weight_decay": _FACTOR,
    "eps": _NOT_NEGATIVE,
    "shape_offset": _NOT_NEGATIVE,
    "ghattg": _POSITIVE,
    "ps": _POSITIVE,
    "tau": _TO_ONE,
    "tau1": _TO_ONE,
    "tau2": _TO_ONE,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "decay": _TO_ONE,
    "sampling_rate": _TO_ONE,
    "max_grad_norm": ("greater than 0", lambda x: x > 0.0),
}
#: Hyperparameters that are one of a pair in a parameter group.
_PAIRS = {"beta1": ("betas", 0), "beta2": ("betas", 1)}


class Settings(NamedTuple):
    """What a parameter group says of a step.

    Attributes:
        row: its row of the hyper table; 0 stands for a learning rate that the step reads on the device.
        capturable: whether the step leaves the host out of it.
        lr: the learning rate that is read on the device, or None.
        state_format: a name in `state_formats.FORMATS`.
        seed: of the stochastic rounding.
        master_weights: a key of `formats.MASTER_WEIGHTS`.
    """

    row: tuple[float, ...]
    capturable: bool
    lr: Tensor | None
    state_format: str
    seed: int
    master_weights: str | None

    def fits(self, other: Settings) -> bool:
        """Whether they differ in `row` only."""
        return self.lr is other.lr and self[1:2] + self[3:] == other[1:2] + other[3:]


#: What is equal to another of its type only where it is the same, and never changes.
_PLAIN = frozenset((float, bool, str, int, type(None)))


def settings(names: tuple[str, ...], group: Mapping[str, Any]) -> Settings:
    """The settings of a parameter group, with `row` in the order of `names`.

    Raises:
        TypeError, ValueError: as `row`; or another setting is not what it should be.
    """
    try:
        values = _values(names)(group)
    except KeyError:
        return _settings(names, group)
    if _PLAIN.issuperset(map(type, values)):  # each step asks, and to check all again takes twice as long
        return _settings_of_plain(names, *values)
    return _settings(names, group)


@lru_cache
def _values(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    return itemgetter(*_keys(names))


@lru_cache
def _keys(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*entries(names), "capturable", "state_format", "seed", "master_weights")


@lru_cache(maxsize=4096, typed=True)
def _settings_of_plain(names: tuple[str, ...], *values: Any) -> Settings:
    return _settings(names, dict(zip(_keys(names), values, strict=True)))


def _settings(names: tuple[str, ...], group: Mapping[str, Any]) -> Settings:
    capturable, lr = group.get("capturable", False), group.get("lr")
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be a bool, got {capturable!r}")
    state_format, seed = group.get("state_format", "fp32"), group.get("seed", 0)
    if state_format not in tuple(FORMATS):  # a list, say, is no key
        raise ValueError(f"state_format must be one of {', '.join(map(repr, FORMATS))}, got {state_format!r}")
    if (masters := group.get("master_weights", DEFAULT_MASTER_WEIGHTS)) not in tuple(MASTER_WEIGHTS):
        expected = ", ".join(map(repr, MASTER_WEIGHTS))
        raise ValueError(f"master_weights must be one of {expected}, got {masters!r}")
    check_seed(seed)
    # A number, and a tensor on the CPU beside parameters elsewhere, is read by the host.
    params_device = next((param.device for param in group.get("params", ())), None)
    if capturable and isinstance(lr, Tensor) and lr.numel() == 1 and lr.device == params_device:
        return Settings(row(names, {**group, "lr": 0.0}), capturable, lr, state_format, seed, masters)
    return Settings(row(names, group), capturable, None, state_format, seed, masters)


def check_seed(seed: Any) -> None:
    """Raises TypeError or ValueError where it is not a whole number below `SEEDS`."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be at least 0 and below 2^63, got {seed!r}")


def number(name: str, value: Any) -> float:
    """A setting that is no parameter group's.

    Raises:
        TypeError, ValueError: it is not a number, or out of its range; the message has its name and value.
    """
    return _checked_row((name,), _number(name, value))[0]


def row(names: tuple[str, ...], group: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of a parameter group, in the order of `names`, as a row of the hyper table.

    Raises:
        TypeError: one is not a number, or `maximize` not a bool.
        ValueError: one is missing or out of its range; the message has its name and value.
    """
    if missing := [entry for entry in entries(names) if entry not in group]:
        raise ValueError(f"{missing[0]} is missing from a parameter group")
    return _checked_row(names, *(_number(_title(name), _value(name, group)) for name in names))


@lru_cache
def entries(names: tuple[str, ...]) -> tuple[str, ...]:
    """The entries of a parameter group in which hyperparameters stand."""
    return tuple(dict.fromkeys(_PAIRS[name][0] if name in _PAIRS else name for name in names))


def _title(name: str) -> str:
    return "{}[{}]".format(*_PAIRS[name]) if name in _PAIRS else name


def _value(name: str, group: Mapping[str, Any]) -> Any:
    if name not in _PAIRS:
        return group[name]
    entry, i = _PAIRS[name]
    pair = group[entry]
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{entry} must be a pair of numbers, got {pair!r}")
    return pair[i]


def _number(name: str, value: Any) -> Any:
    """The number in a tensor of one element; a number as it is."""
    if type(value) is float and name != "maximize":
        return value  # nearly all are, and to ask Tensor and Real about each takes a fifth of a small step
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got {value!r}")
        if value.device.type == "meta":
            raise ValueError(f"{name} has no value: its device is meta")
        value = value.item()
    if name == "maximize":
        if not isinstance(value, bool):
            raise TypeError(f"maximize must be a bool, got {value!r}")
    elif not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    return value


@lru_cache(maxsize=4096)
def _checked_row(names: tuple[str, ...], *values: Any) -> tuple[float, ...]:
    row = tuple(map(_float, names, values))
    for name, number, value in zip(names, row, values, strict=True):
        words, holds = _LIMITS[name]
        if not holds(number):
            raise ValueError(f"{_title(name)} must be {words}, got {value!r}")
    own = dict(zip(names, row, strict=True))
    if own.get("lr", 0.0) * own.get("weight_decay", 0.0) >= _INFINITE:
        raise ValueError(f"weight_decay times lr must be finite in float32, got {own['weight_decay']} and {own['lr']}")
    return row


def _float(name: str, value: Any) -> float:
    try:
        number = float(value) + 0.0  # of -0 that makes 0, for the caches take the one for the other
    except OverflowError:  # an integer beyond float64 is as good as infinite
        return math.inf
    # LinearLR, on its way to 0, ends some roundings below.
    return 0.0 if name == "lr" and _ROUNDED_ZERO < number < 0.0 else number
