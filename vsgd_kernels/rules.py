"""What a rule is: its states, its hyperparameters, and the scalars of one step.

The per-element equations of a rule stand in ``reference.py`` (torch) and ``csrc/rules.h`` (C++), under the same names.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


class Bounds(NamedTuple):
    """What keeps the arithmetic of one dtype finite (``csrc/numbers.h`` has the same table).

    Gradients beyond ``big`` count as it, since the rates hold squares, which must stay finite. Rates and variances
    below ``tiny`` count as it, since they are divided by.
    """

    tiny: float
    big: float


BOUNDS = {torch.float32: Bounds(2.0**-100, 2.0**60), torch.float64: Bounds(2.0**-1000, 2.0**508)}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parameters of `dtype` are computed, and in which their state is kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of the most bytes."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest number of an arithmetic dtype."""
    return number if dtype == torch.float64 else ctypes.c_float(number).value


def prior_rate(rate: float, dtype: torch.dtype) -> float:
    """A prior rate, within what the arithmetic dtype can hold."""
    return min(max(rate, BOUNDS[dtype].tiny), BOUNDS[dtype].big ** 2)


#: The hyperparameters with which every rule's begin.
COMMON_HYPER = ("lr", "weight_decay", "eps", "maximize")


def common_scalars(t: float, lr: float, weight_decay: float, eps: float, maximize: float) -> dict[str, float]:
    """The scalars with which every rule's end."""
    return {
        "lr": lr,
        "decay": 1.0 - lr * weight_decay,
        "eps": eps,
        "t": float(t),
        "sign": -1.0 if maximize else 1.0,
    }


def kept_share(t: float, tau: float, dtype: torch.dtype) -> float:
    """How much of a rate is left in step t: 1 - rho, rounded to the arithmetic dtype.

    What is new has the weight of 1 minus that, so that a rate whose gradients stay as they are does not drift.
    """
    return rounded(1.0 - t**-tau, dtype)


class VsgdScalars(NamedTuple):
    """The scalars of one VSGD step, in double; rates are doubled, as the authors store them."""

    inv_a: float
    kept1: float
    kept2: float
    rho1: float
    rho2: float
    prior1: float
    prior2: float
    lr: float
    decay: float
    eps: float
    t: float
    sign: float


