"""Everything the optimizers share: groups, state, one launch a device, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import backends, checkpoint, hyperparameters, ops
from .batch import Batch, check_dtype, check_grad, check_param
from .rules import Rule, arithmetic_dtype


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that steps all its parameters with one launch a device; its classes set `rule`."""

    rule: ClassVar[Rule]
    # GradScaler then leaves unscaling and the skipping of overflowed steps to step().
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        hyperparameters.row(self.rule.hyper, defaults)
        backends.requested(backend)  # refuses an unknown or absent one now rather than at the first step
        self._backend = backend
        self._plan: _Plan | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own where it names them; see `Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        try:
            hyperparameters.row(self.rule.hyper, self.param_groups[-1])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                check_dtype(_name(self.param_groups, len(self.param_groups) - 1, i), param)
        except BaseException:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, if it was given.

        Raises:
            TypeError, ValueError: a parameter, gradient, state or setting cannot be used; nothing is written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        operands = _Operands(self.param_groups)
        if not operands.params:
            return loss
        rows = [hyperparameters.row(self.rule.hyper, group) for group in self.param_groups]
        states = list(map(self.state.get, operands.params))
        if not all(states):
            self._init_state(operands, rows)
            states = list(map(self.state.get, operands.params))
        if self._plan is None or not self._plan.follows(operands, states, rows):
            self._plan = _Plan(self, operands, states, rows)
        for launch in self._plan.launches:
            launch.run(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _init_state(self, operands: _Operands, rows: list[tuple[float, ...]]) -> None:
        """Gives a state to every parameter that steps for the first time."""
        names = operands.names(self.param_groups)
        for name, param, grad in zip(names, operands.params, operands.grads, strict=True):
            check_param(name, param)
            check_grad(name, param, grad)
        for param, group in zip(operands.params, operands.groups, strict=True):
            if not self.state[param]:
                initial = self.rule.initial(rows[group], arithmetic_dtype(param.dtype))
                self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                for key, value in zip(self.rule.states, initial, strict=True):
                    self.state[param][key] = checkpoint.like_param(param).fill_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of the authors' class or of pytorch_optimizer's.

        States are restored exactly, in the dtype they are computed in, whatever the parameters' dtype.

        Args:
            state_dict: what `state_dict` returned; it is not changed.

        Raises:
            ValueError: it does not fit the parameters; nothing is written then.
        """

        def convert(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            params = list(chain.from_iterable(group["params"] for group in self.param_groups))
            converted = checkpoint.convert(loaded, self.rule, params)
            for group in converted["param_groups"]:
                hyperparameters.row(self.rule.hyper, {**self.defaults, **group})
            return converted

        # Registered now, it runs after every other hook, which may change the dict.
        handle = self.register_load_state_dict_pre_hook(convert)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept, or takes what `load_state_dict` loaded."""
        checkpoint.unwrap(state["state"].items())
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


class _Operands:
    """The parameters that have a gradient, in order."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.groups: list[int] = []
        for i, group in enumerate(param_groups):
            for param in group["params"]:
                if (grad := param.grad) is not None:
                    self.params.append(param)
                    self.grads.append(grad)
                    self.groups.append(i)

    def names(self, param_groups: list[dict[str, Any]]) -> list[str]:
        """What errors call them."""
        return [
            _name(param_groups, i, j)
            for i, group in enumerate(param_groups)
            for j, param in enumerate(group["params"])
            if param.grad is not None
        ]


class _Plan:
    """The launches of a step, and what they were prepared for.

    A step that finds the same tensors again reuses them. Everything by which a tensor can have changed is compared: which
    it is, its address, its strides and its size. Identities are safe to compare, for the batches hold the tensors.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        operands: _Operands,
        states: list[dict[str, Any]],
        rows: list[tuple[float, ...]],
    ) -> None:
        self._rows = rows
        self._hyper = torch.tensor(rows, dtype=torch.float64)
        rule, names = optimizer.rule, operands.names(optimizer.param_groups)
        devices: dict[torch.device, list[int]] = {}
        for i, param in enumerate(operands.params):
            devices.setdefault(param.device, []).append(i)
        self._indices = list(devices.values())
        batches = [
            Batch(
                rule,
                [names[i] for i in indices],
                [operands.params[i] for i in indices],
                [operands.grads[i] for i in indices],
                [tuple(states[i][key] for key in rule.states) for i in indices],
                [states[i]["step"] for i in indices],
                self._hyper,
                [operands.groups[i] for i in indices],
            )
            for indices in self._indices
        ]
        self.launches = [ops.Launch(batch, optimizer._backend) for batch in batches]
        self._fixed, self._grad_addresses = self._fingerprint(operands, states)

    def follows(self, operands: _Operands, states: list[dict[str, Any]], rows: list[tuple[float, ...]]) -> bool:
        """Whether the launches serve these operands too, after taking their gradients and hyperparameters."""
        fixed, grad_addresses = self._fingerprint(operands, states)
        if fixed != self._fixed or len(rows) != len(self._rows):
            return False
        if grad_addresses != self._grad_addresses:
            self._grad_addresses = grad_addresses
            for launch, indices in zip(self.launches, self._indices, strict=True):
                launch.set_grads([operands.grads[i] for i in indices])
        if rows != self._rows:
            self._rows = rows
            self._hyper.copy_(torch.tensor(rows, dtype=torch.float64))
        return True

    @staticmethod
    def _fingerprint(operands: _Operands, states: list[dict[str, Any]]) -> tuple[list[list[Any]], list[int]]:
        """What must be equal for the launches to serve, and the gradients' addresses."""
        params, grads = operands.params, operands.grads
        kept = list(chain.from_iterable(map(dict.values, states)))
        fixed: list[list[Any]] = [operands.groups]
        fixed += (list(map(f, tensors)) for tensors in (params, kept) for f in (id, Tensor.data_ptr))
        fixed += (list(map(f, tensors)) for tensors in (params, grads) for f in (Tensor.stride, Tensor.numel))
        fixed += [[grad.dtype for grad in grads], [grad.device for grad in grads]]
        return fixed, list(map(Tensor.data_ptr, grads))


def _name(param_groups: list[dict[str, Any]], group: int, i: int) -> str:
    """What errors call a parameter."""
    own_name = param_groups[group].get("param_names")
    return f"parameter {i} of group {group}" + (f" ({own_name[i]})" if own_name else "")
