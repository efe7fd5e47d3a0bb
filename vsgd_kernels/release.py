"""Gradient release: each parameter steps as soon as its gradient is accumulated in backward, which is freed then."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from . import graphs, hyperparameters
from .plan import Scope, param_name
from .rules import Rule
from .stepper import Stepper

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def check(rule: Rule, gradient_release: bool, max_grad_norm: float | None) -> None:
    """Raises TypeError or ValueError where gradients cannot be released."""
    if not isinstance(gradient_release, bool):
        raise TypeError(f"gradient_release must be a bool, got {gradient_release!r}")
    if not gradient_release:
        return
    if rule.samples:
        raise ValueError("gradient_release=True: a rule that takes samples needs their gradients until step()")
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={max_grad_norm} with gradient_release=True: gradients are stepped before the norm of all "
            "is known; leave one of them out"
        )


class _Spot(NamedTuple):
    """Where a parameter stands in its optimizer, and what steps it."""

    group: int
    number: int
    place: int
    stepper: Stepper


class Release:
    """The hooks of an optimizer's parameters.

    They are gone when the optimizer is: parameters know it by weak references.

    Args:
        optimizer: has its groups.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._spots: dict[Tensor, _Spot] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._released: set[Tensor] = set()  # since the last step()
        self._keeping = 0
        weakref.finalize(self, _remove, self._handles).atexit = False
        self.find_params(optimizer)

    def find_params(self, optimizer: FusedOptimizer) -> None:
        """Finds out where each of an optimizer's parameters stands now, and hooks those, and no others."""
        old, self._spots = self._spots, {}
        own = weakref.ref(self)
        places = itertools.count()
        for i, group in enumerate(optimizer.param_groups):
            for j, param in enumerate(group["params"]):
                if is_lazy(param):
                    name = param_name(optimizer.param_groups, i, j)
                    raise ValueError(
                        f"{name} has no shape yet, {type(param).__name__}, which gradient_release=True cannot hook; "
                        "run the model once before"
                    )
                place, before = next(places), old.get(param)
                # What a stepper has prepared is for one place.
                stays = before is not None and before.place == place
                stepper = before.stepper if before and stays else Stepper(optimizer.rule, optimizer._backend)
                self._spots[param] = _Spot(i, j, place, stepper)
                if param not in self._handles:
                    self._handles[param] = _hook(param, own)
        for param in self._handles.keys() - self._spots.keys():
            self._handles.pop(param).remove()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """For a time, gradients are kept and summed up."""
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1

    @torch.no_grad()
    def accumulated(self, param: Tensor) -> None:
        """Steps a parameter whose gradient is complete, and frees the gradient."""
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        if self._keeping:
            self._released.discard(param)
            return
        if graphs.capturing():
            raise RuntimeError("a CUDA graph is being captured: gradient_release=True steps in backward, outside of it")
        spot = self._spot(optimizer, param)
        if spot is None:
            return
        groups = optimizer.param_groups
        group = groups[spot.group]
        own = optimizer.state.get(param) or None
        scope = Scope(
            [{**group, "params": [param]}],
            {} if own is None else {param: own},
            [hyperparameters.settings(optimizer.rule.hyper, group)],
            {},
            spot.place,
            alone=param_name(groups, spot.group, spot.number),
        )
        spot.stepper.step(scope)
        if own is None and param in scope.state:
            optimizer.state[param] = scope.state[param]
        param.grad = None
        self._released.add(param)

    def _spot(self, optimizer: FusedOptimizer, param: Tensor) -> _Spot | None:
        """Where a parameter stands now; None where it was taken out of the groups."""
        spot = self._spots.get(param)
        if spot is not None and _is_at(optimizer, spot, param):
            return spot
        self.find_params(optimizer)  # somebody has changed the lists
        return self._spots.get(param)

    def check_step(self, optimizer: FusedOptimizer) -> None:
        """Raises RuntimeError where step() finds what cannot be right.

        So it is under GradScaler, which has seen no gradient; and where a parameter was stepped in backward and has a
        gradient all the same, as with DistributedDataParallel, which averages gradients later.
        """
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "gradient_release=True does not work with GradScaler: parameters have been stepped with scaled "
                "gradients, which it has not seen"
            )
        released, self._released = self._released, set()
        for param in released:
            if param.grad is not None and (spot := self._spots.get(param)) is not None:
                name = param_name(optimizer.param_groups, spot.group, spot.number)
                raise RuntimeError(
                    f"{name} was stepped in backward and has been given a gradient since, as DistributedDataParallel "
                    "does; that does not work with gradient_release=True"
                )


def _is_at(optimizer: FusedOptimizer, spot: _Spot, param: Tensor) -> bool:
    lists = [group["params"] for group in optimizer.param_groups[: spot.group + 1]]
    if len(lists) <= spot.group or len(lists[-1]) <= spot.number:
        return False
    return lists[-1][spot.number] is param and sum(map(len, lists[:-1])) + spot.number == spot.place


def _hook(param: Tensor, release: weakref.ref[Release]) -> RemovableHandle:
    # Where a compiled function calls backward, torch would compile this too.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def accumulated(param: Tensor) -> None:
        if (own := release()) is not None:
            own.accumulated(param)

    needed = param.requires_grad
    try:
        param.requires_grad_(True)  # torch hooks no frozen parameter, which may thaw
        handle: RemovableHandle = param.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
    finally:
        param.requires_grad_(needed)
    return handle


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
