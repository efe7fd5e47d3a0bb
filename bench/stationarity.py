"""The step that states in few bits settle at: `python -m bench.stationarity`.

20,000 VSGD steps on independent gradients, on two problems: "equal", where all elements are alike, and "mixed", where
their scales span ten octaves, so that a block's rates span twenty. What counts is the step that is taken, mean /
sqrt(mean^2 + variance), averaged over the last 500: its mean over the elements, and its spread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from vsgd_kernels import VSGD, reference, rules, state_formats
from vsgd_kernels.state_formats import FORMATS

ELEMENTS, STEPS, LAST = 4096, 20_000, 500
PROBLEMS = ("equal", "mixed")
_ROW = [1e-2, 0.0, 1e-8, False, 30.0, 1e-8, 0.81, 0.9, 1e-4]  # VSGD's defaults, as a row of the hyper table

Settled = tuple[float, float]
#: (states, step) -> what is left of them after they were stored
Store = Callable[[Sequence[Tensor], int], Sequence[Tensor]]


def gradients(problem: str, steps: int, seed: int = 1) -> Iterator[Tensor]:
    """Noise of 1e-2 around a mean of 2e-3, scaled; the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.rand(ELEMENTS, generator=generator) * 10 - 5 if problem == "mixed" else torch.zeros(ELEMENTS)
    for _ in range(steps):
        yield (torch.randn(ELEMENTS, generator=generator) * 1e-2 + 2e-3) * 2.0**octaves


def settled(problem: str, style: str, steps: int = STEPS, last: int = LAST, seed: int = 1) -> Settled:
    """Mean and spread of the step in one of the package's formats, by its own kernels."""
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = VSGD([param], lr=1e-2, state_format=style)
    total = torch.zeros(ELEMENTS)
    for t, param.grad in enumerate(gradients(problem, steps, seed)):
        optimizer.step()
        if t >= steps - last:
            (posterior,) = optimizer.get_current_posterior()
            total += posterior.mean / (posterior.mean**2 + posterior.variance).sqrt()
    return (total / last).mean().item(), (total / last).std().item()


def settled_in(problem: str, store: Store, steps: int = STEPS, last: int = LAST, seed: int = 1) -> Settled:
    """Mean and spread of the step where `store` stands for the format, in plain torch."""
    states: Sequence[Tensor] = [torch.full((ELEMENTS,), x) for x in rules.VSGD.initial(_ROW, torch.float32)]
    total = torch.zeros(ELEMENTS)
    for t, grad in enumerate(gradients(problem, steps, seed), 1):
        scalars = rules.VSGD.scalars(t, _ROW, torch.float32)
        _, new = reference.vsgd(grad, grad, tuple(states), scalars)
        states = store(new, t)
        if t > steps - last:
            _, variance = reference.vsgd_posterior(states[1], states[2], scalars.inv_a)
            total += states[0] / (states[0] ** 2 + variance).sqrt()
    return (total / last).mean().item(), (total / last).std().item()


def nearest(style: str) -> Store:
    """A format of the package, rounded to nearest instead."""
    kept, blocks = state_formats.empty(style, rules.VSGD, torch.empty(ELEMENTS))

    def store(states: Sequence[Tensor], t: int) -> Sequence[Tensor]:
        state_formats.encode(rules.VSGD, states, kept, blocks, None)
        return state_formats.decode(rules.VSGD, kept, blocks)

    return store


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stationarity", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the gradients (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # more only wait for each other at this size
    measured: dict[str, list[Settled]] = {
        style: [settled(problem, style, args.steps, seed=args.seed) for problem in PROBLEMS] for style in FORMATS
    }
    others = {f"{style}, to nearest": nearest(style) for style in FORMATS if style != "fp32"}
    measured |= {
        name: [settled_in(problem, store, args.steps, seed=args.seed) for problem in PROBLEMS]
        for name, store in others.items()
    }
    rows = []
    for name, both in measured.items():
        cells = [name]
        for (mean, spread), (wanted, wanted_spread) in zip(both, measured["fp32"], strict=True):
            cells += [f"{mean:.4f} ({mean / wanted - 1:+.1%})", f"{spread:.4f} ({spread / wanted_spread - 1:+.1%})"]
        rows.append(cells)
    headers = ["states", *(f"{problem}: {what}" for problem in PROBLEMS for what in ("step", "spread"))]
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
