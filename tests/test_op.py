"""The registered op: schema, fake, checks; equal to what the optimizer launches itself; loss scaling."""

import pytest
import torch

import vsgd_kernels.ops
from tests.cases import CASES, CODED, assert_same_bits, gradient
from vsgd_kernels import formats, hyperparameters, rules, state_formats
from vsgd_kernels.batch import DTYPES

OP = torch.ops.vsgd_kernels.step.default


def arguments(case, generator, backend):
    """Operands of the op as keywords, for a parameter of each dtype."""
    rule = case.optimizer.rule
    params = [torch.randn(40, generator=generator).to(dtype) for dtype in DTYPES]
    group = case.optimizer([torch.nn.Parameter(params[0])], **case.settings).param_groups[0]
    row = hyperparameters.row(rule.hyper, group)
    states = [
        torch.full_like(p, value, dtype=rules.arithmetic_dtype(p.dtype))
        for p in params
        for value in rule.initial(row, rules.arithmetic_dtype(p.dtype))
    ]
    return {
        "params": params,
        "grads": [gradient(p, generator) for p in params]
        + [torch.zeros_like(p, dtype=rules.arithmetic_dtype(p.dtype)) for p in params if rule.samples],
        "lows": [torch.zeros_like(p, dtype=torch.int16) for p in params if formats.is_16_bit(p.dtype)],
        "states": states,
        "blocks": [],
        "steps": [torch.zeros(()) for _ in params],
        "hyper": torch.tensor([row], dtype=torch.float64),
        "groups": [0] * len(params),
        "rule": rule.name,
        "backend": backend,
    }


def test_opcheck(case, generator, backend):
    torch.library.opcheck(OP, (), arguments(case, generator, backend))


def test_op_equals_optimizer(case, generator, backend):
    operands = arguments(case, generator, backend)
    params = [torch.nn.Parameter(p.clone()) for p in operands["params"]]
    optimizer = case.optimizer(params, **case.settings, backend=backend)
    for _ in range(3):
        for param, grad in zip(params, operands["grads"][: len(params)], strict=True):
            param.grad = grad
        optimizer.step()
        OP(**operands)
    assert all(torch.equal(a, b) for a, b in zip(params, operands["params"], strict=True))
    states = [optimizer.state[p][name] for p in params for name in optimizer.rule.states]
    assert all(torch.equal(a, b) for a, b in zip(states, operands["states"], strict=True))
    assert [s.item() for s in operands["steps"]] == [3.0] * len(params)


def stepped_once(case, generator, style, backend):
    """Parameters of which some have states in codes and others not, as small ones have, and their optimizer."""
    sizes = (state_formats.SMALLEST, 40, state_formats.SMALLEST + 37)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    optimizer = case.optimizer(params, **case.settings, seed=5, state_format=style, backend=backend)
    for param in params:
        param.grad = gradient(param, generator)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("style", CODED)
def test_op_equals_optimizer_in_codes(case, generator, style, backend):
    """A parameter has as many states as its format has tensors, and blocks where it has them."""
    params, optimizer = stepped_once(case, generator, style, backend)
    rule = optimizer.rule
    states = [optimizer.state[param] for param in params]
    stored = [tensor for state in states for tensor in state_formats.stored(state, rule)]
    blocks = [state["blocks"] for state in states if "blocks" in state]
    steps = [state["step"] for state in states]
    theirs = [[t.detach().clone() for t in own] for own in (params, stored, blocks, steps)]
    for _ in range(2):
        for param in params:
            param.grad = gradient(param, generator)
        optimizer.step()
        OP(
            **dict(zip(("params", "states", "blocks", "steps"), theirs, strict=True)),
            grads=[p.grad for p in params] + [torch.zeros_like(p) for p in params if rule.samples],
            lows=[],
            hyper=torch.tensor([hyperparameters.row(rule.hyper, optimizer.param_groups[0])], dtype=torch.float64),
            groups=[0] * len(params),
            rule=rule.name,
            backend=backend,
            seed=5,
        )
    for own, other in zip((params, stored, blocks, steps), theirs, strict=True):
        assert_same_bits(own, other)


def test_traced_program_mutates_what_it_should(case, generator, backend):
    """torch.compile of a program that calls the op, on the backend that only traces."""
    torch.compiler.reset()  # each rule and backend is a program of its own
    operands = arguments(case, generator, backend)
    plain = {
        k: [t.clone() for t in v] if k in ("params", "lows", "states", "steps") else v for k, v in operands.items()
    }

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(params, grads, lows, states, steps, hyper):
        OP(params, grads, lows, states, [], steps, hyper, operands["groups"], operands["rule"], operands["backend"])
        return [p * 2 for p in params]

    doubled = program(*(operands[k] for k in ("params", "grads", "lows", "states", "steps", "hyper")))
    OP(**plain)
    for name in ("params", "lows", "states", "steps"):
        assert all(torch.equal(a, b) for a, b in zip(operands[name], plain[name], strict=True))
    assert all(torch.equal(a, b * 2) for a, b in zip(doubled, plain["params"], strict=True))


