"""The update rules in plain torch: the ground truth of every test, and the eager backend's arithmetic.

Equation numbers are those of Chen, Kuzina, Esmaeili and Tomczak, "Variational Stochastic Gradient Descent for Deep
Neural Networks". Rates are doubled, as the authors store them: ``bg`` is their 2b_g, ``1 / inv_a`` their 2a.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import fma
from .rules import BOUNDS, ConstantVsgdScalars, StochGradAdamScalars, VsgdScalars, rounded


def bounded(ghat: Tensor) -> Tensor:
    """Clamps finite gradients to what can be squared; NaN and ±Inf give NaN, which stays in its own element."""
    big = BOUNDS[ghat.dtype].big
    return ghat.clamp(-big, big) + (ghat - ghat)


def bounded_variance(variance: Tensor) -> Tensor:
    """Clamps variances to what `bounded` gradients can have; NaN stays."""
    return variance.clamp(max=BOUNDS[variance.dtype].big ** 2)


def add_sample(mean: Tensor, variance: Tensor, ghat: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of n samples, of which ghat is the last and the others have these (Welford).

    What a single sample has of variance is not looked at; of the first, `variance` is returned as it is.
    """
    if n == 1:
        return ghat, variance
    own = rounded(1.0 / n, ghat.dtype)
    d = ghat - mean
    before = variance if n > 2 else torch.zeros_like(ghat)
    return fma(own, d, mean), rounded(1.0 - own, ghat.dtype) * fma(own * d, d, before)


def vsgd_posterior(bg: Tensor, bhg: Tensor, inv_a: float) -> tuple[Tensor, Tensor]:
    """VSGD's gain w (Eq. 15) and posterior variance (Eq. 16)."""
    w = bg / (bg + bhg)
    sigma2 = (bhg * w * inv_a).clamp(min=BOUNDS[bg.dtype].tiny)
    return w, sigma2


def variational_move(theta: Tensor, mug: Tensor, sigma2: Tensor, s: VsgdScalars | ConstantVsgdScalars) -> Tensor:
    """The parameter step of the variational rules (Eq. 24)."""
    return fma(-s.lr, mug / (fma(mug, mug, sigma2).sqrt() + s.eps), theta * s.decay)


def vsgd(
    theta: Tensor, ghat: Tensor, state: tuple[Tensor, ...], s: VsgdScalars, variance: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of VSGD, Algorithm 1, or of SampleVSGD, Appendix A.3.

    Args:
        theta: parameters, float32 or float64.
        ghat: their noisy gradient, already `bounded`; same shape and dtype.
        state: (mug, bg, bhg), the posterior mean and the doubled rates; same shape and dtype.
        s: the scalars of this step.
        variance: of the samples whose mean ghat is, for SampleVSGD; same shape and dtype.

    Returns:
        The new theta and the new state; the arguments are left as they are.
    """
    tiny = BOUNDS[theta.dtype].tiny
    mug, bg, bhg = state
    w, sigma2 = vsgd_posterior(bg, bhg, s.inv_a)  # 15, 16
    d = ghat - mug
    dg = w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 15
    qg, qghat = fma(dg, dg, sigma2), fma(dghat, dghat, sigma2)
    if variance is not None:  # 71-74: w^2 and (1 - w)^2 times the samples' mean square distance from mug
        qg, qghat = fma(w * w, variance, qg), fma((1.0 - w) * (1.0 - w), variance, qghat)
    bg = fma(s.kept1, bg, fma(s.rho1, qg, s.prior1)).clamp(min=tiny)  # 18, 20
    bhg = fma(s.kept2, bhg, fma(s.rho2, qghat, s.prior2)).clamp(min=tiny)  # 19, 21
    theta = variational_move(theta, mug, sigma2, s)  # 24
    return theta, (mug, bg, bhg)


def constant_vsgd(
    theta: Tensor, ghat: Tensor, state: tuple[Tensor, ...], s: ConstantVsgdScalars
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of ConstantVSGD, Algorithm 2; arguments and result as `vsgd`'s, with the state (mug, b)."""
    tiny = BOUNDS[theta.dtype].tiny
    mug, b = state
    sigma2 = (b * s.w * s.inv_a).clamp(min=tiny)  # 35
    d = ghat - mug
    dg = s.w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 34
    # 36 to 38: (sigma2 + dghat^2) + K_g (sigma2 + dg^2), which is this, for w = 1 / (K_g + 1)
    b = fma(s.kept, b, fma(s.rho, fma(b, s.inv_a, d * dghat), s.prior)).clamp(min=tiny)
    theta = variational_move(theta, mug, sigma2, s)  # 24
    return theta, (mug, b)


def stoch_grad_adam(
    theta: Tensor, ghat: Tensor, state: tuple[Tensor, ...], s: StochGradAdamScalars, words: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of StochGradAdam, Algorithm 1 of Yun's paper.

    Args and Returns: as `vsgd`'s, with the state (exp_avg, exp_avg_sq), the m and v of the paper, and
        words: int64, 32 random bits of each element, of theta's shape.
    """
    tiny = BOUNDS[theta.dtype].tiny
    m, v = state
    phi = (words >> 8 < s.kept).to(ghat) * ghat  # U = (words >> 8) 2^-24
    m = fma(s.beta1, m, s.gain1 * phi)
    v = fma(s.beta2, v, s.gain2 * (phi * phi)).clamp(min=tiny)
    theta = fma(-s.lr, (m * s.m_scale) / ((v * s.v_scale).sqrt() + s.eps), theta * s.decay)
    return theta, (m, v)


#: rule name -> (theta, ghat, state, scalars, and what else the rule takes) -> (theta, state)
RULES: dict[str, Callable[..., tuple[Tensor, tuple[Tensor, ...]]]] = {
    "vsgd": vsgd,
    "sample_vsgd": vsgd,
    "constant_vsgd": constant_vsgd,
    "stoch_grad_adam": stoch_grad_adam,
}
