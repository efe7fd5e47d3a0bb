"""float64 trajectories of an independent program, for every rule and backend."""

import pytest
import torch

from tests.cases import CASES, VECTOR_TOLERANCE
from vsgd_kernels.rules import BOUNDS


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule, case in CASES.items() for name in case.vectors])
def test_trajectory(rule, name, backend, vector):
    case, data = CASES[rule], vector(name)
    param = torch.nn.Parameter(torch.tensor(data["param0"], dtype=torch.float64))
    optimizer = case.optimizer([param], **case.settings_of(data["hyper"]), backend=backend)
    for grad, wanted in zip(gradients_of(data), data["steps"], strict=True):
        if grad.dim() > param.dim():
            param.grad_sample = grad
        else:
            param.grad = grad
        optimizer.step()
        assert_relative(param.detach(), wanted["param"])
        for state, (theirs, factor) in case.vector_states.items():
            assert_relative(optimizer.state[param][state] / factor, wanted[theirs])


def gradients_of(data):
    """Those of a trajectory; where it has masks of its own, what they leave of them, to be sampled at a rate of 1."""
    grads = torch.tensor(data["grads"], dtype=torch.float64)
    return grads * torch.tensor(data["mask"]) if "mask" in data else grads


def assert_relative(actual, wanted):
    # Rates below `tiny` count as it.
    wanted, tiny = torch.tensor(wanted, dtype=torch.float64), BOUNDS[torch.float64].tiny
    torch.testing.assert_close(actual, wanted, rtol=VECTOR_TOLERANCE, atol=tiny)


def test_posterior_is_the_next_steps(vector):
    """The posterior variance that the vectors print for step t is what the optimizer says before step t."""
    data = vector("vsgd-hyper")
    settings = CASES["vsgd"].settings_of(data["hyper"])
    param = torch.nn.Parameter(torch.tensor(data["param0"], dtype=torch.float64))
    optimizer = CASES["vsgd"].optimizer([param], **settings)
    for grad, wanted in zip(data["grads"], data["steps"], strict=True):
        (posterior,) = optimizer.get_current_posterior()
        assert_relative(posterior.variance, wanted["sigma2"])
        before = optimizer.state[param]["mug"].clone() if optimizer.state[param] else torch.zeros_like(param)
        assert torch.equal(posterior.mean, before)
        ghat = torch.tensor(grad, dtype=torch.float64)
        # mu' = beta1 mu + (1 - beta1) ghat
        assert_relative(posterior.beta1 * before + (1 - posterior.beta1) * ghat, wanted["mu"])
        assert torch.equal(optimizer.get_current_beta1_estimate()[0], posterior.beta1)
        param.grad = ghat
        optimizer.step()
