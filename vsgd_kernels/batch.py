"""The tensors that a step changes on one device, and what must hold of them and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import state_formats
from .formats import MASTER_WEIGHTS, is_16_bit
from .noise import tensor_key
from .rules import Rule, arithmetic_dtype

#: The dtypes of parameters and gradients; ``csrc/chunks.h`` refers to them by index.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Gradients(NamedTuple):
    """The gradients of one step, or samples of them.

    Attributes:
        tensors: the gradients; empty where they are laid out like those that a launch was prepared with, and no more
            than their addresses is asked for.
        addresses: [tensors] int64 on the CPU, where they are.
        layouts: equal to that of an earlier step, and not None, where nothing has changed but the gradients' addresses:
            which parameters have one; devices, dtypes, shapes and strides of both; where the parameters are.
    """

    tensors: list[Tensor]
    addresses: Tensor
    layouts: Any = None

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Gradients:
        """Gradients that are dense and have memory."""
        return cls(tensors, torch.tensor(list(map(Tensor.data_ptr, tensors)), dtype=torch.int64, device="cpu"))

    def some(self, indices: list[int]) -> Gradients:
        """Those at the indices."""
        return Gradients([self.tensors[i] for i in indices] if self.tensors else [], self.addresses[indices])


@dataclass
class Batch:
    """What a step changes, and by which rule. The gradients come with each step, so that nothing keeps them alive.

    Attributes:
        rule: the update rule.
        names: what errors call each parameter.
        params: parameters, any layout without overlap, of `DTYPES`, all on one device.
        lows: for each 16-bit parameter its `low` (see formats.py), None where it has none; same shape and device.
        states: for each parameter its states in the rule's order, or the one tensor that holds them, in a format of
            state_formats.py; same shape and device.
        steps: for each parameter the number of steps it has taken, float32 and 0-dimensional; on the CPU, or on the
            parameters' device where `capturable`.
        hyper: [groups, hyperparameters] float64 on the CPU, columns as in `Rule.hyper`.
        groups: for each parameter its row of `hyper`.
        blocks: for each parameter whose format has blocks their words, None for the others.
        seeds: for each parameter that of its group.
        places: for each parameter its number in its optimizer; with the seed, what its random bits are made from.
        variances: for each parameter, where the rule takes samples, their variance about the gradient, in the dtype
            that is computed in, of its shape and device; else None.
        capturable: whether a step must not wait for the device, so that a CUDA graph can be made of it.
        lrs: for rows of `hyper` whose learning rate is read on the device, where `capturable`, that tensor.
    """

    rule: Rule
    names: Sequence[str]
    params: list[Tensor]
    lows: list[Tensor | None]
    states: list[tuple[Tensor, ...]]
    steps: list[Tensor]
    hyper: Tensor
    groups: list[int]
    blocks: list[Tensor | None]
    seeds: list[int]
    places: list[int]
    variances: list[Tensor | None]
    capturable: bool = False
    lrs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> list[int]:
        """For each parameter what its states are rounded by."""
        return list(map(tensor_key, self.seeds, self.places))

    def moving(self) -> list[Tensor]:
        """What a step reads and writes beside parameters and gradients."""
        sometimes = (tensor for tensor in (*self.lows, *self.blocks, *self.variances) if tensor is not None)
        return [*chain.from_iterable(self.states), *self.steps, *sometimes]

    def let_go(self) -> None:
        """Forgets them: whoever drops a state has its memory back."""
        self.lows, self.states, self.steps, self.blocks, self.variances = [], [], [], [], []

    def read_hyper(self) -> Tensor:
        """`hyper` with the learning rates of `lrs` in it; waits for their device."""
        for group, lr in self.lrs.items():
            self.hyper[group, self.rule.hyper.index("lr")] = lr.item()
        return self.hyper

    def check(self, grads: list[Tensor]) -> None:
        """Raises TypeError or ValueError, naming tensor and value, where an operand is not as described above.

        Gradients must have their parameters' shapes, dtypes and device; their strides are free.
        """
        width = len(self.rule.hyper)
        if (
            self.hyper.dtype != torch.float64
            or self.hyper.dim() != 2
            or self.hyper.shape[1] != width
            or not self.hyper.is_contiguous()
            or self.hyper.device.type != "cpu"
        ):
            raise ValueError(
                f"hyper must be float64 with {width} columns, contiguous and on the CPU, got {self.hyper.dtype}, "
                f"{tuple(self.hyper.shape)}, strides {self.hyper.stride()}, {self.hyper.device}"
            )
        if wrong := [group for group in self.groups if not 0 <= group < len(self.hyper)]:
            raise ValueError(f"groups must be rows of hyper, 0 to {len(self.hyper) - 1}, got {wrong[0]}")
        for name, param, grad in zip(self.names, self.params, grads, strict=True):
            check_param(name, param)
            check_grad(name, param, grad)
        check_once(self.names, self.params)
        columns = zip(
            self.names, self.params, self.lows, self.states, self.blocks, self.steps, self.variances, strict=True
        )
        for name, param, low, states, blocks, step, variance in columns:
            if self.rule.samples:
                _check_like(f"the variance of the samples of {name}", variance, param, arithmetic_dtype(param.dtype))
            if low is not None:
                _check_low(f"state 'low' of {name}", low, param)
            check_states(name, self.rule, states, blocks, param)
            if not isinstance(step, Tensor):
                raise TypeError(f"state 'step' of {name} must be a tensor, got {step!r}")
            device = step_device(param, self.capturable)
            if step.dtype != torch.float32 or step.dim() != 0 or step.device != device:
                raise TypeError(
                    f"state 'step' of {name} must be a 0-dimensional float32 tensor on {device}, "
                    f"got {step.dim()} dimensions, {step.dtype}, {step.device}"
                )


class SampleBatch(NamedTuple):
    """What samples are added to; all on one device, and in memory without gaps.

    Attributes:
        names: what errors call each parameter's samples.
        means: of the samples so far, in the dtype that is computed in.
        variances: theirs about the means, of the same dtype, shape and strides.
    """

    names: Sequence[str]
    means: list[Tensor]
    variances: list[Tensor]


def step_device(param: Tensor, capturable: bool) -> torch.device:
    """Where a parameter's step count is kept."""
    return param.device if capturable else torch.device("cpu")


