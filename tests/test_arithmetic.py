"""Arithmetic of which the rules are made."""

from fractions import Fraction

import pytest
import torch

from vsgd_kernels import rules
from vsgd_kernels.arithmetic import fma, fma_of_float64


def to_float32(exact):
    """The nearest float32 of a fraction, an even one of two."""
    if not exact:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > magnitude
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return float(round(exact / unit) * unit)  # Python's round, ties to even


def operands(n, generator):
    """Random ones; such that cancel; and such whose product lies between two float32, and the rest decides."""

    def randn(low, high):
        scale = torch.randint(low, high, (n,), generator=generator).float().exp2()
        return torch.randn(n, generator=generator) * scale

    def whole(bits):
        return torch.randint(1, 1 << bits, (n,), generator=generator).float()

    x, y = randn(-30, 30), randn(-30, 30)
    return torch.cat(
        [
            torch.stack([x, y, randn(-60, 60)]),
            torch.stack([x, y, -x * y * (1 + 1e-7 * randn(0, 1))]),
            torch.stack([whole(12), 2 * whole(12) + 1, randn(-80, -30)]),
            torch.stack([randn(-75, -65), randn(-75, -60), randn(-149, -120)]),
        ],
        1,
    ).unbind()


@pytest.mark.parametrize("fma", [fma, fma_of_float64])
def test_fma_rounds_once(fma, generator):
    """As fractions say; which neither float32 nor float64 by itself does."""
    x, y, z = operands(2000, generator)
    rows = torch.stack([x, y, z], 1).tolist()
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in rows]
    wanted = torch.tensor(list(map(to_float32, exact)))
    assert torch.equal(fma(x, y, z), wanted)
    assert (x * y + z != wanted).sum() > 1000
    assert ((x.double() * y.double() + z.double()).float() != wanted).sum() > 20


@pytest.mark.parametrize("fma", [fma, fma_of_float64])
def test_fma_of_what_is_not_finite(fma):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, 1.0, 1.0, nan, inf, 1e38])
    y = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1e38])
    z = torch.tensor([0.0, -inf, nan, 0.0, 0.0, 0.0])
    torch.testing.assert_close(fma(x, y, z), torch.tensor([inf, -inf, nan, nan, nan, inf]), equal_nan=True)


def test_fma_of_numbers_takes_them_as_float32():
    x = torch.tensor([3.0])
    assert fma(0.1, x, -0.3) == fma(torch.tensor([0.1]), x, torch.tensor([-0.3]))


@pytest.mark.parametrize("t", [1, 2, 1000, 10**6, 2**24])
@pytest.mark.parametrize("name", ["vsgd", "sample_vsgd", "constant_vsgd"])
def test_what_is_kept_and_what_is_new_add_up_to_one(name, t):
    """Exactly, for a rate would drift by the difference over rho; and what is new is rho, as near as that allows."""
    rule = rules.RULES[name]
    hyper = [0.1, 0.0, 1e-8, 0.0, 30.0, 1e-8, *([0.81, 0.9] if name != "constant_vsgd" else [0.81]), 1e-4]
    s = rule.scalars(t, hyper, torch.float32)
    pairs = [(s.kept, s.rho, 0.81)] if name == "constant_vsgd" else [(s.kept1, s.rho1, 0.81), (s.kept2, s.rho2, 0.9)]
    for kept, rho, tau in pairs:
        assert torch.tensor(kept, dtype=torch.float32).item() == kept
        assert kept + rho == 1.0
        assert rho == pytest.approx(t**-tau, abs=2.0**-25)
