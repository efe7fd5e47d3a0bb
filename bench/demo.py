"""Trains a small character transformer twice, with VSGD and with torch's fused AdamW: `python -m bench.demo`."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vsgd_kernels import VSGD, backends

from .text import load_text

CACHE = Path(__file__).resolve().parent.parent / ".data"
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 4, 4, 64, 16
VALIDATIONS, VALIDATION_BATCHES = 10, 20
#: How many of the last steps the final training loss is the mean of.
FINAL = 50

#: Classes and settings; the learning rates stay constant.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "VSGD": (VSGD, {"lr": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 2e-3, "fused": True}),
}


class CharTransformer(nn.Module):
    """Predicts each next character; pre-norm, without dropout."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, characters: Tensor) -> Tensor:
        """From characters [batch, context] to logits [batch, context, vocabulary]."""
        x = self.characters(characters) + self.positions
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


@dataclass
class Run:
    """What a training run measured: losses in nats a character, times in seconds, one of each a step."""

    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    optimizer_times: list[float] = field(default_factory=list)
    validations: dict[int, float] = field(default_factory=dict)  # after so many steps

    @property
    def final_loss(self) -> float:
        """The training loss at the end."""
        return statistics.fmean(self.losses[-FINAL:])

    @property
    def final_validation(self) -> float:
        """The validation loss at the end."""
        return self.validations[max(self.validations)]


class Data(NamedTuple):
    """A text as numbers of its characters, the last tenth for validation; how many characters there are; its origin."""

    training: Tensor
    validation: Tensor
    vocabulary: int
    source: str


def load_data() -> Data:
    """The text of `text.load_text`."""
    return encode(*load_text(CACHE))


def encode(text: str, source: str) -> Data:
    """A text as `Data`."""
    vocabulary = sorted(set(text))
    code = {character: i for i, character in enumerate(vocabulary)}
    data = torch.tensor([code[character] for character in text])
    split = len(data) * 9 // 10
    return Data(data[:split], data[split:], len(vocabulary), source)


def batches(data: Tensor, n: int, seed: int) -> list[Tensor]:
    """n batches [BATCH, CONTEXT + 1] from random places of the text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT, (n, BATCH, 1), generator=generator)
    return list(data[starts + torch.arange(CONTEXT + 1)])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, validation: list[Tensor]) -> float:
    return statistics.fmean(loss_of(model, batch).item() for batch in validation)


def train(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, training: list[Tensor], validation: list[Tensor]
) -> Run:
    """Steps once for each training batch, under a progress bar of that name."""
    run = Run()
    every = max(1, len(training) // VALIDATIONS)
    bar = tqdm(training, desc=name, unit="step")
    for i, batch in enumerate(bar, start=1):
        begin = time.perf_counter()
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        run.optimizer_times.append(end - before)
        run.step_times.append(end - begin)
        run.losses.append(loss.item())
        if i % every == 0 or i == len(training):
            run.validations[i] = validate(model, validation)
        bar.set_postfix(loss=f"{statistics.fmean(run.losses[-FINAL:]):.3f}", refresh=False)
    return run


def plot(runs: dict[str, Run], title: str, out: Path) -> None:
    """Training losses, light and smoothed, and validation losses, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for color, (name, run) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(run.losses), color=color, linewidth=2, label=f"{name}, training (smoothed)")
        axes.scatter(
            *zip(*run.validations.items(), strict=True),
            color=color,
            edgecolors="black",
            zorder=3,
            label=f"{name}, validation",
        )
    axes.set_ylim(top=3.2)  # the fall of the first steps would squeeze everything else
    axes.set(xlabel="step", ylabel="loss [nats / character]", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
    plt.close(figure)


def smooth(losses: list[float], reach: int = 10) -> list[float]:
    """The moving average over so many steps to either side."""
    return [statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]


def report(runs: dict[str, Run]) -> str:
    """A table, and a sentence that says what is in it."""
    headers = ("optimizer", "lr", "train loss", "validation loss", "optimizer ms/step", "training ms/step")
    rows = []
    for name, run in runs.items():
        times = [statistics.median(times) * 1e3 for times in (run.optimizer_times, run.step_times)]
        rows.append((name, OPTIMIZERS[name][1]["lr"], run.final_loss, run.final_validation, *times))
    (a, _, _, loss_a, time_a, _), (b, _, _, loss_b, time_b, _) = rows
    sentence = (
        f"After {len(run.losses)} steps with one seed the validation loss is {loss_a:.3f} nats/char with {a} and "
        f"{loss_b:.3f} with {b}; at the median {a}'s step() took {time_a:.2f} ms and {b}'s {time_b:.2f} ms."
    )
    return tabulate(rows, headers, floatfmt=("", "g", ".3f", ".3f", ".2f", ".1f")) + f"\n\n{sentence}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description="Trains a small transformer twice.")
    parser.add_argument("--steps", type=int, default=400, help="of training, for each optimizer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the plot (default: %(default)s)")
    args = parser.parse_args(argv)

    data = load_data()
    training = batches(data.training, args.steps, seed=1)
    validation = batches(data.validation, VALIDATION_BATCHES, seed=2)

    print(f"Text: {data.source}, {len(data.training) + len(data.validation):,} characters.")
    backend = backends.choose(None, data.training.device).name
    print(f"VSGD's backend: {backend}. {torch.get_num_threads()} threads.", flush=True)

    runs = {}
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model = CharTransformer(data.vocabulary)
        make, settings = OPTIMIZERS[name]
        runs[name] = train(name, model, make(model.parameters(), **settings), training, validation)
    size = sum(param.numel() for param in model.parameters())
    plot(runs, f"Character transformer, {size:,} parameters", args.out)
    print(f"\n{report(runs)}\nThe curves are in {args.out}.")


if __name__ == "__main__":
    main()
