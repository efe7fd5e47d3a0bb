"""What the tests run on: one entry a rule, layouts, sizes, and the one table of tolerances."""

import io
import math
from dataclasses import dataclass, field
from typing import Any

import torch

import vsgd_kernels
from vsgd_kernels import backends, formats, hyperparameters, philox, reference, rules
from vsgd_kernels.backends.cpp import ISAS

#: What one step may add, in units in the last place of the arithmetic's dtype (`torch.finfo.eps`): "result" relative to
#: the result; "input" as if every operand had been that far off, so that a cancellation is forgiven as far as it
#: multiplies the operands' own roundings and no further; "norm" relative to the norm of many squares.
TOLERANCE = {"result": 0.51, "input": 4.0, "norm": 128.0}
#: the masters of fp16 parameters are a fixed point of 2^-40 below 2^-14
FP16_FIXED_POINT = 2.0**-41
#: the formats of states that are not their numbers
CODED = ["bf16", "q8", "packed16"]
#: the mean of many stochastic roundings, in standard errors
ROUNDINGS = 5.0
#: the step that states in few bits settle at, relative to that of float32
STATIONARITY = {
    "bf16": {"mean": 0.01, "spread": 0.03},
    "q8": {"mean": 0.005, "spread": 0.03},
    "packed16": {"mean": 0.05, "spread": 0.15},
}
#: the same of a rule that divides by the root of a rate alone, where a block spans 20 octaves and a code of q8 is 9 %
STATIONARITY_OF_COARSE_ROOTS = {"mean": 0.03, "spread": 0.2}
#: float64 against the vectors
VECTOR_TOLERANCE = 1e-12

#: elements; the C++ kernel's block is 1024, its gather tile 256; Triton's block is 4096 and its chunk 8192 here
SIZES = [0, 1, 17, 255, 256, 257, 1023, 1024, 1025, 8191, 8192, 8193, 40_001]


@dataclass
class Case:
    """A rule: its class, a second set of settings, and how the vectors name its settings and states."""

    optimizer: type
    settings: dict[str, Any]
    vectors: tuple[str, ...]
    vector_settings: dict[str, str] = field(default_factory=dict)
    vector_states: dict[str, tuple[str, float]] = field(default_factory=dict)  # ours -> theirs, factor
    largest_step: float = 1.0  # that the defaults allow, in units of lr

    def settings_of(self, hyper):
        """The settings of a vector."""
        settings = {self.vector_settings.get(key, key): value for key, value in hyper.items()}
        if "b1" in settings:  # its masks are in its gradients
            settings |= {"betas": (settings.pop("b1"), settings.pop("b2")), "sampling_rate": 1.0}
        return settings

    def plain(self):
        """Settings by which an element's step depends on nothing but its gradients."""
        return {"sampling_rate": 1.0} if "sampling_rate" in self.optimizer.rule.hyper else {}


CASES = {
    "vsgd": Case(
        optimizer=vsgd_kernels.VSGD,
        settings={"lr": 3e-3, "ghattg": 8.0, "ps": 1e-4, "tau1": 0.7, "tau2": 0.95, "weight_decay": 0.1},
        vectors=("vsgd-authors", "vsgd-paper", "vsgd-hyper"),
        vector_settings={"wd": "weight_decay", "offset": "shape_offset"},
        vector_states={"mug": ("mu", 1.0), "bg": ("rate_g", 2.0), "bhg": ("rate_ghat", 2.0)},
    ),
    "sample_vsgd": Case(
        optimizer=vsgd_kernels.SampleVSGD,
        settings={"lr": 3e-3, "ghattg": 8.0, "ps": 1e-4, "tau1": 0.7, "tau2": 0.95, "weight_decay": 0.1},
        vectors=("vsgd-authors", "vsgd-persample"),
        vector_settings={"wd": "weight_decay", "offset": "shape_offset"},
        vector_states={"mug": ("mu", 1.0), "bg": ("rate_g", 2.0), "bhg": ("rate_ghat", 2.0)},
    ),
    "constant_vsgd": Case(
        optimizer=vsgd_kernels.ConstantVSGD,
        settings={"lr": 3e-3, "ghattg": 8.0, "ps": 1e-4, "tau": 0.7, "weight_decay": 0.1},
        vectors=("constant-paper", "constant-offset"),
        vector_settings={"wd": "weight_decay", "offset": "shape_offset"},
        vector_states={"mug": ("mu", 1.0), "b": ("rate_ghat", 2.0)},
    ),
    "stoch_grad_adam": Case(
        optimizer=vsgd_kernels.StochGradAdam,
        settings={"lr": 3e-3, "betas": (0.8, 0.95), "decay": 0.97, "sampling_rate": 0.6, "weight_decay": 0.1},
        vectors=("stochgradadam",),
        vector_states={"exp_avg": ("m", 1.0), "exp_avg_sq": ("v", 1.0)},
        largest_step=7.3,  # (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))
    ),
}
assert CASES.keys() == rules.RULES.keys()


