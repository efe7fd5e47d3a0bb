"""The update rules for Triton: reference.py's names in its order, one function a rule, passed to the kernel as
constexpr."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_least(x, floor):
    """The larger of x and floor; NaN for NaN."""
    return tl.where(x < floor, floor, x)


@triton.jit
def bounded(ghat, big):
    """Clamps finite gradients to what can be squared; NaN and ±Inf give NaN."""
    poison = ghat - ghat
    ghat = tl.where(ghat > big, big, ghat)
    ghat = tl.where(ghat < -big, -big, ghat)
    return ghat + poison


@triton.jit
def bounded_variance(variance, big):
    """Clamps variances to what bounded gradients can have; NaN stays."""
    return tl.where(variance > big * big, big * big, variance)


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest, as on every backend."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """The square root of x, rounded to nearest, as on every backend."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def fma(x, y, z):
    """x * y + z; float32 is rounded once (arithmetic.py)."""
    if x.dtype == tl.float32:
        return tl.fma(x, y, z)
    else:
        return x * y + z


@triton.jit
def negative(x):
    """-x, also of 0: before version 3.8 Triton subtracts from 0."""
    return x * -1.0


@triton.jit
def power(x, y):
    """x ** y for positive float64 x."""
    return tl.exp2(y * tl.log2(x))


@triton.jit
def complement(beta, t):
    """1 - beta ** t for float64 beta from 0 to below 1, without cancellation."""
    exponent = t * tl.log2(beta)
    u = tl.exp2(exponent)
    # u's rounding, which 1 - u brings to light, is in its logarithm as well (Kahan's expm1).
    cancels = (u > 0.5) & (u < 1.0)
    exact = (1.0 - u) * (exponent / tl.log2(tl.where(cancels, u, 0.5)))
    return tl.where(cancels, exact, tl.where(u < 1.0, 1.0 - u, -exponent * 0.6931471805599453))


@triton.jit
def prior_rate(rate, tiny, big):
    """A prior rate, within what the arithmetic type can hold."""
    return tl.minimum(tl.maximum(rate, tiny), big * big)


@triton.jit
def common_scalars(t, lr, weight_decay, eps, maximize):
    """The scalars with which every rule's end."""
    return lr, 1.0 - lr * weight_decay, eps, t, tl.where(maximize != 0.0, -1.0, 1.0)


@triton.jit
def kept_share(t, tau, dtype: tl.constexpr):
    """How much of a rate is left in step t, rounded to dtype."""
    return (1.0 - power(t, -tau)).to(dtype).to(tl.float64)


@triton.jit
def variational_move(theta, mug, sigma2, lr, decay, eps):
    """The parameter step of the variational rules."""
    return fma(negative(lr), divide(mug, square_root(fma(mug, mug, sigma2)) + eps), theta * decay)


@triton.jit
def vsgd_scalars(t, h, tiny, big, dtype: tl.constexpr):
    """The scalars of step t of VSGD, in float64."""
    lr, weight_decay, eps, maximize, ghattg, ps, tau1, tau2, shape_offset = h
    pbg = prior_rate(2.0 * ps, tiny, big)
    pbhg = prior_rate(2.0 * ps * ghattg, tiny, big)
    inv_a = 1.0 / (pbg + shape_offset + tl.where(t == 1.0, 0.0, 1.0))
    kept1 = kept_share(t, tau1, dtype)
    kept2 = kept_share(t, tau2, dtype)
    rho1 = 1.0 - kept1
    rho2 = 1.0 - kept2
    own = (inv_a, kept1, kept2, rho1, rho2, rho1 * pbg, rho2 * pbhg)
    return own + common_scalars(t, lr, weight_decay, eps, maximize)


