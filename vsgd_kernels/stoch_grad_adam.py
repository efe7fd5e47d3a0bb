"""StochGradAdam."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import formats, rules
from .optimizer import FusedOptimizer, arguments_of


class StochGradAdam(FusedOptimizer):
    r"""Adam on a random sample of the gradient's elements, fused into one pass over all parameters.

    Yun, "StochGradAdam: Accelerating Neural Networks Training with Stochastic Gradient Sampling", Algorithm 1. With the
    gradient :math:`g` and :math:`U` uniform on [0, 1), drawn anew for each element and step,

    .. math::
        \phi &= [U < s] \, g \\
        m' &= \beta_1 \delta \, m + (1 - \beta_1 \delta) \, \phi \\
        v' &= \beta_2 v + (1 - \beta_2) \, \phi^2 \\
        \theta' &= \theta (1 - \alpha \lambda)
                    - \alpha \frac{m' / (1 - \beta_1^t)}{\sqrt{v' / (1 - \beta_2^t)} + \epsilon}

    With :math:`s = \delta = 1` it is `torch.optim.AdamW`.

    Args:
        params: parameters, named parameters, or dicts of parameter groups. Dense, of dtype float32, float64, bfloat16
            or float16; state and arithmetic are float32, or float64 for float64.
        lr: learning rate α ≥ 0, a number or a tensor of one element.
        betas: (β1, β2), each in [0, 1).
        decay: δ in (0, 1], by which β1 is multiplied; of Algorithm 1, whereas the paper's text has it in β2 too.
        sampling_rate: s in (0, 1], the probability that an element of the gradient is kept.
        eps: ε ≥ 0, added to the denominator.
        weight_decay: λ ≥ 0, decoupled as in AdamW; the paper has none.
        maximize: ascend instead of descend.
        seed: at least 0; of U, and of the rounding of states that are not "fp32". U is drawn by Philox 4x32-10, keyed
            by (seed, step) and counted by (parameter, element), in 24 bits: the same on every backend, and in a run
            that is resumed, for seed and step are in the state dict.
        capturable, state_format, master_weights, backend, max_grad_norm, gradient_release: as `VSGD`'s; "fp32" takes 8
            bytes a parameter, "bf16" 4, "q8" and "packed16" 2.1.

    Raises:
        TypeError, ValueError: a setting or parameter is none of the above.
        RuntimeError: the backend asked for is not available.

    A parameter's state is made at its first gradient: ``step``, ``exp_avg`` (m) and ``exp_avg_sq`` (v). v is kept at
    2^-100 (2^-1000 for float64) at least, so that every state format can hold it; sqrt of that is far below any ε.

    Example:
        >>> optimizer = StochGradAdam(model.parameters(), lr=1e-2, sampling_rate=0.8)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = rules.STOCH_GRAD_ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        decay: float = 1.0,
        sampling_rate: float = 0.8,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        capturable: bool = False,
        state_format: str = "fp32",
        master_weights: str | None = formats.DEFAULT_MASTER_WEIGHTS,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        gradient_release: bool = False,
    ) -> None:
        super().__init__(**arguments_of(locals()))
