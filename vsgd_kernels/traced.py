"""A step inside of a program that torch.compile traces: one op, which calls the optimizer when the program runs.

So the program holds no state and no setting. A scheduler that changes the learning rate leads to no recompilation, and
what is cached from step to step (stepper.py) serves compiled programs too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .plan import params_of

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_OPTIMIZERS: WeakValueDictionary[int, FusedOptimizer] = WeakValueDictionary()
_numbers = itertools.count()


def number_of(optimizer: FusedOptimizer) -> int:
    """A number by which a compiled program knows an optimizer."""
    number = next(_numbers)
    _OPTIMIZERS[number] = optimizer
    return number


def step(params: list[Tensor], number: int, has_samples: bool) -> None:
    """Steps an optimizer; called while a program is traced.

    Args:
        params: all of its parameters.
        number: its number.
        has_samples: whether it steps parameters without a gradient too, which have been fed samples.
    """
    places = [i for i, param in enumerate(params) if param.grad is not None]
    stepped = list(range(len(params))) if has_samples else places
    if stepped:
        torch.ops.vsgd_kernels.step_optimizer(
            [params[i] for i in stepped], stepped, [params[i].grad for i in places], places, number
        )


# The host has work in each step: under mode="reduce-overhead" it stays outside of the CUDA graphs that are made.
@torch.library.custom_op("vsgd_kernels::step_optimizer", mutates_args=("params",), tags=(torch.Tag.cudagraph_unsafe,))
def _step_optimizer(
    params: list[Tensor], stepped: list[int], grads: list[Tensor], places: list[int], optimizer: int
) -> None:
    """One step of a living optimizer.

    Args:
        params: those of its parameters that may be stepped.
        stepped: their places among all of its parameters.
        grads: the gradients.
        places: those of the parameters that have one.
        optimizer: its number.
    """
    own = _OPTIMIZERS[optimizer]
    every = params_of(own.param_groups)
    if list(map(id, every)) != list(map(id, own._params)):
        raise RuntimeError(
            "param_groups hold other parameters than they did when the program was compiled, and were not changed by "
            "add_param_group; call torch.compiler.reset()"
        )
    with _gradients(every, {places[i]: grad for i, grad in enumerate(grads)}), torch.no_grad():
        own._step()
    for param, place in zip(params, stepped, strict=True):
        if param.data_ptr() != every[place].data_ptr():  # the program works on a copy, which it will write back
            param.copy_(every[place])


@_step_optimizer.register_fake
def _(*args: object) -> None:
    return None


@contextmanager
def _gradients(params: list[Tensor], grads: dict[int, Tensor]) -> Iterator[None]:
    """Gives parameters these gradients and the others none, for a time: a program sets `grad` only at its end.

    What is taken from them meanwhile, as SampleVSGD takes what it was fed, they have no more.
    """
    before = [param.grad for param in params]
    try:
        for i, param in enumerate(params):
            param.grad = grads.get(i)
        yield
    finally:
        for i, (param, grad) in enumerate(zip(params, before, strict=True)):
            param.grad = None if i in grads and param.grad is None else grad
