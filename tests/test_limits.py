"""What the rules become in their limits, against the optimizers of torch themselves."""

import pytest
import torch

from tests.cases import VECTOR_TOLERANCE, gradient
from vsgd_kernels import VSGD, ConstantVSGD, StochGradAdam

STEPS = 12


def twins(generator, dtype=torch.float64):
    """Two parameters that start alike, and the gradients of some steps."""
    start = torch.randn(300, generator=generator, dtype=dtype)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    return *params, [gradient(start, generator) for _ in range(STEPS)]


def step_both(optimizer, param, other_optimizer, other_param, grad):
    param.grad, other_param.grad = grad, grad.clone()
    optimizer.step()
    other_optimizer.step()


def test_vsgd_steps_by_the_sign(backend, generator):
    """K_g γ → ∞ with γ → ∞ and K_g → 0 (Eqs. 25-29): the nearer, the more by η g / |g|."""
    off = []
    for power in (2, 4, 6):
        param, _, grads = twins(generator.manual_seed(0))
        optimizer = VSGD(
            [param], lr=1e-3, ps=10.0 ** (3 * power), ghattg=10.0 ** (-2 * power), eps=0.0, backend=backend
        )
        furthest = torch.zeros(())
        for grad in grads:
            param.grad, before = grad, param.detach().clone()
            optimizer.step()
            step = (before - param.detach()) / 1e-3
            furthest = torch.maximum(furthest, (step - grad.sign())[grad.abs() > 0.01].abs().max())
        off.append(furthest.item())
    # sigma^2 = K_g: the step is g / sqrt(g^2 + K_g)
    assert off[0] > 0.1
    assert off[1] < 1e-3
    assert off[2] < 1e-7


@pytest.mark.parametrize("ghattg", [1.0, 9.0, 30.0])
def test_constant_vsgds_mean_is_adams(backend, generator, ghattg):
    """For β1 = K_g / (K_g + 1), at every step (Eqs. 34, 39)."""
    param, other, grads = twins(generator)
    optimizer = ConstantVSGD([param], lr=1e-3, ghattg=ghattg, backend=backend)
    adam = torch.optim.Adam([other], lr=1e-3, betas=(ghattg / (ghattg + 1), 0.999))
    for grad in grads:
        step_both(optimizer, param, adam, other, grad)
        mean = adam.state[other]["exp_avg"]
        # A sum of gradients of both signs cancels; what is rounded is each of them.
        atol = VECTOR_TOLERANCE * mean.abs().max().item()
        torch.testing.assert_close(optimizer.state[param]["mug"], mean, rtol=VECTOR_TOLERANCE, atol=atol)


@pytest.mark.parametrize("ghattg", [1.0, 9.0, 30.0])
def test_constant_vsgds_mean_is_the_momentum_of_sgd(backend, generator, ghattg):
    """(K_g + 1) μ, for a momentum of K_g / (K_g + 1), at every step (Eqs. 48-51)."""
    param, other, grads = twins(generator)
    optimizer = ConstantVSGD([param], lr=1e-3, ghattg=ghattg, backend=backend)
    sgd = torch.optim.SGD([other], lr=1e-3, momentum=ghattg / (ghattg + 1))
    for grad in grads:
        step_both(optimizer, param, sgd, other, grad)
        momentum = sgd.state[other]["momentum_buffer"]
        atol = VECTOR_TOLERANCE * momentum.abs().max().item()
        own = (ghattg + 1) * optimizer.state[param]["mug"]
        torch.testing.assert_close(own, momentum, rtol=VECTOR_TOLERANCE, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_stoch_grad_adam_that_samples_everything_is_adam(backend, generator, dtype, weight_decay):
    """s = 1 and δ = 1: torch.optim.Adam, and with weight decay AdamW, to the tolerance of torch.testing."""
    param, other, grads = twins(generator, dtype)
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": weight_decay}
    optimizer = StochGradAdam([param], **settings, sampling_rate=1.0, backend=backend)
    adam = (torch.optim.AdamW if weight_decay else torch.optim.Adam)([other], **settings, foreach=True)
    for grad in grads:
        step_both(optimizer, param, adam, other, grad)
        torch.testing.assert_close(param, other)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[param][key], adam.state[other][key])
