"""torch.amp.GradScaler, which looks at .grad alone, beside samples that SampleVSGD was fed."""

import pytest
import torch
from torch.amp import GradScaler

from tests.test_amp import scaled_backward
from vsgd_kernels import SampleVSGD


def fed(how):
    """A SampleVSGD with samples that a scaler has scaled, and the scaler."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SampleVSGD([param], lr=1e-2)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for x in (1.0, 2.0):
        scaled_backward(scaler, [param], [x])
        if how == "accumulated":
            optimizer.accumulate()
    if how == "grad_sample":
        param.grad_sample = torch.ones(2, 3) * 2.0**10
    return param, optimizer, scaler


@pytest.mark.parametrize("how", ["accumulated", "grad_sample"])
def test_samples_that_were_not_unscaled(how):
    """`unscale_` reaches .grad alone: a step is refused, and keeps them; the next scaler's step takes them."""
    param, optimizer, scaler = fed(how)
    param.grad = torch.full((3,), 4.0 * 2.0**10)
    scaler.unscale_(optimizer)
    with pytest.raises(
        RuntimeError, match=r"unscale_\(\) has unscaled \.grad, but neither accumulated .* nor grad_sample"
    ):
        scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3))
    assert not optimizer.state
    if how == "grad_sample":
        assert param.grad_sample is not None
    else:
        assert optimizer._samples[param].count == 2
    assert param.grad.tolist() == [4.0] * 3


def test_samples_that_nobody_looked_at():
    """Without a .grad the scaler looks for no overflow: a step is refused, and keeps the samples for one that has."""
    param, optimizer, scaler = fed("accumulated")
    with pytest.raises(RuntimeError, match=r"GradScaler found no \.grad to look at; leave those of the last"):
        scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3))
    del optimizer.grad_scale, optimizer.found_inf  # torch leaves them where a step raises
    scaled_backward(scaler, [param], [4.0])
    scaler.step(optimizer)
    twin, plain, _ = fed("nothing")
    twin.grad = None
    for x in (1.0, 2.0, 4.0):
        twin.grad = torch.full((3,), x)
        plain.accumulate()
    plain.step()
    assert torch.equal(param, twin)
