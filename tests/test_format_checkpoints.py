"""Checkpoints of compressed states: resumed to the bit, converted, and refused where they were altered."""

import copy
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.cases import CASES, CODED, assert_same_bits, extreme_gradients, gradient, through_a_file, train
from tests.codes import IN_BLOCKS, LARGE, all_values, assert_near, decoded, make
from vsgd_kernels import VSGD, state_formats
from vsgd_kernels.hyperparameters import settings
from vsgd_kernels.plan import Scope

#: rules that step without being fed samples, which are loaded as those that are
PLAIN = [name for name, case in CASES.items() if not case.optimizer.rule.samples]


def copies_of(params):
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


@pytest.mark.parametrize("style", state_formats.FORMATS)
def test_resume_is_exact(case, style, generator):
    """Of rules of two states and of three."""
    params, optimizer = make(style, generator, case)
    train(optimizer, params, generator, 3)
    assert state_formats.format_of(state_formats.stored(optimizer.state[params[0]], optimizer.rule)) == style
    assert_resumes(case, params, optimizer)


@pytest.mark.parametrize("style", CODED)
def test_resume_of_a_block_of_nan(case, style, generator):
    """Every element of a block, and some of another, were given gradients that are NaN."""
    params, optimizer = make(style, generator, case)
    for param in params:
        param.grad = gradient(param, generator)
    params[0].grad[128:256], params[0].grad[700:710] = math.nan, math.nan
    optimizer.step()
    for value in (params[0], *decoded(optimizer, params[0])):
        assert value.isnan().nonzero().flatten().tolist() == [*range(128, 256), *range(700, 710)]
    assert_resumes(case, params, optimizer)


@pytest.mark.parametrize("style", CODED)
def test_resume_of_extremes(case, style, generator):
    """States that gradients from subnormal to the largest lead to, with NaN among them, are none that are refused."""
    params, optimizer = make(style, generator, case)
    extremes = extreme_gradients().repeat(2)
    for t in range(3):
        for param in params:
            param.grad = extremes.roll(t)[: param.numel()].view(param.shape).to(param)
        optimizer.step()
    assert decoded(optimizer, params[0])[0].isnan().sum() in range(5, 100)
    assert_resumes(case, params, optimizer)


def assert_resumes(case, params, optimizer):
    """Saved, read and stepped as the optimizer that goes on, to the bit."""
    others = copies_of(params)
    resumed = case.optimizer(others, lr=1.0, state_format=optimizer.param_groups[0]["state_format"])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["seed"] == 5
    assert_same_bits(all_values(params, optimizer), all_values(others, resumed))
    for own, stepped in ((params, optimizer), (others, resumed)):
        train(stepped, own, torch.Generator().manual_seed(9))
    assert_same_bits(all_values(params, optimizer), all_values(others, resumed))


@pytest.mark.parametrize("old", state_formats.FORMATS)
@pytest.mark.parametrize("new", state_formats.FORMATS)
@pytest.mark.parametrize("how", ["load", "group"])
@pytest.mark.parametrize("name", PLAIN)
def test_another_format(name, old, new, how, generator):
    """Decoded and coded again: as near as the coarser format is. The optimizer's own setting holds, not the file's."""
    case = CASES[name]
    params, optimizer = make(old, generator, case, **case.plain())
    train(optimizer, params, generator, 3)
    before = [decoded(optimizer, p) for p in params]
    if how == "load":
        loaded = case.optimizer(params, lr=1e-2, state_format=new)
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        assert loaded.param_groups[0]["state_format"] == new
        optimizer = loaded
    else:
        optimizer.param_groups[0]["state_format"] = new
        for param in params:
            param.grad = torch.zeros_like(param)
        own_settings = [settings(optimizer.rule.hyper, group) for group in optimizer.param_groups]
        optimizer._stepper._prepare(Scope(optimizer.param_groups, optimizer.state, own_settings, {}), capturing=False)
    for param, values in zip(params, before, strict=True):
        wanted = new if param.numel() >= state_formats.SMALLEST else "fp32"
        assert state_formats.format_of(state_formats.stored(optimizer.state[param], optimizer.rule)) == wanted
        entries = {"step", *state_formats.keys(wanted, optimizer.rule), *(["blocks"] if wanted in IN_BLOCKS else [])}
        assert optimizer.state[param].keys() - {"low"} == entries
        if wanted in ("fp32", old):
            assert_same_bits(decoded(optimizer, param), values)
        elif wanted == "bf16":
            torch.testing.assert_close(decoded(optimizer, param), values, rtol=2.0**-8, atol=0)
        else:
            assert_near(optimizer, param, values)
    train(optimizer, params, generator, 2)


