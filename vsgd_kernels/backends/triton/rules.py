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
def power(x, y):
    """x ** y for positive float64 x."""
    return tl.exp2(y * tl.log2(x))


@triton.jit
def prior_rate(rate, tiny, big):
    """A prior rate, within what the arithmetic type can hold."""
    return tl.minimum(tl.maximum(rate, tiny), big * big)


@triton.jit
def vsgd_scalars(t, h, tiny, big):
    """The scalars of step t of VSGD, in float64."""
    lr, weight_decay, eps, maximize, ghattg, ps, tau1, tau2, shape_offset = h
    pbg = prior_rate(2.0 * ps, tiny, big)
    pbhg = prior_rate(2.0 * ps * ghattg, tiny, big)
    inv_a = 1.0 / (pbg + shape_offset + tl.where(t == 1.0, 0.0, 1.0))
    rho1 = power(t, -tau1)
    rho2 = power(t, -tau2)
    decay = 1.0 - lr * weight_decay
    sign = tl.where(maximize != 0.0, -1.0, 1.0)
    return inv_a, pbg, pbhg, rho1, rho2, lr, decay, eps, t, sign


@triton.jit
def vsgd(theta, ghat, state, s, tiny):
    """One step of VSGD, Algorithm 1."""
    mug, bg, bhg = state
    inv_a, pbg, pbhg, rho1, rho2, lr, decay, eps, _, _ = s
    w = divide(bg, bg + bhg)  # gain
    sigma2 = at_least(bhg * w * inv_a, tiny)  # 16
    d = ghat - mug
    dg = w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 15
    bg = at_least(bg + rho1 * (pbg + (sigma2 + dg * dg) - bg), tiny)  # 18, 20
    bhg = at_least(bhg + rho2 * (pbhg + (sigma2 + dghat * dghat) - bhg), tiny)  # 19, 21
    theta = theta * decay - lr * divide(mug, square_root(mug * mug + sigma2) + eps)  # 24
    return theta, (mug, bg, bhg)


@triton.jit
def constant_vsgd_scalars(t, h, tiny, big):
    """The scalars of step t of ConstantVSGD, in float64."""
    lr, weight_decay, eps, maximize, ghattg, ps, tau, shape_offset = h
    w = 1.0 / (ghattg + 1.0)
    pb = prior_rate(2.0 * ps, tiny, big)
    inv_a = 1.0 / (pb + shape_offset + tl.where(t == 1.0, 0.0, 2.0))
    rho = power(t, -tau)
    decay = 1.0 - lr * weight_decay
    sign = tl.where(maximize != 0.0, -1.0, 1.0)
    return w, inv_a, pb, rho, lr, decay, eps, t, sign


@triton.jit
def constant_vsgd(theta, ghat, state, s, tiny):
    """One step of ConstantVSGD, Algorithm 2."""
    mug, b = state
    w, inv_a, pb, rho, lr, decay, eps, _, _ = s
    sigma2 = at_least(b * w * inv_a, tiny)  # 35
    d = ghat - mug
    dg = w * d  # mug' - mug
    dghat = d - dg  # ghat - mug'
    mug = mug + dg  # 34
    # 36 to 38: (sigma2 + dghat^2) + K_g (sigma2 + dg^2), which is this, for w = 1 / (K_g + 1)
    b = at_least(b + rho * (pb + (b * inv_a + d * dghat) - b), tiny)
    theta = theta * decay - lr * divide(mug, square_root(mug * mug + sigma2) + eps)  # 24
    return theta, (mug, b)


#: rule name -> its update
RULES = {"vsgd": vsgd, "constant_vsgd": constant_vsgd}
#: rule name -> its scalars
SCALARS = {"vsgd": vsgd_scalars, "constant_vsgd": constant_vsgd_scalars}
