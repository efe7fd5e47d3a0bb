"""Properties of every step: whatever the dtypes, shapes, strides, groups, formats and steps, against the reference."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import CASES, TOLERANCE, assert_same_bits, assert_stepped, gradient, reference_step
from vsgd_kernels import state_formats
from vsgd_kernels.batch import DTYPES
from vsgd_kernels.formats import MASTER_WEIGHTS, extra_bits, is_16_bit, load_param

few = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
shapes = st.one_of(
    st.just(()),
    st.lists(sizes, min_size=1, max_size=4).map(tuple).filter(lambda shape: torch.Size(shape).numel() < 20_000),
    st.sampled_from([(4096,), (4097,), (8193,), (65, 64), (2, 4, 23, 23)]),
)


def strided(draw, values):
    """The values in memory of another order: permuted, every other element, a row's middle, misaligned."""
    how = draw(st.sampled_from(["dense", "permuted", "channels_last", "every other", "middle", "misaligned"]))
    shape = values.shape
    if how == "permuted" and values.dim() > 1:
        order = draw(st.permutations(range(values.dim())))
        base = torch.empty([shape[d] for d in order], dtype=values.dtype)
        view = base.permute([order.index(d) for d in range(values.dim())])
    elif how == "channels_last" and values.dim() == 4:
        view = torch.empty(shape, dtype=values.dtype, memory_format=torch.channels_last)
    elif how == "every other" and values.dim():
        view = torch.empty(*shape[:-1], 2 * shape[-1], dtype=values.dtype)[..., ::2]
    elif how == "middle" and values.dim():
        view = torch.empty(*shape[:-1], shape[-1] + 7, dtype=values.dtype)[..., 3 : shape[-1] + 3]
    elif how == "misaligned":
        view = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(shape)
    else:
        view = torch.empty(shape, dtype=values.dtype)
    return view.copy_(values)


@st.composite
def models(draw):
    """A rule, settings of one to three groups, and parameters: (case, groups, number of steps, seed)."""
    case = CASES[draw(st.sampled_from(sorted(CASES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    style = draw(st.sampled_from(list(state_formats.FORMATS)))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        params = []
        for shape in draw(st.lists(shapes, min_size=1, max_size=4)):
            values = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
            params.append(torch.nn.Parameter(strided(draw, values)))
        own = {"lr": draw(st.sampled_from([0.0, 1e-4, 1e-2])), "maximize": draw(st.booleans())}
        own |= {"weight_decay": draw(st.sampled_from([0.0, 0.1])), "eps": draw(st.sampled_from([1e-8, 1e-3]))}
        own |= {key: value for key, value in case.settings.items() if key not in own and draw(st.booleans())}
        if any(is_16_bit(param.dtype) for param in params):
            own["master_weights"] = draw(st.sampled_from(list(MASTER_WEIGHTS)))
        groups.append({"params": params, "state_format": style, **own})
    return case, groups, draw(st.integers(1, 4)), generator


def give_gradients(draw, params, generator):
    """One parameter in five has none; one in five an expanded one."""
    for param in params:
        grad = gradient(param.detach().contiguous(), generator)
        kind = draw(st.sampled_from(["none", "expanded", "strided", "strided", "strided"]))
        if kind == "expanded" and param.dim():
            param.grad = grad.reshape(-1)[:1].sum().to(grad).expand(param.shape)
        else:
            param.grad = None if kind == "none" else strided(draw, grad)


def copies(case, groups, backend):
    """The same parameters, in the same layouts, in an optimizer of their own."""
    own = []
    for group in groups:
        twins = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach()) for p in group["params"]]
        own.append({**group, "params": list(map(torch.nn.Parameter, twins))})
    return case.optimizer(own, seed=11, backend=backend), [p for group in own for p in group["params"]]


@few
@given(models(), st.data())
def test_plain_steps_are_the_references(model, data):
    """With float32 states and exact masters: each step, to the table's tolerance."""
    case, groups, steps, generator = model
    for group in groups:
        group.update(state_format="fp32")
        group.pop("master_weights", None)
    optimizer, params = copies(case, groups, "cpp")
    for _ in range(steps):
        give_gradients(data.draw, params, generator)
        stepping = [param for param in params if param.grad is not None]
        seen = [param.grad.clone() for param in stepping]
        expected = reference_step(optimizer, stepping, [param.grad for param in stepping])
        if stepping or not case.optimizer.rule.samples:
            optimizer.step()
        assert_stepped(optimizer, stepping, expected)
        assert_same_bits([param.grad for param in stepping], seen)


@few
@given(models(), st.data())
def test_formats_are_the_eager_references(model, data):
    """Of any format and masters: the codes of the eager reference where the states before are the same."""
    case, groups, steps, generator = model
    optimizer, params = copies(case, groups, "cpp")
    for _ in range(steps):
        eager, twins = copies(case, [{**g, "params": g["params"]} for g in optimizer.param_groups], "eager")
        eager.load_state_dict(optimizer.state_dict())
        give_gradients(data.draw, params, generator)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad
        if not any(param.grad is not None for param in params):
            continue
        optimizer.step()
        eager.step()
        for param, twin in zip(params, twins, strict=True):
            assert_as_near(optimizer, param, eager, twin)


def assert_as_near(optimizer, param, eager, twin):
    assert (param in optimizer.state) == (twin in eager.state)
    if param not in optimizer.state:
        assert_same_bits([param.detach()], [twin.detach()])
        return
    own, other = optimizer.state[param], eager.state[twin]
    assert own.keys() == other.keys()
    assert_same_bits([own["step"]], [other["step"]])
    codes = [key for key in own if key != "low"]
    assert_same_bits([own[key] for key in codes], [other[key] for key in codes])
    now, wanted = (load_param(p.detach(), state.get("low")) for p, state in ((param, own), (twin, other)))
    (group,) = (group for group in optimizer.param_groups if any(p is param for p in group["params"]))
    step = group["lr"] * 10.0  # more than any rule's
    allowed = TOLERANCE["input"] * torch.finfo(now.dtype).eps * (wanted.abs() + step)
    if is_16_bit(param.dtype):  # another bit may be rounded to the next number that is stored
        info = torch.finfo(param.dtype)
        allowed += info.eps * wanted.abs().clamp(min=info.smallest_normal) * 2.0 ** -extra_bits(own.get("low"))
    assert ((now - wanted).abs() <= allowed).all()
