"""Checkpoints of compressed states: resumed to the bit, converted, and refused where they were altered."""

import copy

import pytest
import torch

from tests.cases import through_a_file, train
from vsgd_kernels import VSGD, state_formats
from vsgd_kernels.hyperparameters import settings
from vsgd_kernels.plan import Scope

LARGE = state_formats.SMALLEST + 37


def make(style, generator, **settings):
    params = [
        torch.nn.Parameter(torch.randn(LARGE, generator=generator)),
        torch.nn.Parameter(torch.randn(9, 10, 8, 7, generator=generator).contiguous(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(LARGE, generator=generator).bfloat16()),
        torch.nn.Parameter(torch.randn(50, generator=generator)),
    ]
    return params, VSGD(params, lr=1e-2, state_format=style, seed=5, **settings)


def all_values(params, optimizer):
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def decoded(optimizer, param):
    state = optimizer.state[param]
    return state_formats.decode(optimizer.rule, [state[k] for k in optimizer.rule.states], state.get("blocks"))


def assert_near(key, now, value):
    """Within half the distance of codes: of the largest mean's, or where a block's rates span 40 octaves."""
    allowed = value.abs().max() / 64 if key == "mug" else value / 8
    assert ((now - value).abs() <= allowed).all(), key


@pytest.mark.parametrize("style", ["fp32", "bf16", "q8"])
def test_resume_is_exact(style, generator):
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 3)
    saved = through_a_file(optimizer.state_dict())
    others = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    resumed = VSGD(others, lr=1.0, state_format=style)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["seed"] == 5
    for own, stepped in ((params, optimizer), (others, resumed)):
        train(stepped, own, torch.Generator().manual_seed(9))
    for a, b in zip(all_values(params, optimizer), all_values(others, resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("old", ["fp32", "bf16", "q8"])
@pytest.mark.parametrize("new", ["fp32", "bf16", "q8"])
@pytest.mark.parametrize("how", ["load", "group"])
def test_another_format(old, new, how, generator):
    """Decoded and coded again: as near as the coarser format is. The optimizer's own setting holds, not the file's."""
    params, optimizer = make(old, generator)
    train(optimizer, params, generator, 3)
    before = [decoded(optimizer, p) for p in params]
    if how == "load":
        loaded = VSGD(params, lr=1e-2, state_format=new)
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        assert loaded.param_groups[0]["state_format"] == new
        optimizer = loaded
    else:
        optimizer.param_groups[0]["state_format"] = new
        for param in params:
            param.grad = torch.zeros_like(param)
        own_settings = [settings(optimizer.rule.hyper, group) for group in optimizer.param_groups]
        optimizer._stepper._prepare(Scope(optimizer.param_groups, optimizer.state, own_settings, {}))
    for param, values in zip(params, before, strict=True):
        wanted = new if param.numel() >= state_formats.SMALLEST else "fp32"
        assert state_formats.format_of([optimizer.state[param]["bg"]]) == wanted
        assert ("blocks" in optimizer.state[param]) == (wanted == "q8")
        for key, value, now in zip(optimizer.rule.states, values, decoded(optimizer, param), strict=True):
            if wanted in ("fp32", old):
                assert torch.equal(now, value), key
            elif wanted == "bf16":
                torch.testing.assert_close(now, value, rtol=2.0**-8, atol=0)
            else:
                assert_near(key, now, value)
    train(optimizer, params, generator, 2)


def test_into_another_layout(generator):
    """A block's elements are others where memory is ordered otherwise: the numbers must stay with their elements."""
    params, optimizer = make("q8", generator)
    train(optimizer, params, generator, 3)
    before = decoded(optimizer, params[1])
    others = [torch.nn.Parameter(p.detach().contiguous()) for p in params]
    resumed = VSGD(others, lr=1e-2, state_format="q8")
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for key, value, now in zip(optimizer.rule.states, before, decoded(resumed, others[1]), strict=True):
        assert_near(key, now, value)
    train(resumed, others, generator, 1)


def test_memory_format_changed_between_steps(generator, backend):
    """The codes stay in the order of their own memory."""
    outcomes = []
    for changed in (False, True):
        generator.manual_seed(4)
        params, optimizer = make("q8", generator, backend=backend)
        train(optimizer, params, generator, 2)
        if changed:
            params[1].data = params[1].data.contiguous()
        train(optimizer, params, generator, 2)
        outcomes.append(all_values(params, optimizer))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def altered(**changes):
    def alter(state):
        state.update(changes)

    return alter


def with_word(row, column, value):
    def alter(state):
        state["blocks"] = state["blocks"].clone()
        state["blocks"][row, column] = value

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered(blocks=None), r"expected blocks of torch.int32 and shape \(33, 3\), found None"),
        (altered(blocks=torch.zeros(32, 3, dtype=torch.int32)), r"found torch.int32, \(32, 3\)"),
        (altered(blocks=torch.zeros(33, 3)), r"found torch.float32, \(33, 3\)"),
        (with_word(4, 1, 4 | 0x3F800000), "expected blocks as this package writes them, found 0x3f800004 for 'bg'"),
        (with_word(0, 2, 31), "found 0x1f for 'bhg'"),
        (with_word(32, 2, 0x7F800000 | 10), "for 'bhg'"),
        (with_word(1, 1, -5), "for 'bg'"),
        (with_word(1, 0, 0), "found 0x0 for 'mug'"),
        (with_word(1, 0, 0x7FC00000), "for 'mug'"),
        (altered(bg=torch.zeros(LARGE)), "expected bg to be dense and torch.uint8, found torch.float32"),
        (altered(bhg=torch.zeros(LARGE, dtype=torch.int8)), "expected bhg to be dense .* found torch.int8"),
        (altered(mug=torch.zeros(LARGE - 1, dtype=torch.int8)), r"expected mug of shape \(4133,\), found \(4132,\)"),
        (lambda state: state.pop("bhg"), "expected mug, bg, bhg, found no bhg"),
    ],
)
def test_altered(alter, message, generator):
    """Refused before anything is written."""
    params, optimizer = make("q8", generator)
    train(optimizer, params, generator, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = [t.clone() for t in all_values(params, optimizer)]
    alter(saved["state"][0])
    with pytest.raises(ValueError, match=f"state of parameter 0: .*{message}"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(before, all_values(params, optimizer), strict=True))


def test_another_version(generator):
    params, optimizer = make("bf16", generator)
    train(optimizer, params, generator, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["state_version"] = 2
    with pytest.raises(ValueError, match="state_version: expected 1, found 2"):
        optimizer.load_state_dict(saved)


def test_altered_between_steps(generator, backend):
    """What somebody put into the state is checked before it is stepped."""
    params, optimizer = make("q8", generator, backend=backend)
    train(optimizer, params, generator, 1)
    state = optimizer.state[params[0]]
    kept = dict(state)
    for key, value, message in (
        ("blocks", state["blocks"][:-1].clone(), r"state 'blocks' of parameter 0 of group 0 must be .*shape \(33, 3\)"),
        ("bg", state["bg"].float(), "state 'bg' of parameter 0 of group 0 must be torch.uint8"),
        ("mug", torch.zeros(2 * LARGE, dtype=torch.int8)[::2], "must be dense and all of the same strides"),
    ):
        state[key] = value
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()
        state.update(kept)
    train(optimizer, params, generator, 1)