@pytest.mark.parametrize("style", IN_BLOCKS)
def test_into_another_layout(style, generator):
    """A block's elements are others where memory is ordered otherwise: the numbers must stay with their elements."""
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 3)
    before = decoded(optimizer, params[1])
    others = [torch.nn.Parameter(p.detach().contiguous()) for p in params]
    resumed = VSGD(others, lr=1e-2, state_format=style)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_near(resumed, others[1], before)
    train(resumed, others, generator, 1)


@pytest.mark.parametrize("style", IN_BLOCKS)
def test_memory_format_changed_between_steps(style, generator, backend):
    """The codes stay in the order of their own memory."""
    outcomes = []
    for changed in (False, True):
        generator.manual_seed(4)
        params, optimizer = make(style, generator, backend=backend)
        train(optimizer, params, generator, 2)
        if changed:
            params[1].data = params[1].data.contiguous()
        train(optimizer, params, generator, 2)
        outcomes.append(all_values(params, optimizer))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def with_entries(**changes):
    return lambda state: state.update(changes)


def with_element(key, index, value):
    """An element of an entry is another value, or what a function makes of it."""

    def alter(state):
        state[key] = state[key].clone()
        state[key][index] = value(state[key][index]) if callable(value) else value

    return alter


def with_word(row, column, value):
    return with_element("blocks", (row, column), value)


def zeros(dtype, numel=LARGE):
    return torch.zeros(numel, dtype=dtype)


ALTERED_BLOCKS = [
    (with_entries(blocks=None), r"expected blocks of torch.int32 and shape \(33, 3\), found None"),
    (lambda state: state.pop("blocks"), r"expected blocks of torch.int32 and shape \(33, 3\), found None"),
    (with_entries(blocks=torch.zeros(32, 3, dtype=torch.int32)), r"found torch.int32, \(32, 3\)"),
    (with_entries(blocks=torch.zeros(33, 3)), r"found torch.float32, \(33, 3\)"),
    (with_word(4, 1, 4 | 0x3F800000), "expected blocks as this package writes them, found 0x3f800004 for 'bg'"),
    (with_word(0, 2, 31), "found 0x1f for 'bhg'"),
    (with_word(1, 1, -5), "for 'bg'"),
    (with_word(1, 0, 0), "found 0x0 for 'mug'"),
    (with_word(1, 0, 0x7FC00000), "for 'mug'"),
]
ALTERED_Q8 = [
    (with_word(32, 2, 0x7F800000 | 10), "for 'bhg'"),
    (with_element("bg", 200, 255), "found code 255 for 'bg' in a block without NaN"),
    (with_element("mug", 200, -128), "found code -128 for 'mug' in a block without NaN"),
    (with_entries(bg=zeros(torch.float32)), "expected bg to be dense and torch.uint8, found torch.float32"),
    (with_entries(bhg=zeros(torch.int8)), "expected bhg to be dense .* found torch.int8"),
    (with_entries(mug=zeros(torch.int8, LARGE - 1)), r"expected mug of shape \(4133,\), found \(4132,\)"),
    (lambda state: state.pop("bhg"), "expected mug, bg, bhg, found no bhg"),
]
ALTERED_PACKED16 = [
    (with_word(4, 1, 27 | 0x38000000), "found 0x3800001b for 'bg'"),
    (with_word(4, 1, 8 | 0x3F800020), "found 0x3f800028 for 'bg'"),  # 2^5 is no multiple of 2^8
    (with_word(4, 2, 11 | 0x3F800020), "found 0x3f80002b for 'bhg'"),  # nor of the first rate's 2^k
    (with_word(4, 2, 12 | 0x40000000), "found 0x4000000c for 'bhg'"),  # one bit more than there are
    (with_word(4, 1, 5 | 0x7C000020), "found 0x7c000025 for 'bg'"),
    # The highest base is allowed, and no code but 0 with it: what is found is not the word.
    (with_word(1, 1, lambda word: word & 31 | 0x7C000000), "found 0x(?!7c0000)[0-9a-f]{8} for 'bg'"),
    (with_word(1, 2, lambda word: word & 31 | 0x7C000000), "found 0x(?!7c0000)[0-9a-f]{8} for 'bhg'"),
    (with_element("packed", 200, lambda word: word & -32 | 16), "found a NaN in a block without NaN"),
    (with_entries(packed=zeros(torch.int32) + 2**15), "expected packed to be dense and torch.int16, found torch.int32"),
    (with_entries(packed=zeros(torch.float32)), "expected packed to be dense and torch.int16, found torch.float32"),
    (with_entries(packed=zeros(torch.int16, 2 * LARGE)[::2]), r"packed to be dense .* found torch.int16, \(2,\)"),
    (with_entries(packed=zeros(torch.int16, LARGE - 1)), r"expected packed of shape \(4133,\), found \(4132,\)"),
    (with_entries(packed=zeros(torch.int16).to("meta")), "expected packed to be dense and have data, found .* meta"),
    (with_entries(bg=zeros(torch.float32)), "expected packed or mug, bg, bhg, found packed and bg"),
    (with_entries(packed=1.0), "expected packed to be a tensor, found 1.0"),
    (lambda state: state.pop("packed"), "expected mug, bg, bhg, found no mug, bg, bhg"),
]


