"""Bad input is refused before anything is written, by an error that names the argument and the value."""

import copy
import math

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from vsgd_kernels import VSGD, backends


def leaf(**kwargs):
    return torch.nn.Parameter(torch.ones(3, **kwargs))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "lr": [
            -1e-3,
            math.nan,
            math.inf,
            1e39,
            10**400,
            torch.tensor([0.1, 0.1]),
            torch.tensor(-1.0),
            torch.tensor(math.nan),
        ],
        "eps": [-1e-8, math.nan, math.inf],
        "weight_decay": [-0.1, math.nan, math.inf, 1e39],
        "ps": [0.0, -1e-8, math.nan, math.inf],
        "ghattg": [0.0, -30.0, math.nan, math.inf],
        "tau1": [0.0, -0.5, 1.0001, math.nan],
        "tau2": [0.0, -0.5, 1.0001, math.nan],
        "shape_offset": [-1e-4, math.nan, math.inf],
        "backend": ["gpu", ""],
    }.items(),
)
def test_values(name, values):
    for value in values:
        shown = "[0.1" if isinstance(value, torch.Tensor) and value.numel() > 1 else None
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        with pytest.raises(ValueError, match=name) as error:
            VSGD([leaf()], **{name: value})
        assert (shown or repr(number)) in str(error.value)
        if name != "backend":
            with pytest.raises(ValueError, match=name):
                VSGD([{"params": [leaf()], name: value}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "0.1"),
        ("lr", None),
        ("lr", torch.tensor(1j)),
        ("eps", 1j),
        ("ps", True),
        ("maximize", 1),
        ("tau1", [0.9]),
    ],
)
def test_types(name, value):
    with pytest.raises(TypeError, match=name):
        VSGD([leaf()], **{name: value})


def test_settings_changed_later_are_checked_at_the_step():
    param = leaf()
    param.grad = torch.ones(3)
    optimizer = VSGD([param])
    optimizer.param_groups[0]["lr"] = -1.0
    assert_refused(optimizer, [param], ValueError, "lr must be at least 0 and finite in float32, got -1.0")


def test_a_refused_group_is_not_added():
    optimizer = VSGD([leaf()])
    for group in ({"params": [leaf()], "lr": -1.0}, {"params": [leaf(dtype=torch.complex64)]}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_parameter_dtypes(dtype):
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError, match=f"parameter 0 of group 0.*{dtype}"):
        VSGD([param])


def test_sparse_parameter():
    param = torch.nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="parameter 0 of group 0 must be dense"):
        VSGD([param])


def snapshot(optimizer, params):
    tensors = [*params, *(value for state in optimizer.state.values() for value in state.values())]
    return [t.clone() if t.device.type != "meta" else None for t in (x.detach() for x in tensors)]


def assert_refused(optimizer, params, error, match):
    """step() raises, and nothing has changed."""
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=match):
        optimizer.step()
    after = snapshot(optimizer, params)
    assert len(before) == len(after)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))


def make(backend, stepped, name=False):
    params = [leaf(), leaf()]
    for param in params:
        param.grad = torch.full((3,), 0.5)
    named = [("first", params[0]), ("second.weight", params[1])]
    optimizer = VSGD(named if name else params, backend=backend)
    if stepped:
        optimizer.step()
    return optimizer, params


def test_sparse_gradient(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].grad = torch.ones(3).to_sparse()
    assert_refused(optimizer, params, TypeError, "gradient of parameter 1 of group 0 must be dense.*sparse")


def test_gradient_of_another_dtype(backend, stepped):
    optimizer, params = make(backend, stepped, name=True)
    params[1].data = params[1].data.double()  # the gradient stays float32
    assert_refused(optimizer, params, TypeError, r"gradient of parameter 1 of group 0 \(second.weight\).*torch.float32")


def test_gradient_dtype_changed_on_its_own(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].grad.data = params[1].grad.data.bfloat16()
    assert_refused(optimizer, params, TypeError, r"gradient of parameter 1 of group 0.*torch.bfloat16")


def test_lazily_negated_gradient(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].grad = (torch.ones(3, dtype=torch.complex64) * 1j).conj().imag
    assert params[1].grad.is_neg()
    assert_refused(optimizer, params, TypeError, r"gradient of parameter 1 of group 0 .* resolve_neg")


def test_gradient_without_memory(stepped):
    optimizer, params = make("cpp", stepped)
    params[1].grad = torch._efficientzerotensor(3)
    assert_refused(optimizer, params, TypeError, "gradient of parameter 1 of group 0 has no memory")


def test_wrapper_of_other_tensors(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].grad = TwoTensor(torch.ones(3), torch.ones(3))
    assert_refused(optimizer, params, TypeError, r"gradient of parameter 1 of group 0 .*\bown.*TwoTensor")


