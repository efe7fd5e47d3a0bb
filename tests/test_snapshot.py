"""Whether a snapshot of a step notices what has changed since."""

import re

import pytest
import torch

from tests.cases import misaligned
from vsgd_kernels import __main__
from vsgd_kernels.backends import library
from vsgd_kernels.backends.seen import Seen


@pytest.fixture
def params():
    """Several layouts, one without a gradient."""
    params = [torch.nn.Parameter(torch.rand(shape)) for shape in ((4, 6), (), (3,), (1, 5), (0,))]
    for param in (*params[:2], *params[3:]):
        param.grad = torch.rand_like(param)
    return params


@pytest.fixture
def state(params):
    """A dict for each parameter, of tensors and of what is none."""

    def half(shape):
        return torch.rand(2, *shape)[0]

    return {param: {"step": torch.tensor(1.0), "mug": half(param.shape), "name": "x"} for param in params}


def addresses(params):
    return [param.grad.data_ptr() for param in params if param.grad is not None]


MISSING = {
    "library": (r"not compiled; with torch and a C\+\+17 compiler", lambda path: path.unlink()),
    "half of it": ("lacks its last [0-9]+ bytes", lambda path: path.write_bytes(path.read_bytes()[: 2**15])),
    "this torch": (r"compiled for torch 2\.[0-9.]+(\+\w+)?, not 9\.9", lambda path: None),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_not_there(tmp_path, monkeypatch, missing):
    """It is left alone then, and `python -m vsgd_kernels env` says why."""
    reason, damage = MISSING[missing]
    (path,) = library._libraries("_snapshot")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / path.name)
    with monkeypatch.context() as there:
        there.setattr(library, "_FOLDER", tmp_path)
        if missing == "this torch":
            there.setattr(torch, "__version__", "9.9")
        why = library.why_not_of_this_torch.__wrapped__()
    assert re.search(reason, why)
    monkeypatch.setattr(library, "why_not_of_this_torch", lambda: why)
    assert library.module_of_this_torch.__wrapped__() is None
    assert f"step checks   slower: {why}" in __main__.environment().splitlines()


def test_this_torch_is_the_one_compiled_for():
    assert library.module_of_this_torch() is not None


def test_gradients_may_be_others(params, state):
    lists, dicts = [params[:2], params[2:]], [state, {}]
    snapshot = Seen(lists, dicts)
    assert snapshot.gradients(lists, dicts).addresses.tolist() == addresses(params)
    kept = [param.grad for param in params]
    for param in (*params[:2], *params[3:]):
        param.grad = torch.rand_like(param)
    params[4].grad = torch.rand(4)[2:2]  # empty, and in memory
    found = snapshot.gradients([list(group) for group in lists], [dict(state), {}])  # other lists of the same
    assert found.addresses.tolist() == addresses(params)
    assert found.addresses.tolist() != [grad.data_ptr() for grad in kept if grad is not None]
    assert Seen([params[2:3]]).gradients([params[2:3]]).addresses.tolist() == []


class Own(torch.nn.Parameter):
    pass


def alias(params, i):
    """Puts another parameter of the same memory in a parameter's place."""
    other = torch.nn.Parameter(params[i].detach())
    other.grad = params[i].grad
    params[i] = other


def exchange_keys(container):
    """The same values in the same order, under each other's names."""
    keys, values = reversed(list(container)), list(container.values())
    container.clear()
    container.update(zip(keys, values, strict=True))


def other_half(tensor):
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.numel())


CHANGES = {
    "parameter elsewhere": lambda p, s: setattr(p[0], "data", p[0].data.clone()),
    "parameter transposed": lambda p, s: setattr(p[0], "data", p[0].data.view(6, 4).t()),
    "parameter of other shape": lambda p, s: setattr(p[0], "data", p[0].data.view(6, 4)),
    "parameter cut": lambda p, s: setattr(p[0], "data", p[0].data[:3]),
    "another parameter of the same memory": lambda p, s: alias(p, 0),
    "parameter's class": lambda p, s: setattr(p[0], "__class__", Own),
    "parameter without memory": lambda p, s: p[0].untyped_storage().resize_(0),
    "another tensor in the same parameter": lambda p, s: torch.utils.swap_tensors(p[0], torch.nn.Parameter(p[0] + 1)),
    "memory shared with a lazy clone": lambda p, s: setattr(p[0], "clone", torch._lazy_clone(p[0].detach())),
    "parameters exchanged": lambda p, s: p.reverse(),
    "parameter gone": lambda p, s: p.pop(2),
    "parameter come": lambda p, s: p.append(torch.nn.Parameter(torch.zeros(3))),
    "parameter that is none": lambda p, s: p.__setitem__(2, "x"),
    "gradient without memory": lambda p, s: p[0].grad.untyped_storage().resize_(0),
    "gradient gone": lambda p, s: setattr(p[1], "grad", None),
    "gradient come": lambda p, s: setattr(p[2], "grad", torch.ones(3)),
    "gradient transposed": lambda p, s: setattr(p[0], "grad", torch.rand(6, 4).t()),
    "gradient of other shape": lambda p, s: setattr(p[0].grad, "data", p[0].grad.data.view(6, 4)),
    "gradient of more dimensions": lambda p, s: setattr(p[0].grad, "data", p[0].grad.data.unsqueeze(2)),
    "gradient of other dtype": lambda p, s: setattr(p[0].grad, "data", p[0].grad.data.view(torch.int32)),
    "gradient that is sparse": lambda p, s: setattr(p[0], "grad", torch.rand(4, 6).to_sparse()),
    "gradient that negates its memory": lambda p, s: setattr(p[0], "grad", torch._neg_view(p[0].grad)),
    "gradient aligned otherwise": lambda p, s: setattr(p[0], "grad", misaligned(p[0].grad)),
    "state elsewhere": lambda p, s: setattr(s[p[0]]["mug"], "data", s[p[0]]["mug"].data.clone()),
    "state elsewhere in its memory": lambda p, s: setattr(s[p[0]]["mug"], "data", other_half(s[p[0]]["mug"])),
    "state's memory shared with a lazy clone": lambda p, s: setattr(p[0], "clone", torch._lazy_clone(s[p[0]]["mug"])),
    "state in shared memory": lambda p, s: s[p[0]]["mug"].share_memory_(),
    "state replaced": lambda p, s: s[p[0]].update(mug=s[p[0]]["mug"].clone()),
    "state replaced by what is none": lambda p, s: s[p[0]].update(mug=None),
    "entry of a state gone": lambda p, s: s[p[0]].pop("name"),
    "entry of a state come": lambda p, s: s[p[0]].update(own=1),
    "entry of a state that is no tensor": lambda p, s: s[p[0]].update(name="y"),
    "states exchanged": lambda p, s: s.update({p[0]: s[p[3]], p[3]: s[p[0]]}),
    "keys of states exchanged": lambda p, s: exchange_keys(s),
    "keys of a state exchanged": lambda p, s: exchange_keys(s[p[0]]),
    "state gone": lambda p, s: s.pop(p[4]),
}


