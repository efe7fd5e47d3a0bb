"""Altered checkpoints are refused by an error that says so, or loaded as they are: never a crash or a silent change."""

import copy
import io
import pickle
import random
import re

import pytest
import torch

from tests.alterations import alter
from tests.cases import assert_same_bits, train
from vsgd_kernels import state_formats
from vsgd_kernels.formats import converted_low
from vsgd_kernels.rules import BOUNDS, arithmetic_dtype

LARGE = state_formats.SMALLEST + 37
ALTERATIONS = 150  # of each rule and format
#: what a checkpoint has beside numbers of a state
NO_VALUES = ("low", "blocks", "packed", "pa2")


@pytest.fixture(params=state_formats.FORMATS)
def style(request):
    return request.param


def trained(case, style):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(LARGE, generator=generator)),
        torch.nn.Parameter(torch.randn(64, 66, generator=generator).t()),
        torch.nn.Parameter(torch.randn(7, generator=generator).bfloat16()),
        torch.nn.Parameter(torch.randn(3, generator=generator).double()),
    ]
    groups = [{"params": params[:2], **case.settings}, {"params": params[2:]}]
    optimizer = case.optimizer(groups, lr=1e-2, state_format=style, seed=5, backend="cpp")
    train(optimizer, params, generator, 2)
    return optimizer


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def go_on(optimizer):
    train(optimizer, params_of(optimizer), torch.Generator().manual_seed(1), 1)


def assert_same(own, other):
    """Nested values are the same, tensors to the bit."""
    assert type(own) is type(other)
    if isinstance(own, dict):
        assert own.keys() == other.keys()
        for key in own:
            assert_same(own[key], other[key])
    elif isinstance(own, list | tuple):
        assert len(own) == len(other)
        for a, b in zip(own, other, strict=True):
            assert_same(a, b)
    elif isinstance(own, torch.Tensor):
        assert own.device == other.device
        assert own.is_meta or assert_same_bits([own], [other]) is None
    else:
        assert own == other or own != own  # NaN


def said_state(rule, saved, param, group):
    """The state that a checkpoint says a parameter has, in the formats of its group."""
    if not saved or (saved.get("step") == 0 and not any(key in saved for key in state_formats.keys_in(saved, rule))):
        return {}
    saved = narrowed(saved)
    entries = {key: value for key, value in saved.items() if key not in (*NO_VALUES, *rule.states)}
    entries["step"] = torch.tensor(float(torch.as_tensor(saved["step"]).detach()))
    entries |= said_values(
        rule, saved, param, state_formats.format_for(group["state_format"], param.dtype, param.numel())
    )
    if param.dtype == torch.bfloat16:
        entries["low"] = converted_low(param, saved.get("low"), torch.int16)
    return {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in entries.items()}


def narrowed(saved):
    """What has 16 bits in as many: checkpoints of parts have it in 32."""
    wide = [key for key in ("packed", "low") if key in saved and saved[key].dtype == torch.int32]
    return {**saved, **{key: saved[key].to(torch.int16) for key in wide}}


def said_values(rule, saved, param, style):
    tensors, blocks = state_formats.stored(saved, rule), saved.get("blocks")
    own, own_blocks = state_formats.empty(style, rule, param)
    same = all((a.dtype, a.stride()) == (b.dtype, b.stride()) for a, b in zip(tensors, own, strict=True))
    if same and style != "fp32":
        return state_formats.entries(rule, tensors, blocks)
    dtype = arithmetic_dtype(param.dtype)
    tiny, big = BOUNDS[dtype]
    values = [
        value.detach().to(dtype).clamp(*((tiny, big**2) if key in rule.rates else (-big, big)))
        for key, value in zip(rule.states, state_formats.decode(rule, tensors, blocks), strict=True)
    ]
    state_formats.encode(rule, values, own, own_blocks, None)
    return state_formats.entries(rule, own, own_blocks)


def assert_loaded(optimizer, saved, before):
    """The optimizer holds what the dict says; what it does not say of a group is as it was."""
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    owners = [group for group in optimizer.param_groups for _ in group["params"]]
    for i, param, group in zip(numbers, params_of(optimizer), owners, strict=True):
        wanted = said_state(optimizer.rule, saved["state"].get(i), param, group)
        assert_same(optimizer.state.get(param, {}), wanted)
    for now, said, old in zip(optimizer.param_groups, saved["param_groups"], before["param_groups"], strict=True):
        own = {key: old[key] for key in ("state_format", "master_weights")}
        assert_same({**now, "params": []}, {**old, **said, **own, "params": []})


def refusal(optimizer, saved):
    """What loading raises."""
    try:
        optimizer.load_state_dict(saved)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_state_dicts(case, style):
    """Many alterations, each with a step after it; after all that were refused, training goes on to the bit."""
    source = random.Random(f"{case.optimizer.rule.name} {style}")
    twin, optimizer = (trained(case, style) for _ in range(2))
    good = copy.deepcopy(optimizer.state_dict())
    refused = 0
    for _ in range(ALTERATIONS):
        saved = copy.deepcopy(good)
        how = alter(saved, source)
        try:
            if message := refusal(optimizer, saved):
                assert re.search("expected .* found|must be .* got|^loaded state dict ", message, re.DOTALL)
                assert_same(optimizer.state_dict(), good)
                refused += 1
            else:
                loaded, optimizer = optimizer, trained(case, style)
                assert_loaded(loaded, saved, good)
                go_on(loaded)
        except BaseException as error:
            raise AssertionError(f"{how}: {error}") from error
    assert 0.4 < refused / ALTERATIONS < 0.9
    go_on(twin)
    go_on(optimizer)
    assert_same(optimizer.state_dict(), twin.state_dict())
    assert_same_bits(params_of(optimizer), params_of(twin))


@pytest.mark.engine
def test_truncated_files(case, style):
    """torch.load says so, wherever the file ends."""
    file = io.BytesIO()
    torch.save(trained(case, style).state_dict(), file)
    whole = file.getvalue()
    source = random.Random(0)
    for length in [0, 1, len(whole) - 1, *(source.randrange(len(whole)) for _ in range(100))]:
        with pytest.raises((RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError)):
            torch.load(io.BytesIO(whole[:length]), weights_only=True)
