"""VSGD, Algorithm 1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import checkpoint, formats, hyperparameters, reference, rules
from .optimizer import FusedOptimizer, arguments_of


class Posterior(NamedTuple):
    """What VSGD believes of one parameter's gradient.

    Attributes:
        beta1: 1 - w, the weight of the previous mean in the next one; in Adam's terms its beta1. The parameter's shape.
        mean: the posterior mean of the gradient. The parameter's shape.
        variance: the posterior variance of the gradient. The parameter's shape.
    """

    beta1: Tensor
    mean: Tensor
    variance: Tensor


class VSGD(FusedOptimizer):
    r"""Variational Stochastic Gradient Descent, fused into one pass over all parameters.

    Chen, Kuzina, Esmaeili and Tomczak, "Variational Stochastic Gradient Descent for Deep Neural Networks", Algorithm 1.
    The true gradient is a hidden variable; with the noisy gradient :math:`\hat g`, per element,

    .. math::
        w &= b_g / (b_g + b_{\hat g}) \\
        \mu' &= \mu + w (\hat g - \mu)                                                        & (15) \\
        \sigma^2 &= (b_{\hat g} / a) \, w                                                      & (16) \\
        b_g' &= b_g + \rho_1 (\gamma + (\sigma^2 + (\mu' - \mu)^2) / 2 - b_g)                  & (18, 20) \\
        b_{\hat g}' &= b_{\hat g} + \rho_2 (K_g \gamma + (\sigma^2 + (\mu' - \hat g)^2) / 2 - b_{\hat g}) & (19, 21) \\
        \theta' &= \theta (1 - \eta \lambda) - \eta \mu' / (\sqrt{\mu'^2 + \sigma^2} + \epsilon) & (24) \\
        \rho_1 &= t^{-\kappa_1}, \quad \rho_2 = t^{-\kappa_2}

    Where paper and authors' code differ, this follows the code (see README.md); defaults are the code's.

    Args:
        params: parameters, named parameters, or dicts of parameter groups. Dense, of dtype float32, float64, bfloat16
            or float16; state and arithmetic are float32, or float64 for float64.
        lr: learning rate η ≥ 0, a number or a tensor of one element. 0.01 is a good first try, 1 to 3 times AdamW's.
        ghattg: K_g > 0, the prior ratio of the variance of the noise to that of the gradient's change.
        ps: γ > 0, the strength of the prior.
        tau1: κ1 in (0, 1], the exponent of the averaging of b_g.
        tau2: κ2 in (0, 1], the exponent of the averaging of b_ĝ.
        weight_decay: λ ≥ 0, decoupled as in AdamW.
        eps: ε ≥ 0, added to the denominator.
        shape_offset: ≥ 0, added to 2a; the authors' code has 1e-4, the paper 0.
        maximize: ascend instead of descend.
        capturable: keep step counts on the parameters' device and read a tensor `lr` there, so that a step never waits
            for the device and a CUDA graph can be made of it, after one step outside of the graph. Replays follow a
            tensor `lr` that is on the device, and is not checked there; all other settings are those of the capture.
        state_format: how the states are kept: "fp32", 12 bytes a parameter; "bf16", 6; "q8", 8-bit codes in blocks,
            3.1; "packed16", 16 bits for all states, in blocks, 2.1. Parameters of fewer than 4096 elements, and of
            float64, keep theirs in the dtype they are computed in.
        master_weights: what completes bfloat16 and float16 parameters to float32 masters: "exact", 2 bytes, with which
            they train as float32 ones do; "split8", 1 byte, with stochastic rounding below it; None, nothing, the
            parameter itself being rounded stochastically. Rounding is unbiased: small updates add up on average. Asking
            for it where no parameter has 16 bits is refused.
        seed: at least 0; of the stochastic rounding of states that are not "fp32", and of masters. The same seed gives
            the same random bits on every backend.
        backend: "cpp", "triton", "cuda" or "eager"; None takes the one that the environment variable
            VSGD_KERNELS_BACKEND names, or else the fastest for each parameter's device. `python -m vsgd_kernels env`
            lists them.
        max_grad_norm: > 0; gradients are clipped to this 2-norm, taken over all parameters of all groups, as
            `torch.nn.utils.clip_grad_norm_` then `step` would, but they are read once more and not rewritten, summed up
            in float32 or (on the CPU, and for float64) float64, and can be 16-bit without rounding. The norm before
            clipping is left in `grad_norm`. It is that of unscaled gradients under GradScaler, and of whole gradients
            where they are DTensors (FSDP2, tensor parallelism); where the optimizer is given only some parameters, as
            ZeroRedundancyOptimizer does in each process, that of these. An attribute, which can be changed between
            steps, and no part of the state dict. inf clips nothing, and leaves the norm.
        gradient_release: step each parameter as soon as its gradient is accumulated in backward, and free the gradient,
            so that few are there at a time. Parameters end as `step` would leave them, to the bit, with the settings of
            that moment; `step` then steps what still has a gradient, and runs hooks. Accumulation over several backward
            passes: `accumulate_gradients`. Parameters of FSDP2 step with their sharded gradients. What needs all
            gradients, or needs them later, does not work with it: `max_grad_norm`, GradScaler, DistributedDataParallel,
            SampleVSGD, CUDA graphs of backward. Where backward is part of a compiled program, `step` takes all of them.
            A second backward pass over the same graph fails, as after any change in place; a parameter that two
            reentrant checkpoints share would step twice: use those that are not reentrant.

    Raises:
        TypeError, ValueError: a setting or parameter is none of the above.
        RuntimeError: the backend asked for is not available.

    A parameter's state is made at its first gradient: ``step``, ``mug`` (μ), ``bg`` and ``bhg`` (2b_g and 2b_ĝ), under
    the authors' names; in "packed16" ``packed`` in place of these three. Checkpoints of the authors' class and of
    pytorch_optimizer's VSGD load.

    Finite gradients never lead to NaN: beyond ±2^60 (2^508 for float64) a gradient counts as that bound. A NaN or
    infinite gradient makes its own element NaN and no other, but for `max_grad_norm`, whose norm is that of all.

    Example:
        >>> optimizer = VSGD(model.parameters(), lr=1e-2)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = rules.VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        ghattg: float = 30.0,
        ps: float = 1e-8,
        tau1: float = 0.81,
        tau2: float = 0.9,
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

    @torch.no_grad()
    def get_current_posterior(self) -> list[Posterior]:
        """For each parameter in order what its rates say now, which is what the next step will use.

        A parameter without a state has the prior's values.
        """
        return [
            self._posterior(param, hyperparameters.settings(self.rule.hyper, group).row)
            for group in self.param_groups
            for param in group["params"]
        ]

    def get_current_beta1_estimate(self) -> list[Tensor]:
        """For each parameter in order 1 - w, the weight of the previous mean; the authors' method of that name."""
        return [posterior.beta1 for posterior in self.get_current_posterior()]

    def _posterior(self, param: Tensor, row: tuple[float, ...]) -> Posterior:
        dtype = rules.arithmetic_dtype(param.dtype)
        if state := self.state.get(param):
            mug, bg, bhg = checkpoint.values_of(self.rule, param, state)
            next_step = state["step"].item() + 1
        else:
            mug, bg, bhg = (torch.full_like(param, x, dtype=dtype) for x in self.rule.initial(row, dtype))
            next_step = 1
        w, variance = reference.vsgd_posterior(bg, bhg, self.rule.scalars(next_step, row, dtype).inv_a)
        return Posterior(1.0 - w, mug.clone(), variance)