def test_a_refused_step_leaves_no_new_state(backend):
    optimizer, params = make(backend, stepped=False)
    params[1].grad = None
    optimizer.step()
    optimizer.state[params[0]]["mug"] = torch.zeros(2)
    params[1].grad = torch.ones(3)
    assert_refused(optimizer, params, ValueError, "state 'mug' of parameter 0")
    assert not optimizer.state.get(params[1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_parameter_dtype_changed_later(backend, stepped, dtype):
    optimizer, params = make(backend, stepped)
    params[1].requires_grad_(False)
    params[1].data = torch.ones(3).to(dtype)
    assert_refused(optimizer, params, TypeError, f"parameter 1 of group 0.*{dtype}")


def test_gradient_of_another_shape(backend, stepped):
    optimizer, params = make(backend, stepped)
    params[1].data = torch.ones(4)
    assert_refused(optimizer, params, ValueError, r"gradient of parameter 1 of group 0.*\(4,\), got \(3,\)")


def test_parameter_shrunk_in_place(backend):
    """The same address, fewer elements: the state does not fit any more."""
    optimizer, params = make(backend, stepped=True)
    params[1].data = params[1].data[:2]
    params[1].grad = torch.ones(2)
    assert_refused(optimizer, params, ValueError, r"state 'mug' of parameter 1 of group 0.*\(2,\), got \(3,\)")


def test_meta(backend, stepped):
    optimizer, params = make(backend, stepped)
    on_meta = torch.nn.Parameter(torch.ones(3, device="meta"))
    on_meta.grad = torch.ones(3, device="meta")
    torch.utils.swap_tensors(params[1], on_meta)
    assert_refused(optimizer, params, ValueError, "parameter 1 of group 0.*meta")


def test_meta_parameter_may_get_data_later(backend):
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = VSGD([param], lr=1e-2, backend=backend)
    torch.utils.swap_tensors(param, leaf())
    param.grad = torch.ones(3)
    optimizer.step()
    assert (param < 1).all()


def test_overlapping_parameter(backend):
    param = torch.nn.Parameter(torch.ones(1).expand(3))
    param.grad = torch.ones(3)
    assert_refused(VSGD([param], backend=backend), [param], ValueError, "parameter 0 of group 0.*share memory")


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("mug", torch.zeros(2), ValueError, r"state 'mug' of parameter 1 of group 0.*\(3,\), got \(2,\)"),
        ("bg", torch.ones(3, dtype=torch.float64), TypeError, "state 'bg' of parameter 1.*torch.float64"),
        ("bhg", torch.ones(3, device="meta"), ValueError, "state 'bhg' of parameter 1.*meta"),
        ("step", torch.ones(1), TypeError, "state 'step' of parameter 1"),
        ("step", torch.ones((), dtype=torch.int64), TypeError, "state 'step' of parameter 1"),
    ],
)
def test_state_replaced_by_one_that_does_not_fit(backend, key, value, error, match):
    optimizer, params = make(backend, stepped=True)
    optimizer.state[params[1]][key] = value
    assert_refused(optimizer, params, error, match)


def test_step_count_that_is_no_tensor(backend):
    optimizer, params = make(backend, stepped=True)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["step"] = 5
    with pytest.raises(TypeError, match="state 'step' of parameter 1 of group 0 must be a tensor, got 5"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_state_without_an_entry(backend):
    optimizer, params = make(backend, stepped=True)
    del optimizer.state[params[1]]["bg"]
    assert_refused(optimizer, params, ValueError, "state of parameter 1 of group 0 has no 'bg'")


def test_backend_that_is_not_available(monkeypatch):
    reason = "this installation has no compiled kernels; build them"
    monkeypatch.setattr(backends.BACKENDS["cpp"], "why_unavailable", lambda: reason)
    with pytest.raises(RuntimeError, match=f"backend='cpp' is not available: {reason}"):
        VSGD([leaf()], backend="cpp")
    monkeypatch.setenv(backends.VARIABLE, "cpp")
    with pytest.raises(RuntimeError, match=f"{backends.VARIABLE}='cpp' is not available: {reason}"):
        VSGD([leaf()])
    monkeypatch.setenv(backends.VARIABLE, "fastest")
    with pytest.raises(
        ValueError, match=f"{backends.VARIABLE} must be one of 'cpp', 'triton', 'cuda', 'eager', got 'fastest'"
    ):
        VSGD([leaf()])


def test_loading_what_does_not_fit():
    optimizer, params = make(None, stepped=True)
    good = optimizer.state_dict()

    def refused(change, match):
        bad = copy.deepcopy(good)
        change(bad)
        before = snapshot(optimizer, params)
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, params), strict=True))
        assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    refused(lambda d: d["state"][1].pop("bg"), "state of parameter 1: expected mug, bg, bhg, found no bg")
    refused(lambda d: d["state"][1].update(mug=torch.zeros(4)), r"parameter 1.*mug of shape \(3,\), found \(4,\)")
    refused(lambda d: d["state"][1]["bhg"].zero_(), "parameter 1.*bhg.*greater than 0, found 0.0")
    refused(lambda d: d["state"][1]["bg"].neg_(), "parameter 1.*bg.*greater than 0")
    refused(lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be")
    refused(lambda d: d["param_groups"][0]["params"].append(2), "doesn't match the size")
    refused(lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups")
    refused(lambda d: d["state"][1].update(mug=1.0), "parameter 1.*mug.*tensor, found 1.0")
    refused(lambda d: d["state"][1].update(bg=torch.ones(3, dtype=torch.complex64)), "parameter 1.*bg to be real")
    for step in ("two", -3.0, math.nan, 0.5, True):
        refused(lambda d, step=step: d["state"][1].update(step=step), f"parameter 1.*step.*found {step!r}")
