"""What the capture of a CUDA graph changes for the host, shown without a GPU: somebody says that there is one."""

import copy
import gc
import weakref

import pytest
import torch

from tests.cases import assert_same_bits, check_step, gradient
from vsgd_kernels import VSGD, SampleVSGD, graphs
from vsgd_kernels.stepper import Stepper


def test_a_graph_keeps_what_it_steps(monkeypatch):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = VSGD([param], lr=1e-2, capturable=True)
    param.grad = torch.ones(3)
    optimizer.step()
    with monkeypatch.context() as there:
        there.setattr(graphs, "capturing", lambda: True)
        optimizer.step()
    known = weakref.ref(optimizer.state[param]["mug"])
    optimizer.state.clear()
    optimizer.step()
    gc.collect()
    assert known() is not None


def test_samples_and_graphs(generator, monkeypatch):
    """Samples are counted on the host, and of that no graph can be made; one of a step reads variances as they are."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    monkeypatch.setattr(Stepper, "has_captured", True)
    optimizer.step()
    assert not optimizer._samples[param].variance.any()
    monkeypatch.setattr(graphs, "capturing", lambda: True)
    param.grad = gradient(param, generator)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured, and samples are counted on the host"):
        optimizer.accumulate()
    assert param.grad is not None


def test_graphs_of_steps_on_samples(generator, monkeypatch):
    """There are none: what belongs to samples is refused, and nothing taken."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2)
    param.grad = gradient(param, generator)
    optimizer.accumulate()
    monkeypatch.setattr(graphs, "capturing", lambda: True)
    for name in ("grad", "grad_sample"):
        setattr(param, name, torch.ones_like(param) if name == "grad" else torch.ones(2, 40))
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            optimizer.step()
        assert getattr(param, name) is not None
        assert optimizer._samples[param].count == 1
        setattr(param, name, None)


def test_graphs_of_a_first_step(case, generator, monkeypatch):
    """What a capture would make is refused, and a step outside of it makes it: states, formats, variances."""
    param = torch.nn.Parameter(torch.randn(5000, generator=generator))
    param.grad = gradient(param, generator)
    optimizer = case.optimizer([param], lr=1e-2, capturable=True)

    def refused(message):
        before = dict(optimizer.state.get(param, {}))
        with monkeypatch.context() as there:
            there.setattr(graphs, "capturing", lambda: True)
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
        assert optimizer.state.get(param, {}).keys() == before.keys()
        assert all(value is before[key] for key, value in optimizer.state.get(param, {}).items())

    refused("parameter 0 of group 0 has no state yet")
    check_step(optimizer, [param])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["state_format"] = "bf16"
    refused("the state of parameter 0 of group 0 is not yet as its group's settings")
    optimizer.param_groups[0]["state_format"] = "fp32"
    optimizer.load_state_dict(saved)
    if case.optimizer.rule.samples:
        refused("there is no variance of a parameter's samples yet")
        assert not optimizer._samples
    check_step(optimizer, [param])


def test_variances_of_a_step_before_a_graph(generator, monkeypatch):
    """A graph has them become 0 when it is replayed; a step outside of it does not wait for that."""
    param = torch.nn.Parameter(torch.randn(40, generator=generator))
    optimizer = SampleVSGD([param], lr=1e-2, capturable=True)
    for _ in range(2):
        param.grad = gradient(param, generator)
        optimizer.accumulate()
    optimizer.step()
    variance = optimizer._samples[param].variance
    before = variance.clone()
    param.grad = gradient(param, generator)
    with monkeypatch.context() as there:
        there.setattr(graphs, "capturing", lambda: True)
        optimizer.step()
    variance.copy_(before)  # for a capture does nothing
    twin = copy.deepcopy(param)
    plain = VSGD([twin], lr=1e-2)
    plain.load_state_dict(optimizer.state_dict())
    twin.grad = param.grad = gradient(param, generator)
    optimizer.step()
    plain.step()
    assert_same_bits([param, *optimizer.state[param].values()], [twin, *plain.state[twin].values()])