@triton.jit
def vsgd(theta, ghat, state, s, variance, tiny):
    """One step of VSGD, Algorithm 1, or of SampleVSGD, Appendix A.3."""
    mug, bg, bhg = state
    inv_a, kept1, kept2, rho1, rho2, prior1, prior2, lr, decay, eps, _, _ = s
    w = divide(bg, bg + bhg)  # gain
    sigma2 = at_least(bhg * w * inv_a, tiny)  # 16
    d = ghat - mug
    dg = w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 15
    qg = fma(dg, dg, sigma2)
    qghat = fma(dghat, dghat, sigma2)
    if variance is not None:  # 71-74: w^2 and (1 - w)^2 times the samples' mean square distance from mug
        qg = fma(w * w, variance, qg)
        qghat = fma((1.0 - w) * (1.0 - w), variance, qghat)
    bg = at_least(fma(kept1, bg, fma(rho1, qg, prior1)), tiny)  # 18, 20
    bhg = at_least(fma(kept2, bhg, fma(rho2, qghat, prior2)), tiny)  # 19, 21
    theta = variational_move(theta, mug, sigma2, lr, decay, eps)  # 24
    return theta, (mug, bg, bhg)


@triton.jit
def constant_vsgd_scalars(t, h, tiny, big, dtype: tl.constexpr):
    """The scalars of step t of ConstantVSGD, in float64."""
    lr, weight_decay, eps, maximize, ghattg, ps, tau, shape_offset = h
    w = 1.0 / (ghattg + 1.0)
    pb = prior_rate(2.0 * ps, tiny, big)
    inv_a = 1.0 / (pb + shape_offset + tl.where(t == 1.0, 0.0, 2.0))
    kept = kept_share(t, tau, dtype)
    rho = 1.0 - kept
    own = (w, inv_a, kept, rho, rho * pb)
    return own + common_scalars(t, lr, weight_decay, eps, maximize)


@triton.jit
def constant_vsgd(theta, ghat, state, s, extra, tiny):
    """One step of ConstantVSGD, Algorithm 2."""
    mug, b = state
    w, inv_a, kept, rho, prior, lr, decay, eps, _, _ = s
    sigma2 = at_least(b * w * inv_a, tiny)  # 35
    d = ghat - mug
    dg = w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 34
    # 36 to 38: (sigma2 + dghat^2) + K_g (sigma2 + dg^2), which is this, for w = 1 / (K_g + 1)
    b = at_least(fma(kept, b, fma(rho, fma(b, inv_a, d * dghat), prior)), tiny)
    theta = variational_move(theta, mug, sigma2, lr, decay, eps)  # 24
    return theta, (mug, b)


@triton.jit
def stoch_grad_adam_scalars(t, h, tiny, big, dtype: tl.constexpr):
    """The scalars of step t of StochGradAdam, in float64."""
    lr, weight_decay, eps, maximize, beta1, beta2, decay, sampling_rate = h
    kept = tl.ceil(sampling_rate * 16777216.0)
    m_scale = 1.0 / complement(beta1, t)
    v_scale = 1.0 / complement(beta2, t)
    beta1 = beta1 * decay
    own = (kept, beta1, 1.0 - beta1, beta2, 1.0 - beta2, m_scale, v_scale)
    return own + common_scalars(t, lr, weight_decay, eps, maximize)


@triton.jit
def stoch_grad_adam(theta, ghat, state, s, words, tiny):
    """One step of StochGradAdam, Algorithm 1 of Yun's paper."""
    m, v = state
    kept, beta1, gain1, beta2, gain2, m_scale, v_scale, lr, decay, eps, _, _ = s
    phi = ((words >> 8).to(tl.int32).to(ghat.dtype) < kept).to(ghat.dtype) * ghat  # U = (word >> 8) 2^-24
    m = fma(beta1, m, gain1 * phi)
    v = at_least(fma(beta2, v, gain2 * (phi * phi)), tiny)
    theta = fma(negative(lr), divide(m * m_scale, square_root(v * v_scale) + eps), theta * decay)
    return theta, (m, v)


#: rule name -> its update
RULES = {"vsgd": vsgd, "sample_vsgd": vsgd, "constant_vsgd": constant_vsgd, "stoch_grad_adam": stoch_grad_adam}
#: rule name -> its scalars
SCALARS = {
    "vsgd": vsgd_scalars,
    "sample_vsgd": vsgd_scalars,
    "constant_vsgd": constant_vsgd_scalars,
    "stoch_grad_adam": stoch_grad_adam_scalars,
}