def vsgd_prior(hyper: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
    """The prior rates."""
    _, _, _, _, ghattg, ps, *_ = hyper
    return prior_rate(2.0 * ps, dtype), prior_rate(2.0 * ps * ghattg, dtype)


def vsgd_scalars(t: float, hyper: Sequence[float], dtype: torch.dtype) -> VsgdScalars:
    """The scalars of step `t` (from 1), for arithmetic in `dtype`."""
    lr, weight_decay, eps, maximize, _, _, tau1, tau2, shape_offset = hyper
    pbg, pbhg = vsgd_prior(hyper, dtype)
    kept1, kept2 = kept_share(t, tau1, dtype), kept_share(t, tau2, dtype)
    rho1, rho2 = 1.0 - kept1, 1.0 - kept2
    return VsgdScalars(
        inv_a=1.0 / (pbg + shape_offset + (0.0 if t == 1 else 1.0)),
        kept1=kept1,
        kept2=kept2,
        rho1=rho1,
        rho2=rho2,
        prior1=rho1 * pbg,
        prior2=rho2 * pbhg,
        **common_scalars(t, lr, weight_decay, eps, maximize),
    )


def vsgd_initial(hyper: Sequence[float], dtype: torch.dtype) -> tuple[float, float, float]:
    """The states before the first step: no mean, and the prior rates."""
    return 0.0, *vsgd_prior(hyper, dtype)


class ConstantVsgdScalars(NamedTuple):
    """The scalars of one step of ConstantVSGD, in double; rates are doubled, as the authors store them."""

    w: float
    inv_a: float
    kept: float
    rho: float
    prior: float
    lr: float
    decay: float
    eps: float
    t: float
    sign: float


def constant_vsgd_scalars(t: float, hyper: Sequence[float], dtype: torch.dtype) -> ConstantVsgdScalars:
    """The scalars of step `t` (from 1), for arithmetic in `dtype`."""
    lr, weight_decay, eps, maximize, ghattg, ps, tau, shape_offset = hyper
    pb = prior_rate(2.0 * ps, dtype)
    kept = kept_share(t, tau, dtype)
    rho = 1.0 - kept
    return ConstantVsgdScalars(
        w=1.0 / (ghattg + 1.0),
        inv_a=1.0 / (pb + shape_offset + (0.0 if t == 1 else 2.0)),
        kept=kept,
        rho=rho,
        prior=rho * pb,
        **common_scalars(t, lr, weight_decay, eps, maximize),
    )


def constant_vsgd_initial(hyper: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
    """The states before the first step: no mean, and the prior rate."""
    _, _, _, _, _, ps, *_ = hyper
    return 0.0, prior_rate(2.0 * ps, dtype)


class StochGradAdamScalars(NamedTuple):
    """The scalars of one step of StochGradAdam, in double."""

    kept: float  # of 2^24 random numbers
    beta1: float
    gain1: float
    beta2: float
    gain2: float
    m_scale: float
    v_scale: float
    lr: float
    decay: float
    eps: float
    t: float
    sign: float


def complement(beta: float, t: float) -> float:
    """1 - beta^t, without cancellation."""
    return -math.expm1(t * math.log(beta)) if beta else 1.0


def stoch_grad_adam_scalars(t: float, hyper: Sequence[float], dtype: torch.dtype) -> StochGradAdamScalars:
    """The scalars of step `t` (from 1)."""
    lr, weight_decay, eps, maximize, beta1, beta2, decay, sampling_rate = hyper
    return StochGradAdamScalars(
        kept=math.ceil(sampling_rate * 2.0**24),
        beta1=beta1 * decay,
        gain1=1.0 - beta1 * decay,
        beta2=beta2,
        gain2=1.0 - beta2,
        m_scale=1.0 / complement(beta1, t),
        v_scale=1.0 / complement(beta2, t),
        **common_scalars(t, lr, weight_decay, eps, maximize),
    )


def stoch_grad_adam_initial(hyper: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
    """The states before the first step: no mean, and as good as no mean square."""
    return 0.0, BOUNDS[dtype].tiny


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: the rule's name in the op, in ``reference.RULES`` and in C++.
        title: its class's.
        states: names of its per-element states, in the order of every argument list.
        rates: those of them that are strictly positive.
        hyper: names of its hyperparameters, in the order of a row of the hyper table. Each is an entry of a parameter
            group, or one of a pair there (``hyperparameters.py``).
        scalars: (t, row of the hyper table, arithmetic dtype) -> the scalars of step t; the last two are t and the
            gradient's sign.
        scalar_count: how many those are.
        initial: (row of the hyper table, arithmetic dtype) -> the states before the first step.
        draws: whether its update takes 32 random bits of each element (``philox.py``).
        samples: whether its update takes the variance of the samples whose mean the gradient is (``samples.py``).
    """

    name: str
    title: str
    states: tuple[str, ...]
    rates: tuple[str, ...]
    hyper: tuple[str, ...]
    scalars: Callable[[float, Sequence[float], torch.dtype], Any]
    scalar_count: int
    initial: Callable[[Sequence[float], torch.dtype], tuple[float, ...]]
    draws: bool = False
    samples: bool = False


VSGD = Rule(
    name="vsgd",
    title="VSGD",
    states=("mug", "bg", "bhg"),
    rates=("bg", "bhg"),
    hyper=(*COMMON_HYPER, "ghattg", "ps", "tau1", "tau2", "shape_offset"),
    scalars=vsgd_scalars,
    scalar_count=len(VsgdScalars._fields),
    initial=vsgd_initial,
)

SAMPLE_VSGD = replace(VSGD, name="sample_vsgd", title="SampleVSGD", samples=True)

CONSTANT_VSGD = Rule(
    name="constant_vsgd",
    title="ConstantVSGD",
    states=("mug", "b"),
    rates=("b",),
    hyper=(*COMMON_HYPER, "ghattg", "ps", "tau", "shape_offset"),
    scalars=constant_vsgd_scalars,
    scalar_count=len(ConstantVsgdScalars._fields),
    initial=constant_vsgd_initial,
)

STOCH_GRAD_ADAM = Rule(
    name="stoch_grad_adam",
    title="StochGradAdam",
    states=("exp_avg", "exp_avg_sq"),
    rates=("exp_avg_sq",),
    hyper=(*COMMON_HYPER, "beta1", "beta2", "decay", "sampling_rate"),
    scalars=stoch_grad_adam_scalars,
    scalar_count=len(StochGradAdamScalars._fields),
    initial=stoch_grad_adam_initial,
    draws=True,
)

RULES = {rule.name: rule for rule in (VSGD, SAMPLE_VSGD, CONSTANT_VSGD, STOCH_GRAD_ADAM)}
