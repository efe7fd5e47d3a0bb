"""The way from what an optimizer holds to the launches of its step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import graphs, parameter_state
from .backends.seen import identities
from .batch import Gradients, check_grad, check_param
from .clipping import clip, global_norm
from .ops import check_scalars
from .plan import Plan, Scope, gradients_of, operands_of, params_of
from .rules import Rule
from .state_formats import elementwise

if TYPE_CHECKING:
    from .sharding import LocalView


class Stepper:
    """Steps some of an optimizer's parameters, and keeps what it has prepared for the next time.

    Args:
        rule: the update rule.
        backend: the constructor's argument.
    """

    def __init__(self, rule: Rule, backend: str | None) -> None:
        self._rule = rule
        self._backend = backend
        self._plan: Plan | None = None
        # By CUDA graphs; and the states that these step.
        self._captured: list[tuple[Plan, list[dict[Any, Any]]]] = []
        self._view: LocalView | None = None

    @property
    def has_captured(self) -> bool:
        """Whether a CUDA graph has been made of a step, so that replays read what it read."""
        return bool(self._captured)

    def step(self, scope: Scope) -> Tensor | None:
        """Steps every parameter that has a gradient.

        Args:
            scope: what is stepped; parameters that step for the first time are given a state.

        Returns:
            The 2-norm of all gradients before they were clipped, 0-dimensional, if there is a `max_norm`.

        Raises:
            TypeError, ValueError, RuntimeError: as `FusedOptimizer.step`; nothing is written then.
        """
        if (unchanged := self._unchanged(scope)) is not None:
            return self._run(scope, unchanged, _check(scope))
        gradients = gradients_of(scope.param_groups)
        params = params_of(scope.param_groups)
        # DTensors have no memory, hence no layouts, and asking a thousand parameters what they are would cost too much.
        if gradients.layouts is not None or not any(map(is_traceable_wrapper_subclass, params)):
            return self._step(scope, gradients)
        norm = None
        if scope.max_norm is not None:
            divisor, norm = clip(global_norm(params), scope.max_norm, scope.grad_scale)
            scope = scope._replace(grad_scale=divisor, max_norm=None)
        if self._view is None:
            from .sharding import LocalView  # here, for torch.distributed.tensor takes a second to import

            self._view = LocalView()
        try:
            local = self._view.take(scope)
            if (unchanged := self._unchanged(local)) is not None:
                self._run(local, unchanged, _check(local))
            else:
                self._step(local, gradients_of(local.param_groups))
            self._view.give_back(scope.state, elementwise(self._rule))
        finally:
            self._view.drop()
        return norm

    def _unchanged(self, scope: Scope) -> Gradients | None:
        """The gradients, where the plan is known to serve."""
        return None if self._plan is None else self._plan.unchanged(scope)

    def _step(self, scope: Scope, gradients: Gradients) -> Tensor | None:
        if gradients.tensors:
            capturing = _check(scope)  # of no gradients GradScaler's found_inf is the int 0
            self._plan = None  # lets go of what it holds even where the next cannot be made
            self._plan = self._prepare(scope, capturing)
            if self._plan is not None:
                return self._run(scope, gradients, capturing)
        return None if scope.max_norm is None else global_norm(params_of(scope.param_groups))

    def _run(self, scope: Scope, gradients: Gradients, capturing: bool) -> Tensor | None:
        plan, grad_scale, norm = cast(Plan, self._plan), scope.grad_scale, None
        if scope.max_norm is not None:
            norm = plan.norm(gradients)
            norm = global_norm(params_of(scope.param_groups)) if norm is None else norm
            grad_scale, norm = clip(norm, scope.max_norm, grad_scale)
        plan.run(gradients, grad_scale, scope.found_inf)
        if capturing:
            # The graph's replays read the plan's tables, and step what these tell of: both are the graph's from now on.
            self._captured.append((plan, [*map(dict, scope.state.values()), dict(scope.variances)]))
            self._plan = None
        return norm

    def _prepare(self, scope: Scope, capturing: bool) -> Plan | None:
        """Checks every operand, gives a state to parameters that step for the first time, and prepares the launches.

        None where the step is that by which torch.distributed.checkpoint has states made: it changes nothing. None too
        where tensors are fake, as where a program's memory is estimated: they have states now, and no values.
        """
        operands = list(operands_of(scope))
        for op in operands:
            check_param(op.name, op.param)
            check_grad(op.name, op.param, op.grad)
        before = {op.param: dict(scope.state.get(op.param, {})) for op in operands}
        try:
            for op in operands:
                own = scope.state.setdefault(op.param, {})
                numel = scope.parts[op.param].numel if op.param in scope.parts else op.param.numel()
                parameter_state.complete(own, self._rule, op.param, numel, scope.settings[op.group])
                if capturing and identities([own]) != identities([before[op.param]]):
                    raise RuntimeError(
                        f"a CUDA graph is being captured, and the state of {op.name} is not yet as its group's "
                        "settings (state_format, master_weights, capturable) ask: replays would change it each time; "
                        "take a step before the capture"
                    )
            if any(isinstance(op.param, FakeTensor) for op in operands):
                return None
            with torch.inference_mode(False):  # outside, what was made inside could not be written to
                plan = Plan(self._rule, self._backend, scope)
        except BaseException:
            for param, entries in before.items():
                _put_back(scope.state, param, entries)
            raise
        is_first = not any(before.values()) and scope.alone is None
        return None if is_first and _only_makes_states(scope) else plan


def _put_back(state: dict[Tensor, dict[str, Any]], param: Tensor, entries: dict[str, Any]) -> None:
    """A parameter's state as it was, in the same dict."""
    if not entries:
        state.pop(param, None)
    elif param in state:
        state[param].clear()
        state[param].update(entries)


def _only_makes_states(scope: Scope) -> bool:
    """Whether every learning rate and every gradient is 0."""
    operands = list(operands_of(scope))
    rates = {op.group: float(scope.param_groups[op.group]["lr"]) for op in operands}
    return not any(rates.values()) and not any(bool(torch.any(op.grad)) for op in operands)


def _check(scope: Scope) -> bool:
    """Whether a CUDA graph is being captured; raises where the step cannot be taken, or captured."""
    check_scalars(scope.grad_scale, scope.found_inf)
    if capturing := graphs.capturing():
        check_capture(scope)
    return capturing


def check_capture(scope: Scope) -> None:
    """Raises RuntimeError where replays of a graph of the step would not do the same again."""
    for op in operands_of(scope):
        if not scope.settings[op.group].capturable:
            raise RuntimeError(
                f"a CUDA graph is being captured, and group {op.group} has capturable=False: its scalars are "
                "computed on the host; construct the optimizer with capturable=True"
            )
        if not scope.state.get(op.param):
            raise RuntimeError(
                f"a CUDA graph is being captured, and {op.name} has no state yet: replays would make it anew each "
                "time; take a step before the capture"
            )
