"""ConstantVSGD, Algorithm 2."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import formats, rules
from .optimizer import FusedOptimizer, arguments_of


class ConstantVSGD(FusedOptimizer):
    r"""VSGD with a constant gain: two states instead of three, fused into one pass over all parameters.

    Chen, Kuzina, Esmaeili and Tomczak, "Variational Stochastic Gradient Descent for Deep Neural Networks", Algorithm 2.
    The noise's variance is taken to be :math:`K_g` times that of the gradient's change, so that only one rate is
    learned; with the noisy gradient :math:`\hat g`, per element,

    .. math::
        \mu' &= \frac{K_g}{K_g + 1} \mu + \frac{1}{K_g + 1} \hat g                                    & (34) \\
        \sigma^2 &= \frac{b}{a (K_g + 1)}                                                            & (35) \\
        b' &= b + \rho \left(\gamma + \frac{\sigma^2 + (\mu' - \hat g)^2}{2}
              + K_g \frac{\sigma^2 + (\mu' - \mu)^2}{2} - b\right)                                     & (36-38) \\
        \theta' &= \theta (1 - \eta \lambda) - \eta \mu' / (\sqrt{\mu'^2 + \sigma^2} + \epsilon)         & (24) \\
        \rho &= t^{-\kappa}

    μ is Adam's first moment for :math:`\beta_1 = K_g / (K_g + 1)`, and :math:`(K_g + 1) \mu` the momentum of SGD.

    Args:
        params: parameters, named parameters, or dicts of parameter groups. Dense, of dtype float32, float64, bfloat16
            or float16; state and arithmetic are float32, or float64 for float64.
        lr: learning rate η ≥ 0, a number or a tensor of one element.
        ghattg: K_g > 0, the ratio of the variance of the noise to that of the gradient's change.
        ps: γ > 0, the strength of the prior.
        tau: κ in (0, 1], the exponent of the averaging of b.
        weight_decay: λ ≥ 0, decoupled as in AdamW.
        eps: ε ≥ 0, added to the denominator.
        shape_offset: ≥ 0, added to 2a; VSGD's authors' code has 1e-4, the paper 0.
        maximize: ascend instead of descend.
        capturable, state_format, master_weights, seed, backend, max_grad_norm, gradient_release: as `VSGD`'s; "fp32"
            takes 8 bytes a parameter, "bf16" 4, "q8" and "packed16" 2.1.

    Raises:
        TypeError, ValueError: a setting or parameter is none of the above.
        RuntimeError: the backend asked for is not available.

    A parameter's state is made at its first gradient: ``step``, ``mug`` (μ) and ``b`` (2b, doubled as `VSGD`'s rates).

    Example:
        >>> optimizer = ConstantVSGD(model.parameters(), lr=1e-2)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = rules.CONSTANT_VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        ghattg: float = 30.0,
        ps: float = 1e-8,
        tau: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        shape_offset: float = 1e-4,
        maximize: bool = False,
        capturable: bool = False,
        state_format: str = "fp32",
        master_weights: str | None = formats.DEFAULT_MASTER_WEIGHTS,
        seed: int = 0,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        gradient_release: bool = False,
    ) -> None:
        super().__init__(**arguments_of(locals()))
