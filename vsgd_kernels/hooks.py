"""What is around `step()`: torch's hooks, and records for who observes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.optim.optimizer import Optimizer

try:
    from torch._C._autograd import (
        _profiler_enabled,
        _record_function_with_args_enter,
        _record_function_with_args_exit,
    )
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError:  # of a torch that calls them otherwise
    _ARE_KNOWN = False
else:
    _ARE_KNOWN = True

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def hooked(func: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """What torch makes of an optimizer's `step`.

    That is called where there are hooks, where a closure might register some, and where a profiler runs. Otherwise the
    step is recorded, under the same name and in the same scope, and there is no more to do.
    """
    with_hooks = Optimizer.profile_hook_step(func)
    if not _ARE_KNOWN:
        return with_hooks

    @wraps(func)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        optimizer = cast(Optimizer, args[0])
        if torch.compiler.is_compiling() or len(args) > 1 or kwargs or _profiler_enabled() or _has_hooks(optimizer):
            return with_hooks(*args, **kwargs)
        record = _record_function_with_args_enter(f"Optimizer.step#{optimizer.__class__.__name__}.step")
        try:
            result = func(*args, **kwargs)
            optimizer._optimizer_step_code()
            return result
        finally:
            _record_function_with_args_exit(record)

    return wrapper


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
