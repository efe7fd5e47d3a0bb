"""The registered op: schema, fake implementation and checks, once, in front of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, state_formats
from .backends.library import increment_versions
from .batch import Batch, Gradients
from .formats import is_16_bit
from .hyperparameters import check_seed
from .rules import RULES, Rule, arithmetic_dtype, widest


class Launch:
    """A batch that has been checked, and a backend prepared for it; it runs as often as the same tensors are stepped.

    Raises:
        TypeError, ValueError: an operand is not as `Batch` describes it, or the backend does not fit the device.
    """

    def __init__(self, batch: Batch, grads: list[Tensor], backend: str | None = None) -> None:
        batch.check(grads)
        self.batch = batch
        self.backend = backends.choose(backend, batch.params[0].device)
        self._prepared = self.backend.prepare(batch, grads)
        self._device = batch.params[0].device
        self._waits = self._device.type == "cpu"  # whose kernels read scalars at once
        self._widest = widest(arithmetic_dtype(param.dtype) for param in batch.params)

    def norm(self, grads: Gradients) -> Tensor | None:
        """The norm of all gradients, of the widest dtype that one is computed in; None if torch is to find it."""
        norm = self.backend.norm(self._prepared, grads)
        if norm is None:
            return None
        return torch.tensor(norm, dtype=self._widest, device="cpu")

    def run(self, grads: Gradients, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Steps the batch once, with gradients of the shapes, dtypes and strides of those it was made with.

        Their addresses must be as far off the backend's `alignment`; `check_scalars` must have passed grad_scale and
        found_inf.
        """
        self.backend.run(self._prepared, grads, self._here(grad_scale), self._here(found_inf))
        if self._waits and found_inf is not None and found_inf.item():
            return  # nothing was written
        # Without this, a backward through a graph recorded before the step would use the new values in silence.
        increment_versions(self.batch.params)

    def _here(self, scalar: Tensor | None) -> Tensor | None:
        return None if scalar is None else scalar.to(self._device, non_blocking=not self._waits)


def check_scalars(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Raises TypeError where one is not as `step` describes it."""
    check_scalar("grad_scale", grad_scale)
    check_scalar("found_inf", found_inf)


def check_scalar(name: str, scalar: Tensor | None) -> None:
    """Raises TypeError where it is not as `step` describes it."""
    if scalar is None:
        return
    if not isinstance(scalar, Tensor):
        raise TypeError(f"{name} must be a tensor, got {scalar!r}")
    if scalar.dtype != torch.float32 or scalar.numel() != 1:
        raise TypeError(f"{name} must be float32 of 1 element, got {scalar.dtype}, {tuple(scalar.shape)}")


@torch.library.custom_op("vsgd_kernels::step", mutates_args=("params", "lows", "states", "steps", "blocks"))
def step(
    params: list[Tensor],
    grads: list[Tensor],
    lows: list[Tensor],
    states: list[Tensor],
    blocks: list[Tensor],
    steps: list[Tensor],
    hyper: Tensor,
    groups: list[int],
    rule: str,
    backend: str | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    capturable: bool = False,
    seed: int = 0,
    without_low: list[int] | None = None,
) -> None:
    """One step of an update rule on a list of tensors, in place.

    For programs that are traced and for callers with tensors of their own. The optimizers call `Launch`, of which this
    op consists, themselves and keep it from step to step: passing the lists of a thousand tensors through the
    dispatcher costs more than stepping them.

    Args:
        params: parameters, all on one device; see `Batch`, also for the next six.
        grads: gradients; for a rule that takes samples, after the last of them the variances of each one's samples.
        lows: those of the 16-bit parameters, int16 or int8.
        states: states, those of the first parameter first, in any format of `state_formats`.
        blocks: those of the parameters whose states are in a format with blocks.
        steps: step counts.
        hyper: hyperparameters, a row a group.
        groups: each parameter's row of `hyper`.
        rule: a name in `RULES`.
        backend: a name in `backends.BACKENDS`, or None for the choice described there.
        grad_scale: gradients are divided by it; float32, 1 element.
        found_inf: where it is not 0, the step changes nothing; float32, 1 element.
        capturable: whether the step counts are on the parameters' device.
        seed: of what is random; a parameter's place in `params` counts too.
        without_low: places in `params` of 16-bit parameters that have no `low`; None where all have.

    Raises:
        TypeError, ValueError, RuntimeError: as `Launch` and `backends.choose`; nothing is written then.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if not params:
        return
    check_scalars(grad_scale, found_inf)
    check_seed(seed)
    names = [f"params[{i}]" for i in range(len(params))]
    n = len(params)
    for i in without_low or ():
        if not 0 <= i < n or not is_16_bit(params[i].dtype):
            raise ValueError(f"without_low must hold places of 16-bit parameters in params, 0 to {n - 1}, got {i}")
    has_low = [is_16_bit(param.dtype) and i not in (without_low or ()) for i, param in enumerate(params)]
    groups_of_states = _by_parameter(states, RULES[rule])
    lengths = [len(operand) for operand in (grads, lows, groups_of_states, steps, groups)]
    read = 2 * n if RULES[rule].samples else n
    if lengths != [read, sum(has_low), n, n, n]:
        raise ValueError(
            f"grads, lows, states, steps and groups must have {read}, {sum(has_low)}, those of {n} parameters, {n} and "
            f"{n} entries for these params, got {lengths}"
        )
    coded = [state_formats.has_blocks(state_formats.format_of(own)) for own in groups_of_states]
    if len(blocks) != sum(coded):
        raise ValueError(f"blocks must have {sum(coded)} entries for these states, got {len(blocks)}")
    low, block = iter(lows), iter(blocks)
    batch = Batch(
        RULES[rule],
        names,
        params,
        [next(low) if has else None for has in has_low],
        groups_of_states,
        steps,
        hyper,
        groups,
        [next(block) if is_coded else None for is_coded in coded],
        [seed] * n,
        list(range(n)),
        [*grads[n:]] or [None] * n,
        capturable,
    )
    Launch(batch, grads[:n], backend).run(Gradients.of(grads[:n]), grad_scale, found_inf)


def _by_parameter(states: list[Tensor], rule: Rule) -> list[tuple[Tensor, ...]]:
    """The states of each parameter, of which packed16 has one."""
    own, first = [], 0
    packed = state_formats.state_dtype("packed16", state_formats.PACKED, rule, torch.float32)
    while first < len(states):
        end = first + (1 if states[first].dtype == packed else len(rule.states))
        if end > len(states):
            raise ValueError(
                f"states must have {len(rule.states)} entries for each parameter, or one of {packed}, "
                f"got {len(states)}, of which {len(states) - first} are left over"
            )
        own.append(tuple(states[first:end]))
        first = end
    return own


@step.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None
