"""What the benchmarks step: shapes, and the optimizers that step them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsgd_kernels
from vsgd_kernels import backends

from .feeding import Feeding, Params

Shapes = Sequence[tuple[int, ...]]


def _gpt(d: int, layers: int, context: int) -> Shapes:
    """A GPT-2 of some width; the output layer shares the token embedding."""
    norm = [(d,), (d,)]
    attention = [(3 * d, d), (3 * d,), (d, d), (d,)]
    mlp = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (context, d), *(norm + attention + norm + mlp) * layers, *norm]


def _vgg16() -> Shapes:
    """VGG16 for CIFAR-10 with batch normalisation and one linear layer, 14 728 266 parameters."""
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    convolutions = [[(out, into, 3, 3), (out,), (out,), (out,)] for into, out in pairwise(channels)]
    return [*chain.from_iterable(convolutions), (10, 512), (10,)]


def _resnet50() -> Shapes:
    """ResNet-50 for ImageNet, 25 557 032 parameters."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    into = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convolutions = [(width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, into, 1, 1))
            shapes += chain.from_iterable((shape, shape[:1], shape[:1]) for shape in convolutions)
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


#: What is stepped, by name: the shapes of a model's parameters.
CASES: dict[str, Shapes] = {
    "gpt2-124m": _gpt(768, 12, 1024),
    "vgg16": _vgg16(),
    "1000x64": [(64,)] * 1000,
    "32m": [(32 * 1024 * 1024,)],
}

#: What is stepped on a GPU.
GPU_CASES: dict[str, Shapes] = {
    "64mib": [(16 * 1024 * 1024,)],
    "1gib": [(256 * 1024 * 1024,)],
    "vgg16": CASES["vgg16"],
    "resnet50": _resnet50(),
    "gpt2-124m": CASES["gpt2-124m"],
    "gpt-1.3b": _gpt(2048, 24, 2048),
    "1000x64": CASES["1000x64"],
    "10000x64": [(64,)] * 10_000,
}


class Entry(NamedTuple):
    """An optimizer in the benchmark.

    Attributes:
        make: from parameters to the optimizer.
        bytes_per_parameter: the byte limit: what a float32 step must move at least. Parameter and states are read and
            written, the gradient is read.
        slow: makes many passes over memory; benchmarks step it less often, so that they end.
        replayed: what is measured is a CUDA graph that was captured of a step.
    """

    make: Callable[[Params], torch.optim.Optimizer]
    bytes_per_parameter: int
    slow: bool = False
    replayed: bool = False


#: Bytes of a state of an element, without a block's words; packed16 has two for all.
_STATE_BYTES = {"fp32": 4, "bf16": 2, "q8": 1}


def step_bytes(optimizer: type[Any] = vsgd_kernels.VSGD, state_format: str = "fp32") -> int:
    """The byte limit of one of our optimizers."""
    rule = optimizer.rule
    states = 2 if state_format == "packed16" else len(rule.states) * _STATE_BYTES[state_format]
    read = 8 if rule.samples else 4  # the gradient, and the variance of samples
    return 2 * (4 + states) + read


_ADAMW_BYTES = 4 * (2 + 2 * 2 + 1)

#: Of feeding one more sample: it is read, mean and variance are read and written.
FURTHER_BYTES = 4 + 2 * (4 + 4)


def _ours(rule: type[Any] = vsgd_kernels.VSGD, **settings: Any) -> Callable[[Params], torch.optim.Optimizer]:
    """What makes one of our optimizers."""

    def make(params: Params) -> torch.optim.Optimizer:
        if "backend" not in settings and backends.choose(None, params[0].device).name == "eager":
            # Else its numbers would stand in the table as the fused ones.
            raise SystemExit("no fused backend is in use; `python -m vsgd_kernels env` says why")
        return rule(params, lr=1e-2, **settings)

    return make


def entry(optimizer: type[Any] = vsgd_kernels.VSGD, state_format: str = "fp32", **settings: Any) -> Entry:
    """One of our optimizers in the benchmark."""
    return Entry(_ours(optimizer, state_format=state_format, **settings), step_bytes(optimizer, state_format))


def _pytorch_optimizer(params: Params) -> torch.optim.Optimizer:
    from pytorch_optimizer import VSGD  # here, for its import takes seconds

    return VSGD(params, lr=1e-2)


#: What the others are measured against.
BASELINE = "adamw (fused)"

OPTIMIZERS: dict[str, Entry] = {
    "vsgd (fused)": Entry(_ours(), step_bytes()),
    "vsgd (fused, bf16)": entry(state_format="bf16"),
    "vsgd (fused, q8)": entry(state_format="q8"),
    "vsgd (fused, packed16)": entry(state_format="packed16"),
    "constantvsgd (fused)": entry(vsgd_kernels.ConstantVSGD),
    "samplevsgd (fused)": entry(vsgd_kernels.SampleVSGD),
    "stochgradadam (fused)": entry(vsgd_kernels.StochGradAdam),
    BASELINE: Entry(lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), _ADAMW_BYTES),
    "adamw (foreach)": Entry(lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True), _ADAMW_BYTES, slow=True),
    "vsgd (eager)": entry(backend="eager")._replace(slow=True),
}
if find_spec("pytorch_optimizer"):
    OPTIMIZERS["vsgd (pytorch_optimizer)"] = Entry(_pytorch_optimizer, step_bytes(), slow=True)


#: And what steps it there.
GPU_OPTIMIZERS: dict[str, Entry] = {
    **{f"vsgd ({backend})": entry(backend=backend) for backend in ("triton", "cuda")},
    **{
        f"vsgd ({backend}, {state_format})": entry(state_format=state_format, backend=backend)
        for state_format in ("bf16", "q8", "packed16")
        for backend in ("triton", "cuda")
    },
    **{
        f"vsgd ({backend}, replayed)": entry(backend=backend, capturable=True)._replace(replayed=True)
        for backend in ("triton", "cuda")
    },
    "constantvsgd (triton)": entry(vsgd_kernels.ConstantVSGD, backend="triton"),
    "samplevsgd (triton)": entry(vsgd_kernels.SampleVSGD, backend="triton"),
    **{
        f"accumulate() ({backend})": Entry(partial(Feeding, first=False, backend=backend), FURTHER_BYTES)
        for backend in ("triton", "cuda")
    },
    "stochgradadam (triton)": entry(vsgd_kernels.StochGradAdam, backend="triton"),
    **{name: OPTIMIZERS[name] for name in (BASELINE, "adamw (foreach)", "vsgd (eager)")},
}


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes))


def make_params(shapes: Shapes, device: str = "cpu") -> Params:
    """Parameters, float32, each with a small random gradient; the same ones each time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    params = [torch.nn.Parameter(normal(shape, 0.02)) for shape in shapes]
    for param in params:
        param.grad = normal(param.shape, 1e-3)
    return params
