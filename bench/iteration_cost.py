"""What a training iteration costs, and the optimizer's share of it: `python -m bench.iteration_cost`.

The paper's Table 2. All optimizers step the parameters of one model in turn, in one process, after a forward and a
backward pass each. Writes iteration_cost_cpu.json and .md, or iteration_cost_cuda.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import atomic, cases, checks, models
from .runs import environment

RESULTS = Path(__file__).parent / "results"
WARMUP, FEWEST = 1, 5
#: Slow optimizers step in every so many rounds.
SLOW_EVERY = 5
#: Timing does not depend on it, and the shared model should stay where it is.
LEARNING_RATE = 1e-6

SGD = cases.Entry(lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True), 4 * 5)
NAMES = ("vsgd (fused)", "vsgd (fused, bf16)", "vsgd (fused, q8)", "constantvsgd (fused)", cases.BASELINE)
OPTIMIZERS: dict[str, cases.Entry] = {
    **{name: cases.OPTIMIZERS[name] for name in NAMES},
    "sgd, momentum (fused)": SGD,
    **{name: cases.OPTIMIZERS[name] for name in ("adamw (foreach)", "vsgd (eager)")},
}


class Network(NamedTuple):
    """A model with the batch it is fed: the paper's on a GPU, one that takes less than a second on a CPU."""

    model: str
    settings: dict[str, Any]
    shape: tuple[int, ...]
    outputs: int
    cpu_batch: int
    gpu_batch: int


NETWORKS = {
    "VGG16": Network("vgg", {}, (3, 32, 32), 100, 16, 256),
    "ResNeXt-18 (8 x 4)": Network("resnext", {"depth": 18, "cardinality": 8, "widen": 4}, (3, 32, 32), 100, 4, 128),
    "ConvMixer-256/8": Network("convmixer", {"dim": 256, "depth": 8}, (3, 32, 32), 100, 8, 256),
    # on a CPU 64 tokens, on a GPU 1024: see `_batch`
    "GPT-2, 124M": Network("gpt", {}, (1024,), 50257, 1, 8),
}


def measure(name: str, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row an optimizer: medians of the iteration and of its `step()`, in milliseconds, in so many seconds at most."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = models.build(network.model, network.settings, network.shape, network.outputs).to(device)
    loss = _loss(model, network, device)
    optimizers = {key: _make(entry, model) for key, entry in OPTIMIZERS.items()}
    for optimizer in optimizers.values():
        for _ in range(WARMUP):
            _iterate(loss, optimizer, device)
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in optimizers}
    shuffle, begin, rounds = random.Random(0).shuffle, time.perf_counter(), 0
    with tqdm(desc=name, unit="round") as bar:
        while rounds < FEWEST or time.perf_counter() - begin < seconds:
            turn = [key for key in optimizers if not OPTIMIZERS[key].slow or rounds % SLOW_EVERY == 0]
            shuffle(turn)  # none always finds the caches as the same other one left them
            for key in turn:
                times[key].append(_iterate(loss, optimizers[key], device))
            rounds += 1
            bar.update()
    about = {"network": name, "parameters": sum(p.numel() for p in model.parameters()), "batch": _size(network, device)}
    return _rows(about, times)


def _rows(about: dict[str, Any], times: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    # Forward and backward pass are the same for all, so that their median over all is what they cost.
    passes = statistics.median((whole - step) * 1e3 for measured in times.values() for whole, step in measured)
    steps = {key: statistics.median(step * 1e3 for _, step in measured) for key, measured in times.items()}
    base = passes + steps[cases.BASELINE]
    rows = []
    for key, measured in times.items():
        whole = statistics.median(whole * 1e3 for whole, _ in measured)
        rows.append(
            {
                **about,
                "optimizer": key,
                "iterations": len(measured),
                "iteration_ms": whole,
                "passes_ms": passes,
                "step_ms": steps[key],
                "share": steps[key] / (passes + steps[key]),
                "ratio": (passes + steps[key]) / base,
            }
        )
    return rows


def _make(entry: cases.Entry, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = entry.make(list(model.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    return optimizer


def _batch(network: Network, device: torch.device) -> tuple[int, int]:
    """How many examples, and how long each is if it is a text."""
    on_gpu = device.type == "cuda"
    return network.gpu_batch if on_gpu else network.cpu_batch, network.shape[-1] if on_gpu else 64


def _size(network: Network, device: torch.device) -> str:
    batch, length = _batch(network, device)
    return f"{batch} x {length} tokens" if len(network.shape) == 1 else str(batch)


def _loss(model: nn.Module, network: Network, device: torch.device) -> Callable[[], Tensor]:
    """Computes the loss of the same random batch at each call."""
    batch, length = _batch(network, device)
    if len(network.shape) == 1:
        tokens = torch.randint(network.outputs, (batch, length + 1), device=device)
        return lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    x, y = torch.randn(batch, *network.shape, device=device), torch.randint(network.outputs, (batch,), device=device)
    return lambda: F.cross_entropy(model(x), y)


def _iterate(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """Seconds of an iteration, and of its `step()`."""
    begin = _now(device)
    optimizer.zero_grad()
    loss().backward()
    before = _now(device)
    optimizer.step()
    end = _now(device)
    return end - begin, end - before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def render(results: dict[str, Any]) -> str:
    """The results as text: what they were measured on, and a table."""
    env = results["environment"]
    head = (
        f"{env['device']}; {env['threads']} threads; torch {env['torch']}; float32. Medians; the optimizers took turns "
        f"on one model. Share and ratio (to {cases.BASELINE}) are those of an iteration of the median forward and "
        "backward pass of all turns, which are the same for all, and the optimizer's own median step()."
    )
    headers = ("network", "batch", "optimizer", "iterations", "iteration ms", "step() ms", "share of step()", "ratio")
    keys = ("network", "batch", "optimizer", "iterations", "iteration_ms", "step_ms", "share", "ratio")
    rows = [[row[key] for key in keys] for row in results["rows"]]
    formats = ("", "", "", "", ".1f", ".2f", ".1%", ".3f")
    return f"{head}\n\n{tabulate(rows, headers, tablefmt='github', floatfmt=formats)}\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.iteration_cost", description=__doc__.splitlines()[0])
    choices = {"choices": NETWORKS, "metavar": "NETWORK"}
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help=", ".join(NETWORKS), **choices)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the CPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=80, help="for each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: bench/results)")
    args = parser.parse_args(argv)
    try:
        checks.whole("--threads", args.threads, 1)
        device = checks.device(args.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    rows = [row for name in args.networks for row in measure(name, device, args.seconds)]
    results = {"environment": environment(device), "rows": rows}
    atomic.write_text(args.out / f"iteration_cost_{device.type}.json", json.dumps(results, indent=1) + "\n")
    atomic.write_text(args.out / f"iteration_cost_{device.type}.md", render(results))
    print(render(results))


if __name__ == "__main__":
    main()
