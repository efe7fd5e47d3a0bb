"""Everything the optimizers share: groups, state, one launch a device, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends, checkpoint, formats, hyperparameters, release, traced
from .batch import check_dtype
from .hooks import hooked
from .plan import Scope, param_name, params_of
from .rules import Rule
from .stepper import Stepper

_NO_VARIANCES: dict[Tensor, Tensor] = {}
#: What a closure returns: a number, or a tensor.
Loss = TypeVar("Loss")


def arguments_of(constructor: dict[str, Any]) -> dict[str, Any]:
    """A class's arguments by name, from its constructor's `locals()`."""
    return {name: value for name, value in constructor.items() if name not in ("self", "__class__")}


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that steps all its parameters with one launch a device; its classes set `rule`."""

    rule: ClassVar[Rule]
    # GradScaler then leaves unscaling and the skipping of overflowed steps to step().
    _step_supports_amp_scaling = True
    #: The 2-norm of the last step's gradients, before they were clipped; 0-dimensional. None without `max_grad_norm`.
    grad_norm: Tensor | None = None
    _max_grad_norm: float | None = None
    _gradient_release = False
    _release: release.Release | None = None

    def __init__(
        self, params: ParamsT, backend: str | None, max_grad_norm: float | None, gradient_release: bool, **settings: Any
    ) -> None:
        """A class passes on its arguments, all others being settings of a parameter group."""
        masters = settings["master_weights"]
        defaults = {**settings, "state_version": checkpoint.VERSION}
        if masters is formats.DEFAULT_MASTER_WEIGHTS:
            defaults["master_weights"] = str(masters)
        hyperparameters.settings(self.rule.hyper, defaults)
        backends.requested(backend)  # refuses an unknown or absent one now rather than at the first step
        self.max_grad_norm = max_grad_norm
        release.check(self.rule, gradient_release, self.max_grad_norm)
        self._backend = backend
        self._prepare()
        super().__init__(params, defaults)
        if masters is not formats.DEFAULT_MASTER_WEIGHTS:
            _check_master_weights(masters, self.param_groups)
        self._gradient_release = gradient_release
        self._find_params()

    def _prepare(self) -> None:
        """Sets what is neither copied nor saved with the optimizer."""
        self._stepper = Stepper(self.rule, self._backend)
        if "_number" not in self.__dict__:
            self._number = traced.number_of(self)

    @property
    def max_grad_norm(self) -> float | None:
        """The constructor's argument; it can be changed between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        norm = None if value is None else hyperparameters.number("max_grad_norm", value)
        release.check(self.rule, self._gradient_release, norm)
        self._max_grad_norm = norm

    def _find_params(self) -> None:
        """Takes note of the parameters that the groups hold now."""
        # A compiled program reads these: what it reads of param_groups, it would be compiled for.
        self._params = params_of(self.param_groups)
        if self._release is not None:
            self._release.find_params(self)
        elif self._gradient_release:
            self._release = release.Release(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own where it names them; see `Optimizer.add_param_group`."""
        given = set(param_group) if isinstance(param_group, dict) else set()  # the base class refuses anything else
        super().add_param_group(param_group)
        try:
            hyperparameters.settings(self.rule.hyper, self.param_groups[-1])
            # A group that was taken from an optimizer names every setting, and asks for none.
            if "master_weights" in given and "state_version" not in given:
                _check_master_weights(param_group["master_weights"], self.param_groups[-1:])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                if param.requires_grad:  # what is frozen may be anything, as quantised weights are; step() checks again
                    check_dtype(param_name(self.param_groups, len(self.param_groups) - 1, i), param)
            self._find_params()
        except BaseException:
            self.param_groups.pop()
            self._find_params()
            raise

    #: What the base class wraps the `step` of every class in.
    profile_hook_step = staticmethod(hooked)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Performs one step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, if it was given.

        Raises:
            TypeError, ValueError: a parameter, gradient, state or setting cannot be used; nothing is written then.
            RuntimeError: a CUDA graph is being captured, and a group is not capturable, or a parameter has no state yet
                that is as the group's settings ask.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            with torch.no_grad():
                traced.step(self._params, self._number, self.rule.samples)
            return loss
        grad_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # no_grad takes five times as long, a tenth of a small step
            self._step()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    # Schedulers wrap step() in a function that compiled programs cannot enter, unless this says that one has done so.
    # All that their function does is to set _opt_called.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step(self) -> None:
        """What `step` does when it is not traced; without its hooks."""
        self._opt_called = True
        if self._release is not None:
            self._release.check_step(self)
        norm = self._stepper.step(self._scope())
        if self._max_grad_norm is not None:
            self.grad_norm = norm

    def _scope(self) -> Scope:
        return Scope(
            self.param_groups,
            self.state,
            [hyperparameters.settings(self.rule.hyper, group) for group in self.param_groups],
            self._variances(),
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            max_norm=self._max_grad_norm,
        )

    def _variances(self) -> dict[Tensor, Tensor]:
        """Of each parameter's samples, for a rule that takes them; the same dict as long as nothing changes."""
        return _NO_VARIANCES

    def accumulate_gradients(self) -> AbstractContextManager[None]:
        """A context in which backward leaves gradients summed up in `.grad`, as it does without `gradient_release`.

        For all backward passes of a step but the last, which steps with the sum. Without `gradient_release` it changes
        nothing.

        Example:
            >>> with optimizer.accumulate_gradients():
            ...     for micro_batch in batch[:-1]:
            ...         loss(model, micro_batch).backward()
            >>> loss(model, batch[-1]).backward()  # steps
            >>> optimizer.step()
        """
        return nullcontext() if self._release is None else self._release.keeping()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients; see `Optimizer.zero_grad`."""
        if not torch.compiler.is_compiling():
            super().zero_grad(set_to_none)
            return
        for param in self._params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`. What belongs to a DTensor can be loaded however many processes share it."""
        saved = super().state_dict()
        params = params_of(self.param_groups)
        if any(map(is_traceable_wrapper_subclass, params)):
            from .sharded_checkpoint import saved_state  # here, for torch.distributed.tensor takes long to import

            own = dict(zip(params_of(saved["param_groups"]), params, strict=True))  # numbers stand there for parameters
            saved["state"] = {
                i: saved_state(self.rule, own[i], state) if i in own else state for i, state in saved["state"].items()
            }
        return saved

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
            converted = checkpoint.convert(loaded, self.rule, params_of(self.param_groups), self.param_groups)
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
        own = {name: getattr(self, name) for name in ("_backend", "_max_grad_norm", "_gradient_release")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept, or takes what `load_state_dict` loaded."""
        checkpoint.unwrap(state["state"].items())
        super().__setstate__(state)
        self._prepare()
        self._find_params()
        for group in self.param_groups:
            for name in (*hyperparameters.entries(self.rule.hyper), *checkpoint.SETTINGS):
                group.setdefault(name, self.defaults[name])


def _check_master_weights(value: str | None, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where somebody asks for masters that no parameter can have."""
    dtypes = {param.dtype for param in params_of(groups)}
    if not any(map(formats.is_16_bit, dtypes)):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"master_weights={value!r} is for bfloat16 and float16 parameters, got none but {found}; leave it out"
        )
