"""What coded states cost in training: `python -m bench.formats`. A character transformer, every format, several seeds.

Writes formats.json, formats.md and formats.png. A seed chooses the model's start, the batches and the rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from vsgd_kernels import VSGD
from vsgd_kernels.state_formats import FORMATS

from .demo import VALIDATION_BATCHES, CharTransformer, Data, batches, load_data, smooth, train
from .host_time import cpu_model

RESULTS = Path(__file__).parent / "results"
LEARNING_RATE = 1e-2


def run_all(data: Data, seeds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each seed and format: its losses at every step, and at the end on the validation batches."""
    validation = batches(data.validation, VALIDATION_BATCHES, seed=1000)
    rows = []
    for seed in range(seeds):
        for style in FORMATS:
            torch.manual_seed(seed)
            model = CharTransformer(data.vocabulary)
            optimizer = VSGD(model.parameters(), lr=LEARNING_RATE, state_format=style, seed=seed)
            run = train(f"{style}, seed {seed}", model, optimizer, batches(data.training, steps, seed), validation)
            states = [optimizer.state[p] for p in model.parameters()]
            size = sum(value.nbytes for state in states for key, value in state.items() if key != "step")
            rows.append(
                {
                    "format": style,
                    "seed": seed,
                    "steps": steps,
                    "validation_loss": run.final_validation,
                    "state_bytes_per_parameter": size / sum(p.numel() for p in model.parameters()),
                    "losses": [round(loss, 5) for loss in run.losses],
                }
            )
    return rows


def summary(results: dict[str, Any]) -> str:
    """A table of final validation losses, and whether each format's are within what seeds alone change."""
    losses = {style: [r["validation_loss"] for r in results["rows"] if r["format"] == style] for style in FORMATS}
    size = {r["format"]: r["state_bytes_per_parameter"] for r in results["rows"]}
    reference = losses["fp32"]
    rows = []
    for style, own in losses.items():
        paired = [a - b for a, b in zip(own, reference, strict=True)]
        inside = min(reference) <= statistics.fmean(own) <= max(reference)
        rows.append(
            [style, size[style], statistics.fmean(own), statistics.stdev(own), statistics.fmean(paired), inside]
        )
    headers = [
        "format",
        "state B / parameter",
        "validation loss",
        "sd over seeds",
        "minus fp32's",
        "within seeds",
    ]
    env = results["environment"]
    head = (
        f"Final validation loss in nats a character of a character transformer on {env['source']}: "
        f"{results['rows'][0]['steps']} steps, {len(reference)} seeds, lr {env['lr']}. {env['cpu']}, torch "
        f'{env["torch"]}. "Within seeds": whether the mean lies between fp32\'s best and worst seed.'
    )
    table = tabulate(rows, headers, tablefmt="github", floatfmt=("", ".2f", ".4f", ".4f", "+.4f", ""))
    return f"{head}\n\n{table}\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Training losses, smoothed: the mean over seeds, and the band from the best to the worst."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for style, dashes in zip(FORMATS, ("-", "--", ":", "-."), strict=True):  # they lie upon each other
        runs = [smooth(row["losses"]) for row in results["rows"] if row["format"] == style]
        steps = range(1, len(runs[0]) + 1)
        line = axes.plot(steps, [statistics.fmean(at) for at in zip(*runs, strict=True)], dashes, label=style)[0]
        low, high = ([f(at) for at in zip(*runs, strict=True)] for f in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    axes.set_ylim(top=3.2)  # the fall of the first steps would squeeze everything else
    axes.set(xlabel="step", ylabel="training loss [nats / character], smoothed", title="VSGD's state formats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of training, each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: bench/results)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a spread, got {args.seeds}")
    data = load_data()
    rows = run_all(data, args.seeds, args.steps)
    environment = {"cpu": cpu_model(), "torch": torch.__version__, "lr": LEARNING_RATE, "source": data.source}
    results = {"environment": environment, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "formats.json").write_text(json.dumps(results) + "\n")
    (args.out / "formats.md").write_text(summary(results))
    plot(results, args.out / "formats.png")
    print(summary(results))


if __name__ == "__main__":
    main()
