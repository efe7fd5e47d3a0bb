"""The launches of a step, kept for as long as the same tensors are stepped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.seen import Seen, look
from .batch import Batch, Gradients
from .formats import low_dtype
from .hyperparameters import SEEDS, Settings
from .ops import Launch
from .rules import Rule
from .state_formats import BLOCKS, keys_in, stored

ParamGroups = list[dict[str, Any]]
Variances = dict[Tensor, Tensor]


class Part(NamedTuple):
    """What counts of a parameter that is part of another: that one's number of elements, and an own seed's distance."""

    numel: int
    seed: int


class Scope(NamedTuple):
    """What a step is about.

    Attributes:
        param_groups: the optimizer's, or as many that hold fewer or parts of the parameters.
        state: the state of their parameters.
        settings: each group's.
        variances: of the parameters' samples, where the rule takes them.
        place: the first parameter's place among all of the optimizer's.
        parts: those of the parameters that are parts of others.
        alone: what errors call the only parameter, where each of the optimizer's steps by itself.
        grad_scale: gradients are divided by it; float32, 1 element.
        found_inf: where it is not 0, the step changes nothing; float32, 1 element.
        max_norm: gradients are divided by what makes their 2-norm this at most.
    """

    param_groups: ParamGroups
    state: dict[Tensor, dict[str, Any]]
    settings: list[Settings]
    variances: Variances
    place: int = 0
    parts: Mapping[Tensor, Part] = MappingProxyType({})
    alone: str | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_norm: float | None = None


class Operand(NamedTuple):
    """A parameter that has a gradient, what errors call it, and its place among all of the optimizer's."""

    name: str
    param: Tensor
    grad: Tensor
    group: int
    place: int


def operands_of(scope: Scope) -> Iterator[Operand]:
    """The parameters that have a gradient, in order."""
    place = scope.place
    for i, group in enumerate(scope.param_groups):
        for j, param in enumerate(group["params"]):
            if param.grad is not None:
                name = scope.alone or param_name(scope.param_groups, i, j)
                yield Operand(name, param, param.grad, i, place + j)
        place += len(group["params"])


def params_of(param_groups: ParamGroups) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [param for group in param_groups for param in group["params"]]


def param_name(param_groups: ParamGroups, group: int, i: int) -> str:
    """What errors call a parameter."""
    own_name = param_groups[group].get("param_names")
    return f"parameter {i} of group {group}" + (f" ({own_name[i]})" if own_name else "")


class Plan:
    """One launch for each device on which a parameter has a gradient, and there one for all that are capturable.

    A step that finds the same tensors again reuses the plan.

    Args:
        rule: the update rule.
        backend: the constructor's argument.
        scope: what is stepped; every parameter with a gradient must have a state.

    Raises:
        TypeError, ValueError: an operand is not as `Batch` describes it, or a state lacks an entry.
    """

    def __init__(self, rule: Rule, backend: str | None, scope: Scope) -> None:
        state, settings, variances, parts = scope.state, scope.settings, scope.variances, scope.parts
        operands = list(operands_of(scope))
        distances = [parts[op.param].seed if op.param in parts else 0 for op in operands]
        states = [state[op.param] for op in operands]
        with_low = [low_dtype(settings[op.group].master_weights, op.param.dtype) is not None for op in operands]
        for op, own, has_low in zip(operands, states, with_low, strict=True):
            keys = ("step", *keys_in(own, rule), *(("low",) if has_low else ()))
            if missing := [key for key in keys if key not in own]:
                raise ValueError(f"state of {op.name} has no {missing[0]!r}")
        self._settings = settings
        self._hyper = _hyper(settings)
        lrs = {i: setting.lr for i, setting in enumerate(settings) if setting.lr is not None}
        self._launches: list[tuple[Launch, list[int]]] = []
        for capturable, indices in _by_device(operands, settings):
            batch = Batch(
                rule,
                [operands[i].name for i in indices],
                [operands[i].param for i in indices],
                [states[i]["low"] if with_low[i] else None for i in indices],
                [tuple(stored(states[i], rule)) for i in indices],
                [states[i]["step"] for i in indices],
                self._hyper,
                [operands[i].group for i in indices],
                [states[i].get(BLOCKS) for i in indices],
                [(settings[operands[i].group].seed + distances[i]) % SEEDS for i in indices],
                [operands[i].place for i in indices],
                [variances.get(operands[i].param) for i in indices],
                capturable,
                {group: lr for group, lr in lrs.items() if any(operands[i].group == group for i in indices)},
            )
            self._launches.append((Launch(batch, [operands[i].grad for i in indices], backend), indices))
        self._seen = self._see(scope)

    def _see(self, scope: Scope) -> Seen | None:
        """What would have to be found again; None where what is prepared does not serve again."""
        alignment = backends.alignment_of(launch.backend for launch, _ in self._launches)
        if alignment is None:
            return None
        batches = [launch.batch for launch, _ in self._launches]
        moving = [tensor for batch in batches for tensor in batch.moving()]
        seen = Seen(lists_of(scope.param_groups), [scope.state, scope.variances], moving, alignment)
        if not seen.keeps_states:
            for batch in batches:
                batch.let_go()
        return seen

    def unchanged(self, scope: Scope) -> Gradients | None:
        """The step's gradients, if the plan is known to serve for them; it has taken the hyperparameters then."""
        if self._seen is None:
            return None
        same = all(map(is_, scope.settings, self._settings))  # of plain settings there is one object
        if not same and not all(map(Settings.fits, scope.settings, self._settings)):
            return None
        gradients = self._seen.gradients(lists_of(scope.param_groups), [scope.state, scope.variances])
        if gradients is not None and not same and any(map(_rows_differ, scope.settings, self._settings)):
            self._hyper.copy_(_hyper(scope.settings))
            self._settings = scope.settings
        return gradients

    def norm(self, gradients: Gradients) -> Tensor | None:
        """The 2-norm of all gradients together, where one launch can tell."""
        return self._launches[0][0].norm(gradients) if len(self._launches) == 1 else None

    def run(self, gradients: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps every parameter that has a gradient, once."""
        seen, self._seen = self._seen, None  # after an error nothing is known
        for launch, indices in self._launches:
            own = gradients if len(self._launches) == 1 else gradients.some(indices)
            launch.run(own, grad_scale, found_inf)
        self._seen = seen


def gradients_of(param_groups: ParamGroups) -> Gradients:
    """Every parameter's gradient, as far as it has one."""
    return look(lists_of(param_groups))


def lists_of(param_groups: ParamGroups) -> list[list[Tensor]]:
    """The parameters of each group; somebody may have set others than a list."""
    return [group["params"] if type(group["params"]) is list else list(group["params"]) for group in param_groups]


def _rows_differ(settings: Settings, others: Settings) -> bool:
    return settings.row != others.row


def _hyper(settings: list[Settings]) -> Tensor:
    return torch.tensor([setting.row for setting in settings], dtype=torch.float64, device="cpu")


def _by_device(operands: list[Operand], settings: list[Settings]) -> list[tuple[bool, list[int]]]:
    """The operands that a launch can hold together: whether they are capturable, and which they are."""
    launches: dict[tuple[bool, torch.device], list[int]] = {}
    for i, op in enumerate(operands):
        launches.setdefault((settings[op.group].capturable, op.param.device), []).append(i)
    return [(capturable, indices) for (capturable, _), indices in launches.items()]
