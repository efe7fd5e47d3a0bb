"""Clipping by the norm of all gradients: they are read once more, and not rewritten, for the kernels divide them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .formats import is_16_bit
from .ops import check_scalar
from .rules import widest
from .state_formats import is_dense

#: Added to the norm, by `torch.nn.utils.clip_grad_norm_` too.
EPS = 1e-6
#: On the CPU torch adds a tensor's squares up one after the other, in one thread: over 2^25 elements of float32 that
#: loses 0.2 % of the norm. Rows of this length lose nothing to speak of, and are added up by all threads.
_ROW = 1024
#: On the CPU torch copies 16-bit tensors to add up in float32; so many elements at a time.
_PIECE = 2**20


def clip(norm: Tensor, max_norm: float, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a step must divide gradients by, and the norm that this is for; nothing waits for a device.

    Args:
        norm: the 2-norm of all gradients, 0-dimensional.
        max_norm: in the step it is this at most, up to roundings.
        grad_scale: gradients are this many times what they stand for; float32, 1 element.

    Returns:
        The divisor, float32 and 0-dimensional: `grad_scale`, but more where the norm is too large; and the norm over
        `grad_scale`.

    Raises:
        TypeError: `grad_scale` is not as the step's.
    """
    check_scalar("grad_scale", grad_scale)
    scale = None if grad_scale is None else grad_scale.to(norm).reshape(())
    norm = norm if scale is None else norm / scale
    # NaN stays; where the norm is infinite finite gradients count as 0, but where the bound is too nothing is clipped.
    is_bound = max_norm <= torch.finfo(norm.dtype).max
    excess = ((norm + EPS) / max_norm).clamp(min=1.0) if is_bound else torch.ones_like(norm)
    return (excess if scale is None else excess * scale).to(torch.float32), norm


def global_norm(params: Iterable[Tensor]) -> Tensor:
    """The 2-norm of the gradients of all parameters together, over all processes that share DTensors.

    Gradients that cannot be stepped are left out: the step's checks refuse them.

    Returns:
        0-dimensional; float32, or where a gradient is so float64.

    Raises:
        TypeError: the gradient of a DTensor is none.
    """
    stepped = [(param, param.grad) for param in params if param.grad is not None]
    shared = [param for param, _ in stepped if _is_wrapper(param)]
    norms = _norms([grad for param, grad in stepped if _has_memory(param) and _has_memory(grad)])
    return _together([*norms, *(_norms_of_dtensors(shared) if shared else ())])


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not _is_wrapper(tensor)


def _is_wrapper(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor or type(tensor) is Parameter  # as most are, which is sooner seen
    return not plain and is_traceable_wrapper_subclass(tensor)


def _norms_of_dtensors(params: list[Tensor]) -> list[Tensor]:
    """One norm for all DTensors that are shared alike, with one message for each dimension of the mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # here, for it takes long to import

    from .sharding import local_grad

    alike: dict[object, tuple[DTensor, list[Tensor]]] = {}
    for param in params:
        if isinstance(param, DTensor) and (grad := local_grad(param)) is not None:
            key = (param.device_mesh, *(placement.is_replicate() for placement in param.placements))
            alike.setdefault(key, (param, []))[1].append(grad)
    norms = []
    for param, grads in alike.values():
        # The processes' norms are the elements of a vector, and its norm is that of all.
        placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in param.placements]
        own = _together(_norms(grads)).reshape(1)
        norms.append(vector_norm(DTensor.from_local(own, param.device_mesh, placements, run_check=False)).full_tensor())
    return norms


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms whose norm is that of the tensors: one for each that is large, and one for all small ones of a kind."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    norms: list[Tensor] = []
    pieces: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() > _ROW and tensor.device.type == "cpu" and is_dense(tensor):
            flat = tensor.as_strided((tensor.numel(),), (1,))
            pieces += torch.split(flat, _PIECE) if is_16_bit(tensor.dtype) else [flat]
        else:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for piece in pieces:
        whole = piece.numel() // _ROW * _ROW
        norms.append(vector_norm(vector_norm(piece[:whole].view(-1, _ROW), dim=1, dtype=_dtype(piece))))
        if whole < piece.numel():
            kinds.setdefault((piece.device, piece.dtype), []).append(piece[whole:])
    norms += [_norm_of(torch._foreach_norm(some, 2.0, _dtype(some[0]))) for some in kinds.values()]
    return norms


def _dtype(tensor: Tensor) -> torch.dtype:
    """What is added up in."""
    return torch.float32 if is_16_bit(tensor.dtype) else tensor.dtype


def _together(norms: list[Tensor]) -> Tensor:
    """The norm of some norms."""
    if not norms:
        return torch.zeros((), device="cpu")
    dtype = widest(norm.dtype for norm in norms)
    return _norm_of([norm.to(norms[0].device, dtype) for norm in norms])


def _norm_of(norms: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The norm of some norms of one dtype, on one device."""
    norm: Tensor = vector_norm(torch.stack(norms))
    return norm