def layouts(dtype: torch.dtype, generator: torch.Generator) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A parameter and a gradient in every arrangement of their strides."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    channels_last = randn(6, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    return {
        "0-dim": (randn(), randn()),
        "transposed": (randn(37, 41).t(), randn(37, 41).t()),
        "transposed gradient": (randn(41, 37), randn(37, 41).t()),
        "transposed parameter": (randn(37, 41).t(), randn(41, 37)),
        "channels_last": (channels_last, randn(6, 5, 4, 3).contiguous(memory_format=torch.channels_last)),
        "channels_last parameter": (channels_last.clone(), randn(6, 5, 4, 3)),
        "channels_last gradient": (
            randn(6, 5, 4, 3),
            randn(6, 5, 4, 3).contiguous(memory_format=torch.channels_last),
        ),
        "every other column": (randn(30, 44)[:, ::2], randn(30, 22)),
        "every third element": (randn(3000)[::3], randn(1000)),
        "middle of a row": (randn(64, 64)[:, 5:50], randn(64, 64)[:, 7:52]),
        "expanded gradient": (randn(50, 33), randn(33).expand(50, 33)),
        "scalar expanded gradient": (randn(50, 33), randn().expand(50, 33)),
        "permuted gradient": (randn(7, 8, 9), randn(9, 7, 8).permute(1, 2, 0)),
        "size-1 dimensions": (randn(1, 300, 1, 5), randn(300, 1, 5, 1).permute(1, 0, 3, 2)),
        "misaligned": (randn(1001)[1:], randn(1003)[3:]),
    }