@pytest.mark.parametrize("dicts", ["the same", "others"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes(params, state, change, dicts):
    """Each is noticed, and at the first look: whether Python has numbered the dict or all it holds is looked at."""

    def found():
        return snapshot.gradients([params], [state if dicts == "the same" else dict(state)])

    snapshot = Seen([params], [state], alignment=16)
    assert not snapshot.keeps_states
    assert found() is not None
    CHANGES[change](params, state)
    assert found() is None


class Answering(torch.Tensor):
    """Says itself what its strides are."""

    strides = (6, 1)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten.stride.default, torch.ops.aten.sym_stride.default):
            return cls.strides
        assert op in (torch.ops.aten.is_contiguous.default, torch.ops.aten.is_contiguous.memory_format)
        return cls.strides == (6, 1)


@pytest.mark.usefixtures("looks")
def test_gradient_whose_class_answers(params, monkeypatch):
    """It is asked each time."""
    params[0].grad = torch.Tensor._make_subclass(Answering, torch.rand(4, 6), dispatch_sizes_strides_policy="strides")
    seen = Seen([params])
    assert seen.gradients([params]) is not None
    monkeypatch.setattr(Answering, "strides", (1, 4))
    assert seen.gradients([params]) is None


def test_found_again(params, state):
    """What is as it was before serves again; gradients that went elsewhere meanwhile are found there."""
    snapshot = Seen([params], [state])
    assert snapshot.gradients([params], [state]).addresses.tolist() == addresses(params)
    params[0].grad = torch.rand(4, 6)
    name = state[params[0]].pop("name")
    assert snapshot.gradients([params], [state]) is None
    state[params[0]]["name"] = name
    for _ in range(2):
        assert snapshot.gradients([params], [state]).addresses.tolist() == addresses(params)


def test_interrupted(params, state):
    """As by Ctrl-C after the look: where gradients went is not forgotten."""
    snapshot = Seen([params], [state])
    assert snapshot.gradients([params], [state]).addresses.tolist() == addresses(params)
    native = snapshot._native

    class Interrupted:
        def serves(self, *seen):
            native.serves(*seen)
            raise KeyboardInterrupt

    params[0].grad = torch.rand(4, 6)
    snapshot._native = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        snapshot.gradients([params], [state])
    snapshot._native = native
    assert snapshot.gradients([params], [state]).addresses.tolist() == addresses(params)


def test_same_gradients_are_given_once(params, state):
    snapshot = Seen([params], [state])
    first = snapshot.gradients([params], [state])
    assert snapshot.gradients([params], [state]) is first
    kept, params[0].grad = params[0].grad, torch.rand(4, 6)
    moved = snapshot.gradients([params], [state])
    assert moved.addresses.tolist() == addresses(params)
    params[0].grad = kept
    assert snapshot.gradients([params], [state]).addresses.tolist() == first.addresses.tolist()


def test_more_and_fewer(params, state):
    snapshot = Seen([params], [state])
    others = [([], [state]), ([params, []], [state]), ([params], []), ([params], [state, {}]), ([params], [{}])]
    for lists, dicts in others:
        assert snapshot.gradients(lists, dicts) is None


@pytest.mark.parametrize("where", ["parameter", "state"])
def test_classes_of_their_own(params, state, where):
    """Their memory and their gradients may be anywhere: they are looked at as where no module is compiled."""
    if where == "parameter":
        params[2] = Own(torch.ones(3))
    else:
        state[params[0]]["mug"] = Own(torch.ones(3))
    assert Seen([params], [state]).keeps_states


def test_another_alignment(params):
    """It matters where somebody says so."""
    seen = [Seen([params]), Seen([params], alignment=16)]
    params[0].grad = misaligned(params[0].grad)
    assert [each.gradients([params]) is None for each in seen] == [False, True]


def test_versions():
    with torch.inference_mode():
        unversioned = torch.zeros(3)
    tensors = [torch.zeros(3), torch.nn.Parameter(torch.zeros(2)), Own(torch.ones(3))]
    before = [tensor._version for tensor in tensors]
    library.increment_versions([unversioned, *tensors])
    assert [tensor._version for tensor in tensors] == [version + 1 for version in before]