@pytest.mark.parametrize(
    ("style", "alter", "message"),
    [("q8", *altered) for altered in ALTERED_BLOCKS + ALTERED_Q8]
    + [("packed16", *altered) for altered in ALTERED_BLOCKS + ALTERED_PACKED16],
)
def test_altered(style, alter, message, generator):
    """Refused before anything is written."""
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = [t.clone() for t in all_values(params, optimizer)]
    alter(saved["state"][0])
    with pytest.raises(ValueError, match=f"state of parameter 0: .*{message}"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(before, all_values(params, optimizer), strict=True))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        *(("state_version", value, f"state_version: expected 1, found {value!r}") for value in (2, 0, 1.0, True, None)),
        ("state_format", "q4", "expected state_format to be one of 'fp32', .*, found 'q4'"),
        ("master_weights", "half", "expected master_weights to be one of 'exact', .*, found 'half'"),
    ],
)
def test_groups_of_another_version(generator, entry, value, message):
    params, optimizer = make("bf16", generator)
    train(optimizer, params, generator, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][entry] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("style", ["q8", "packed16"])
def test_codes_of_no_version(generator, style):
    """Checkpoints of other classes name none, but have no codes."""
    params, optimizer = make(style, generator)
    train(optimizer, params, generator, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["state_version"]
    with pytest.raises(ValueError, match=r"state_version: expected 1 beside (packed|blocks), found none"):
        optimizer.load_state_dict(saved)


def test_masters_of_no_version():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = VSGD([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["state_version"]
    with pytest.raises(ValueError, match="state_version: expected 1 beside low, found none"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("old", "new"), [("fp32", "q8"), ("bf16", "fp32"), ("q8", "q8")])
@pytest.mark.parametrize("masters", [None, "exact"])
def test_flattened(old, new, masters, generator):
    """torch's flat state dicts load as the others do; they lack what the loading optimizer's format has not."""
    outcomes = []
    for flat in (False, True):
        generator.manual_seed(1)
        models = [torch.nn.Linear(70, 70).bfloat16() for _ in range(2)]
        kinds = ((old, masters), (new, "exact"))
        optimizers = [
            VSGD(model.parameters(), lr=1e-2, state_format=style, master_weights=kind)
            for model, (style, kind) in zip(models, kinds, strict=True)
        ]
        torch.nn.utils.vector_to_parameters(
            torch.randn(70 * 71, generator=generator).bfloat16(), models[0].parameters()
        )
        train(optimizers[0], list(models[0].parameters()), generator)
        models[1].load_state_dict(models[0].state_dict())
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(models[0], optimizers[0], options=options)
        set_optimizer_state_dict(models[1], optimizers[1], saved, options=options)
        outcomes.append([value for entries in optimizers[1].state.values() for value in entries.values()])
        assert all(isinstance(value, torch.Tensor) for value in outcomes[-1])
    assert_same_bits(*outcomes)
