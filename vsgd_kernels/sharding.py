"""Parameters that are DTensors (FSDP2, tensor parallelism), as the plain tensors that this process holds of them.

Every rule is elementwise, so each process steps its own part, and nothing is sent. In the optimizer's state a
parameter's entries are DTensors of its placements, which distributed checkpoints bring to another world size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .plan import Part, Scope, params_of


def local(value: Any) -> Any:
    """What this process holds of a DTensor; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    held = value._local_tensor
    return held.wait() if isinstance(held, AsyncCollectiveTensor) else held


def like(param: Tensor, held: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """What this process holds, as a DTensor of the placements of `param`, and of its shape if not of another."""
    if not isinstance(param, DTensor):
        return held
    whole = param if shape is None else torch.empty(shape, device="meta")
    return DTensor.from_local(
        held, param.device_mesh, param.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def is_of_rows(param: DTensor) -> bool:
    """Whether each process holds some rows of the parameter, one after the other in memory."""
    rows = all(p.is_replicate() or (type(p) is Shard and p.dim == 0) for p in param.placements)
    return rows and param.dim() > 0 and local(param).is_contiguous()


def first_element(param: DTensor) -> int:
    """The number of the first element that this process holds, in the order of a contiguous parameter."""
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return sum(start * stride for start, stride in zip(offset, param.stride(), strict=True))


class LocalView:
    """An optimizer's parameter groups and state, with what this process holds in place of each DTensor.

    The tensor that stands for a parameter is the same from step to step, so that a plan made for it serves again. It
    shares the memory and the version of the parameter's local tensor.
    """

    def __init__(self) -> None:
        self._held: dict[DTensor, tuple[Tensor, Tensor]] = {}  # the local tensor, and what stands for it
        self._state: dict[Tensor, dict[str, Any]] = {}

    def take(self, scope: Scope) -> Scope:
        """The same, of what this process holds; gradients are there until `drop`.

        Raises:
            TypeError: a DTensor's gradient is none.
        """
        params = params_of(scope.param_groups)
        self._held = {param: self._hold(param) for param in params if isinstance(param, DTensor)}
        for param, (_, own) in self._held.items():
            own.grad = local_grad(param)
        self._state = {self._own(p): _local_state(p, scope.state[p]) for p in params if scope.state.get(p)}
        return scope._replace(
            param_groups=[{**group, "params": list(map(self._own, group["params"]))} for group in scope.param_groups],
            state=self._state,
            variances={self._own(param): local(variance) for param, variance in scope.variances.items()},
            parts={own: Part(param.numel(), first_element(param)) for param, (_, own) in self._held.items()},
        )

    def give_back(self, state: dict[Tensor, dict[str, Any]], elementwise: tuple[str, ...]) -> None:
        """Writes to the optimizer's state what this process's has and it has not, and counts the parameters' versions.

        Args:
            state: the optimizer's.
            elementwise: the entries that become DTensors.
        """
        parts = {own for _, own in self._held.values()}
        for param, (_, own) in self._held.items():
            if own not in self._state:
                continue
            old, new = state.setdefault(param, {}), self._state[own]
            for key in old.keys() - new.keys():
                del old[key]
            for key, value in new.items():
                if local(old.get(key)) is not value:
                    old[key] = like(param, value) if key in elementwise else value
        state.update((own, entries) for own, entries in self._state.items() if own not in parts)
        torch.autograd.graph.increment_version([param for param in self._held if param.grad is not None])

    def drop(self) -> None:
        """Lets go of gradients and states."""
        for _, own in self._held.values():
            own.grad = None
        self._state = {}

    def _own(self, param: Tensor) -> Tensor:
        return self._held[param][1] if isinstance(param, DTensor) else param

    def _hold(self, param: DTensor) -> tuple[Tensor, Tensor]:
        held = local(param)
        old = self._held.get(param)
        return old if old is not None and old[0] is held else (held, held.detach())


def _local_state(param: Tensor, entries: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state, with what this process holds of it."""
    return {key: local(value) for key, value in entries.items()} if isinstance(param, DTensor) else entries


def local_grad(param: DTensor) -> Tensor | None:
    """What this process holds of a DTensor's gradient, or None where there is none.

    Raises:
        TypeError: the gradient is no DTensor.
    """
    grad = param.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor):
        raise TypeError(f"the gradient of a DTensor must be a DTensor, got {type(grad).__name__}, {tuple(grad.shape)}")
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    own: Tensor = local(grad)
    return own
