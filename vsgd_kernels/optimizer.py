"""Everything the optimizers share: groups, state, one launch a device, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import backends, checkpoint, formats, hyperparameters, state_formats
from .backends.device import capturing
from .batch import check_dtype, check_grad, check_param, step_device
from .plan import Plan, gradients_of, operands_of, param_name
from .rules import Rule, arithmetic_dtype
from .samples import Samples


def arguments_of(constructor: dict[str, Any]) -> dict[str, Any]:
    """A class's arguments by name, from its constructor's `locals()`."""
    return {name: value for name, value in constructor.items() if name not in ("self", "__class__")}


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that steps all its parameters with one launch a device; its classes set `rule`."""

    rule: ClassVar[Rule]
    # GradScaler then leaves unscaling and the skipping of overflowed steps to step().
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, backend: str | None, **settings: Any) -> None:
        """A class passes on its arguments, all others being settings of a parameter group."""
        masters = settings["master_weights"]
        defaults = {**settings, "state_version": checkpoint.VERSION}
        if masters is formats.DEFAULT_MASTER_WEIGHTS:
            defaults["master_weights"] = str(masters)
        hyperparameters.settings(self.rule.hyper, defaults)
        backends.requested(backend)  # refuses an unknown or absent one now rather than at the first step
        self._backend = backend
        self._plan: Plan | None = None
        self._captured: list[Plan] = []  # whose tables CUDA graphs read
        self._samples: dict[Tensor, Samples] = {}  # of each parameter, for a rule that takes them
        super().__init__(params, defaults)
        if masters is not formats.DEFAULT_MASTER_WEIGHTS:
            _check_master_weights(masters, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own where it names them; see `Optimizer.add_param_group`."""
        # A group that was taken from an optimizer names every setting, and asks for none.
        asks_for_masters = "master_weights" in param_group and "state_version" not in param_group
        super().add_param_group(param_group)
        try:
            hyperparameters.settings(self.rule.hyper, self.param_groups[-1])
            if asks_for_masters:
                _check_master_weights(param_group["master_weights"], self.param_groups[-1:])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                check_dtype(param_name(self.param_groups, len(self.param_groups) - 1, i), param)
        except BaseException:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # A compiled program calls it as it is, at the price of one graph break.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, if it was given.

        Raises:
            TypeError, ValueError: a parameter, gradient, state or setting cannot be used; nothing is written then.
            RuntimeError: a CUDA graph is being captured, and a group is not capturable or a parameter has no state yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        settings = [hyperparameters.settings(self.rule.hyper, group) for group in self.param_groups]
        gradients = gradients_of(self.param_groups)
        if not gradients.tensors:
            return
        if capturing():
            self._check_capture(settings)
        variances = {param: samples.variance for param, samples in self._samples.items()}
        if self._plan is None or not self._plan.serves(self.param_groups, gradients, self.state, settings, variances):
            self._plan = None  # lets go of what it holds even where the next cannot be made
            self._plan = self._make_plan(settings, variances)
        self._plan.run(gradients, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        if capturing():
            # The graph's replays read the plan's tables: from now on they are the graph's alone.
            self._captured.append(self._plan)
            self._plan = None

    def _check_capture(self, settings: list[hyperparameters.Settings]) -> None:
        for op in operands_of(self.param_groups):
            if not settings[op.group].capturable:
                raise RuntimeError(
                    f"a CUDA graph is being captured, and group {op.group} has capturable=False: its scalars are "
                    "computed on the host; construct the optimizer with capturable=True"
                )
            if not self.state.get(op.param):
                raise RuntimeError(
                    f"a CUDA graph is being captured, and {op.name} has no state yet: replays would make it anew each "
                    "time; take a step before the capture"
                )

    def _make_plan(self, settings: list[hyperparameters.Settings], variances: dict[Tensor, Tensor]) -> Plan:
        """Checks every operand, gives a state to parameters that step for the first time, and prepares the launches."""
        operands = list(operands_of(self.param_groups))
        for op in operands:
            check_param(op.name, op.param)
            check_grad(op.name, op.param, op.grad)
        fresh = [op.param for op in operands if not self.state.get(op.param)]
        try:
            for op in operands:
                self._init_state(op.param, settings[op.group])
            return Plan(self.rule, self._backend, self.param_groups, self.state, settings, variances)
        except BaseException:
            for param in fresh:
                self.state.pop(param, None)
            raise

    def _init_state(self, param: Tensor, settings: hyperparameters.Settings) -> None:
        """Gives a parameter the state that it lacks: all at its first step, what its group's settings change later."""
        state = self.state[param]
        device = step_device(param, settings.capturable)
        style = state_formats.format_for(settings.state_format, param)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            initial = self.rule.initial(settings.row, arithmetic_dtype(param.dtype))
            state.update(state_formats.initial(style, self.rule, param, initial))
        elif self._is_in_another_format(state, param, style):
            converted = state_formats.converted(style, self.rule, param, state)
            state.pop(state_formats.BLOCKS, None)
            state.update(converted)
        self._init_low(state, param, formats.low_dtype(settings.master_weights, param.dtype))
        if isinstance(step := state.get("step"), Tensor) and step.device != device:
            state["step"] = step.to(device)  # it was loaded, or the group has become capturable

    def _init_low(self, state: dict[str, Any], param: Tensor, dtype: torch.dtype | None) -> None:
        """Gives a parameter the `low` of its group's setting; one that does not fit is left for the checks."""
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

    def _is_in_another_format(self, state: dict[str, Any], param: Tensor, style: str) -> bool:
        """Whether a group's format has changed; a state that does not fit its parameter is left for the checks."""
        states = [own for key in self.rule.states if isinstance(own := state.get(key), Tensor)]
        if len(states) < len(self.rule.states) or any(own.shape != param.shape for own in states):
            return False
        return state_formats.format_of(states) != style

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of the authors' class or of pytorch_optimizer's.

        States are restored exactly where they were saved in the format of this optimizer's groups, whatever the
        parameters' dtype; those of another format are decoded, and rounded to nearest. The same holds of what completes
        16-bit parameters to masters, where `master_weights` is another.

        Args:
            state_dict: what `state_dict` returned; it is not changed.

        Raises:
            TypeError, ValueError: it does not fit the parameters; nothing is written then.
        """

        def convert(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            params = list(chain.from_iterable(group["params"] for group in self.param_groups))
            converted = checkpoint.convert(loaded, self.rule, params, self.param_groups)
            for group in converted["param_groups"]:
                hyperparameters.settings(self.rule.hyper, {**self.defaults, **group, "params": []})
            return converted

        # Registered now, it runs after every other hook, which may change the dict.
        handle = self.register_load_state_dict_pre_hook(convert)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        return {**super().__getstate__(), "_backend": self._backend, "_samples": self._samples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept, or takes what `load_state_dict` loaded."""
        checkpoint.unwrap(state["state"].items())
        super().__setstate__(state)
        self._plan = None
        self._captured = []
        self._samples = state.get("_samples", {})
        for group in self.param_groups:
            for name in (*hyperparameters.entries(self.rule.hyper), *checkpoint.SETTINGS):
                group.setdefault(name, self.defaults[name])


def _check_master_weights(value: str | None, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where somebody asks for masters that no parameter can have."""
    dtypes = {param.dtype for group in groups for param in group["params"]}
    if not any(map(formats.is_16_bit, dtypes)):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"master_weights={value!r} is for bfloat16 and float16 parameters, got none but {found}; leave it out"
        )