def gradient(param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random gradient of many magnitudes, representable in the parameter's dtype."""
    scale = torch.randint(-10, 8, param.shape, generator=generator).float().exp2()
    return (torch.randn(param.shape, generator=generator) * scale).to(param)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that begins an element later than its memory does."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def extreme_gradients() -> torch.Tensor:
    """From subnormal to the largest, of both signs, and what is not finite."""
    magnitudes = torch.logspace(-45, 38, 2000, dtype=torch.float64).float()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    return torch.cat([magnitudes, -magnitudes, special])


def reference_step(optimizer, params, grads):
    """What one step should give by the reference in float64: for each parameter [(value, allowed error), ...].

    The first pair is the parameter's, the others its states'.
    """
    rule = optimizer.rule
    results = []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for param, grad in zip(params, grads, strict=True):
        row = hyperparameters.row(rule.hyper, groups[param])
        arithmetic = rules.arithmetic_dtype(param.dtype)
        state = optimizer.state.get(param)
        t = int(state["step"]) + 1 if state else 1
        if state:
            states = [state[name].double() for name in rule.states]
        else:
            initial = rule.initial(row, arithmetic)
            states = [torch.full_like(param, value, dtype=torch.float64) for value in initial]
        scalars = rule.scalars(t, row, torch.float64)
        extra = [words_of(optimizer, param, t)] if rule.draws else []
        extra += [variance_of(optimizer, param)] if rule.samples else []

        def step(theta, ghat, *states, rule=rule, scalars=scalars, extra=extra, arithmetic=arithmetic):
            ghat = reference.bounded(ghat * scalars.sign)
            theta, states = reference.RULES[rule.name](theta, ghat, states, scalars, *extra)
            floor = rules.BOUNDS[arithmetic].tiny
            return theta, *(
                x.clamp(floor) if key in rule.rates else x for key, x in zip(rule.states, states, strict=True)
            )

        operands = [master_of(optimizer, param).double(), grad.double(), *states]
        wanted = step(*operands)
        allowed = [rounding(value, arithmetic) for value in wanted]
        if param.dtype == torch.float16:
            allowed[0] = allowed[0] + FP16_FIXED_POINT
        eps = TOLERANCE["input"] * torch.finfo(arithmetic).eps
        # The scalars of the step are rounded: relative to the change that they make.
        for j, before in enumerate([operands[0], *states]):
            allowed[j] = allowed[j] + eps * (wanted[j] - before).abs()
        sizes = [operand.abs() for operand in operands]
        # The rules subtract means from the gradient: the difference's rounding is relative to the larger of the two.
        means = [x.abs() for x, name in zip(states, rule.states, strict=True) if name not in rule.rates]
        sizes[1] = sum(means, sizes[1])
        for i, size in enumerate(sizes):
            for j, value in enumerate(step(*operands[:i], operands[i] + eps * size, *operands[i + 1 :])):
                allowed[j] = allowed[j] + (value - wanted[j]).abs()
        results.append(list(zip(wanted, allowed, strict=True)))
    return results


def master_of(optimizer, param):
    """What a parameter stands for, in arithmetic dtype."""
    return formats.load_param(param.detach(), optimizer.state.get(param, {}).get("low"))


def variance_of(optimizer, param):
    """Of what a parameter was fed."""
    samples = optimizer._samples.get(param)
    return samples.variance.double() if samples and not samples.is_old else torch.zeros_like(param, dtype=torch.float64)


def words_of(optimizer, param, t):
    """What a parameter draws in step t."""
    places = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    (seed,) = (group["seed"] for group in optimizer.param_groups if any(p is param for p in group["params"]))
    state = optimizer.state.get(param)
    like = state[optimizer.rule.states[0]] if state else torch.empty_like(param)
    return philox.words(seed, places[param], t, like)


def rounding(value, dtype):
    """By how much a stored value may differ."""
    info = torch.finfo(dtype)
    return TOLERANCE["result"] * info.eps * value.abs().clamp(min=info.smallest_normal)


def assert_stepped(optimizer, params, expected):
    """Parameters and states are as the reference's, to the table's tolerance."""
    for param, pairs in zip(params, expected, strict=True):
        state = optimizer.state[param]
        master = master_of(optimizer, param)
        # What is visible is a nearest 16-bit value.
        assert ((param - master).abs() <= (master.to(param.dtype) - master).abs()).all()
        actual = {"param": master, **{name: state[name] for name in optimizer.rule.states}}
        assert all(state[name].dtype == rules.arithmetic_dtype(param.dtype) for name in optimizer.rule.states)
        for (name, value), (wanted, allowed) in zip(actual.items(), pairs, strict=True):
            error = (value.double() - wanted).abs()
            bad = ~(error <= allowed)
            assert not bad.any(), (
                f"{name} of {param.dtype}, shape {tuple(param.shape)}: {bad.sum()} of {bad.numel()} off, "
                f"by up to {(error / allowed).max():.3g} times what is allowed"
            )


def assert_same_bits(tensors, others):
    for a, b in zip(tensors, others, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def norm_of(grads):
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads))


def assert_norm(norm, grads, dtype):
    """That it is the norm of gradients of which the widest is of dtype."""
    assert norm.shape == ()
    assert norm.dtype == rules.arithmetic_dtype(dtype)
    assert abs(norm.item() - norm_of(grads)) <= TOLERANCE["norm"] * torch.finfo(norm.dtype).eps * norm_of(grads)


def make_params(generator, n=3):
    params = [torch.nn.Parameter(torch.randn(5, 7 + i, generator=generator)) for i in range(n)]
    for param in params:
        param.grad = gradient(param, generator)
    return params


def check_step(optimizer, params):
    stepping = [p for p in params if p.grad is not None]
    expected = reference_step(optimizer, stepping, [p.grad for p in stepping])
    optimizer.step()
    assert_stepped(optimizer, stepping, expected)


def train(optimizer, params, generator, steps=3):
    """Some steps with random gradients."""
    for _ in range(steps):
        for param in params:
            param.grad = gradient(param, generator)
        optimizer.step()


def through_a_file(state_dict):
    """Saved, and read again as weights alone."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step_counts(optimizer, params):
    return [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params]


def each_isa(monkeypatch):
    """Has the C++ kernels use the instruction sets of this processor in turn."""
    cpp = backends.find("cpp")
    for isa in ISAS[1 : ISAS.index(cpp.best_isa()) + 1]:
        monkeypatch.setattr(cpp, "isa", isa)
        yield isa