def test_no_tensors_nothing_to_do(case, generator, backend):
    operands = arguments(case, generator, backend)
    OP(**{**operands, "params": [], "grads": [], "lows": [], "states": [], "steps": [], "groups": []})


@pytest.mark.parametrize("style", CODED)
def test_float64_has_no_coded_states(style, generator, backend):
    """Refused: no kernel decodes them."""
    rule = CASES["vsgd"].optimizer.rule
    param = torch.randn(state_formats.SMALLEST, generator=generator, dtype=torch.float64)
    operands = arguments(CASES["vsgd"], generator, backend)
    states, blocks = state_formats.empty(style, rule, param)
    operands |= {"params": [param], "grads": [param], "lows": [], "states": states, "steps": [torch.zeros(())]}
    operands |= {"groups": [0], "blocks": [] if blocks is None else [blocks]}
    with pytest.raises(TypeError, match=r"states of params\[0\] must be torch.float64 .* got format"):
        OP(**operands)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rule": "adam"}, ValueError, "rule must be one of 'vsgd', .*, got 'adam'"),
        ({"backend": "none"}, ValueError, "backend must be one of .*, got 'none'"),
        ({"groups": [0]}, ValueError, r"must have .* entries for these params, got \[4, 2, 4, 4, 1\]"),
        ({"steps": [torch.zeros(())] * 3}, ValueError, r"got \[4, 2, 4, 3, 4\]"),
        ({"states": [torch.zeros(40)] * 11}, ValueError, "states must have 3 .* got 11, of which 2 are left over"),
        ({"states": [torch.zeros(40)] * 15}, ValueError, r"those of 4 parameters.*, got \[4, 2, 5, 4, 4\]"),
        ({"states": [torch.zeros(40, dtype=torch.int16)] * 4}, ValueError, "blocks must have 4 entries .*, got 0"),
        ({"blocks": [torch.zeros(1)]}, ValueError, "blocks must have 0 entries for these states, got 1"),
        ({"groups": [0, 0, 0, 1]}, ValueError, r"groups must be rows of hyper, 0 to 0, got 1"),
        ({"hyper": torch.zeros(1, 3, dtype=torch.float64)}, ValueError, r"hyper must be float64 .*\(1, 3\)"),
        ({"hyper": torch.zeros(1, 9)}, ValueError, "hyper must be float64 .*torch.float32"),
        ({"grad_scale": torch.zeros((), dtype=torch.float64)}, TypeError, "grad_scale must be float32 .*torch.float64"),
        ({"seed": -5}, ValueError, r"seed must be at least 0 and below 2\^63, got -5"),
        ({"found_inf": torch.zeros(2)}, TypeError, r"found_inf must be float32 of 1 element.*\(2,\)"),
    ],
)
def test_bad_operands(generator, backend, change, error, match):
    operands = arguments(CASES["vsgd"], generator, backend)
    before = [t.clone() for t in (*operands["params"], *operands["states"], *operands["steps"])]
    with pytest.raises(error, match=match):
        OP(**{**operands, **change})
    after = [*operands["params"], *operands["states"], *operands["steps"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("scale", [1.0, 8.0, 3.0])
def test_grad_scale(case, generator, backend, scale):
    """Scaled gradients with their scale step as plain gradients do."""
    plain = arguments(case, generator, backend)
    n = len(plain["params"])
    for variance in plain["grads"][n:]:
        variance.fill_(0.3)
    scaled = {k: [t.clone() for t in v] if k in ("params", "lows", "states", "steps") else v for k, v in plain.items()}
    scaled["grads"] = [g * scale for g in plain["grads"][:n]] + [v * scale**2 for v in plain["grads"][n:]]
    OP(**plain)
    OP(**scaled, grad_scale=torch.tensor(scale), found_inf=torch.tensor(0.0))
    tolerance = {"rtol": 0, "atol": 0} if scale != 3.0 else {"rtol": 0.05, "atol": 1e-4}
    for a, b in zip(plain["params"], scaled["params"], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_found_inf_changes_nothing(case, generator, backend):
    operands = arguments(case, generator, backend)
    mutable = [t for name in ("params", "lows", "states", "steps") for t in operands[name]]
    before = [t.clone() for t in mutable]
    OP(**operands, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, mutable, strict=True))


def test_grad_scaler(case, generator, backend):
    """torch.amp.GradScaler leaves scaling to the step, and an overflowed step is not counted."""
    params = [torch.nn.Parameter(torch.randn(20, generator=generator)) for _ in range(2)]
    twin = torch.nn.Parameter(params[0].detach().clone())
    optimizer = case.optimizer(params, lr=1e-2, backend=backend)
    plain = case.optimizer([twin], lr=1e-2, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        x = torch.randn(20, generator=generator)
        overflows = i in (2, 4)
        loss = (params[0] * x).sum() + (params[1] * (torch.inf if overflows else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not overflows:
            twin.grad = x
            plain.step()
    assert optimizer.state[params[0]]["step"] == 4
    assert torch.equal(params[0], twin)


def test_schema():
    schema = str(vsgd_kernels.ops.step._opoverload._schema)
    assert schema.startswith("vsgd_kernels::step(Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] lows, ")