def check_param(name: str, param: Tensor) -> None:
    """Raises TypeError or ValueError where a parameter cannot be stepped."""
    check_dtype(name, param)
    if param.device.type == "meta":
        raise ValueError(f"{name} has no data: its device is meta; give it data (Module.to_empty) before step()")
    _check_written(name, param, param, param.dtype)


def check_once(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Raises ValueError where a parameter is there twice: two programs would write to it at a time."""
    seen: dict[Tensor, str] = {}
    for name, param in zip(names, params, strict=True):
        if (first := seen.setdefault(param, name)) is not name:
            raise ValueError(f"{name} is {first} once more; a step may have each parameter once")


def check_states(name: str, rule: Rule, states: Sequence[Tensor], blocks: Tensor | None, param: Tensor) -> None:
    """Raises TypeError or ValueError where states, or the blocks of their format, do not fit their parameter."""
    style = state_formats.format_of(states)
    if param.dtype == torch.float64 and style != "fp32":
        raise TypeError(f"states of {name} must be torch.float64 for a parameter of float64, got format {style!r}")
    for key, state in zip(state_formats.keys(style, rule), states, strict=True):
        dtype = state_formats.state_dtype(style, key, rule, param.dtype)
        _check_written(f"state {key!r} of {name}", state, param, dtype)
        if style != "fp32" and not (state_formats.is_dense(state) and state.stride() == states[0].stride()):
            raise ValueError(
                f"states of {name} in format {style!r} must be dense and all of the same strides, "
                f"got {state.stride()} for {key!r} of shape {tuple(state.shape)}"
            )
    if not state_formats.has_blocks(style):
        return
    if not isinstance(blocks, Tensor):
        raise TypeError(f"state {state_formats.BLOCKS!r} of {name} must be a tensor, got {blocks!r}")
    shape = state_formats.blocks_shape(rule, param.numel())
    if blocks.dtype != torch.int32 or blocks.shape != shape or not blocks.is_contiguous():
        raise ValueError(
            f"state {state_formats.BLOCKS!r} of {name} must be contiguous, torch.int32 and of shape {shape}, "
            f"got {blocks.dtype}, {tuple(blocks.shape)}, strides {blocks.stride()}"
        )
    if blocks.device != param.device:
        raise ValueError(
            f"state {state_formats.BLOCKS!r} of {name} must be on the parameter's device {param.device}, "
            f"got {blocks.device}"
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError where a parameter is not dense and of a supported dtype."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"{name} must have one of the dtypes {expected}, got {tensor.dtype}")


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises TypeError or ValueError where a gradient does not fit its parameter."""
    if grad.layout != torch.strided:
        raise TypeError(f"the gradient of {name} must be dense, got layout {grad.layout}")
    _check_like(f"the gradient of {name}", grad, param, param.dtype)


def _check_low(name: str, low: Tensor, param: Tensor) -> None:
    dtypes = [dtype for dtype in MASTER_WEIGHTS.values() if dtype]
    if not is_16_bit(param.dtype):
        raise TypeError(f"{name} is for parameters of 16 bits, got one for {param.dtype}")
    own = low.dtype if isinstance(low, Tensor) and low.dtype in dtypes else dtypes[0]
    _check_written(name, low, param, own)


def _check_like(name: str, tensor: Tensor | None, param: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {tensor!r}")
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"{name} must hold its own memory, got a wrapper of other tensors, {type(tensor).__name__}")
    if tensor.is_neg():
        raise TypeError(f"{name} must hold its own values, got a view that negates its memory: resolve_neg() it first")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for a parameter of {param.dtype}, got {tensor.dtype}")
    if tensor.shape != param.shape:
        raise ValueError(f"{name} must have the parameter's shape {tuple(param.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != param.device:
        raise ValueError(f"{name} must be on the parameter's device {param.device}, got {tensor.device}")


def _check_written(name: str, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    _check_like(name, tensor, param, dtype)
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if shared and tensor.numel():
        raise ValueError(
            f"{name} is written to, but several of its elements share memory (shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}); clone() it first"
        )
