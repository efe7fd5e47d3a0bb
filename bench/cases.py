"""What the benchmarks step: shapes, and the optimizers that step them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsgd_kernels
from vsgd_kernels import backends

Shapes = Sequence[tuple[int, ...]]
Params = list[torch.nn.Parameter]


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


_VSGD_BYTES = 4 * (2 + 3 * 2 + 1)
_VSGD_BF16_BYTES = 4 * 3 + 3 * 2 * 2
_VSGD_Q8_BYTES = 4 * 3 + 3 * 2  # and 0.19 of its blocks
_VSGD_PACKED16_BYTES = 4 * 3 + 2 * 2  # and as much
_ADAMW_BYTES = 4 * (2 + 2 * 2 + 1)  # and every rule of two states


def _fused(params: Params) -> torch.optim.Optimizer:
    backend = backends.choose(None, params[0].device)
    if backend.name == "eager":  # else its numbers would stand in the table as the fused ones
        raise RuntimeError("no fused backend is in use; `python -m vsgd_kernels env` says why")
    return vsgd_kernels.VSGD(params, lr=1e-2)


def ours(rule: type[Any] = vsgd_kernels.VSGD, **settings: Any) -> Callable[[Params], torch.optim.Optimizer]:
    """What makes one of our optimizers."""
    return lambda params: rule(params, lr=1e-2, **settings)


def _pytorch_optimizer(params: Params) -> torch.optim.Optimizer:
    from pytorch_optimizer import VSGD  # here, for its import takes seconds

    return VSGD(params, lr=1e-2)


#: What the others are measured against.
BASELINE = "adamw (fused)"

OPTIMIZERS: dict[str, Entry] = {
    "vsgd (fused)": Entry(_fused, _VSGD_BYTES),
    "vsgd (fused, bf16)": Entry(ours(state_format="bf16"), _VSGD_BF16_BYTES),
    "vsgd (fused, q8)": Entry(ours(state_format="q8"), _VSGD_Q8_BYTES),
    "vsgd (fused, packed16)": Entry(ours(state_format="packed16"), _VSGD_PACKED16_BYTES),
    "constantvsgd (fused)": Entry(ours(vsgd_kernels.ConstantVSGD), _ADAMW_BYTES),
    "samplevsgd (fused)": Entry(ours(vsgd_kernels.SampleVSGD), _VSGD_BYTES + 4),
    "stochgradadam (fused)": Entry(ours(vsgd_kernels.StochGradAdam), _ADAMW_BYTES),
    BASELINE: Entry(lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), _ADAMW_BYTES),
    "adamw (foreach)": Entry(lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True), _ADAMW_BYTES, slow=True),
    "vsgd (eager)": Entry(ours(backend="eager"), _VSGD_BYTES, slow=True),
}
if find_spec("pytorch_optimizer"):
    OPTIMIZERS["vsgd (pytorch_optimizer)"] = Entry(_pytorch_optimizer, _VSGD_BYTES, slow=True)


#: And what steps it there.
GPU_OPTIMIZERS: dict[str, Entry] = {
    **{f"vsgd ({backend})": Entry(ours(backend=backend), _VSGD_BYTES) for backend in ("triton", "cuda")},
    **{
        f"vsgd ({backend}, {state_format})": Entry(ours(backend=backend, state_format=state_format), limit)
        for state_format, limit in (
            ("bf16", _VSGD_BF16_BYTES),
            ("q8", _VSGD_Q8_BYTES),
            ("packed16", _VSGD_PACKED16_BYTES),
        )
        for backend in ("triton", "cuda")
    },
    **{
        f"vsgd ({backend}, replayed)": Entry(ours(backend=backend, capturable=True), _VSGD_BYTES, replayed=True)
        for backend in ("triton", "cuda")
    },
    "constantvsgd (triton)": Entry(ours(vsgd_kernels.ConstantVSGD, backend="triton"), _ADAMW_BYTES),
    "samplevsgd (triton)": Entry(ours(vsgd_kernels.SampleVSGD, backend="triton"), _VSGD_BYTES + 4),
    "stochgradadam (triton)": Entry(ours(vsgd_kernels.StochGradAdam, backend="triton"), _ADAMW_BYTES),
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
