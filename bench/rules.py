"""What the rules do, in plots: `python -m bench.rules`. Writes rules.json, rules_steps.png and rules_posterior.png.

First, the step that each rule takes on the same noisy gradients. Second, what VSGD learns of gradients whose noise and
whose change are known: its gain, which has a best value then (Kalman's), its posterior variance and its rates.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsgd_kernels import VSGD, ConstantVSGD, SampleVSGD, StochGradAdam

RESULTS = Path(__file__).parent / "results"
ELEMENTS = 2048
#: Of the first problem: the noise's standard deviation, and the gradient, which changes its sign half-way.
NOISE, GRADIENT, STEPS = 1e-3, 5e-4, 400
#: Of the second: the ratio of the noise's variance to that of the gradient's change from step to step, and the noise's
#: standard deviations, half the elements each.
RATIOS, NOISES, LEARNING = (1.0, 10.0, 100.0, 1000.0), (1e-3, 1.0), 10_000

#: Classes and settings; `lr` is 1, so that a parameter's change is the step.
RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "VSGD": (VSGD, {}),
    "SampleVSGD, 8 samples": (SampleVSGD, {}),
    "ConstantVSGD": (ConstantVSGD, {}),
    "StochGradAdam": (StochGradAdam, {}),
    "Adam": (torch.optim.Adam, {}),
}


def steps(name: str) -> Tensor:
    """[STEPS, ELEMENTS] the steps of a rule, against the gradient, on the same gradients as the other rules'."""
    rule, settings = RULES[name]
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = rule([param], lr=1.0, **settings)
    taken = []
    for t in range(STEPS):
        before = param.detach().clone()
        mean = GRADIENT if t < STEPS // 2 else -GRADIENT
        # Eight samples of eight times the variance; the other rules see their mean.
        samples = mean + NOISE * math.sqrt(8) * torch.randn(8, ELEMENTS, generator=generator)
        if rule is SampleVSGD:
            param.grad_sample = samples
        else:
            param.grad = samples.mean(0)
        optimizer.step()
        taken.append(before - param.detach())
    return torch.stack(taken)


def kalman_gain(ratio: float) -> float:
    """The best constant gain where the noise has `ratio` times the variance of the gradient's change."""
    # The posterior variance p, in units of the noise's, that one step of change and measurement reproduces.
    change = 1.0 / ratio
    return (math.sqrt(change * change + 4.0 * change) - change) / 2.0


def learned(ratio: float, noise: float) -> dict[str, list[float]]:
    """What VSGD believes, step by step, of gradients that walk at random, seen through noise; means over elements."""
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = VSGD([param], lr=1e-3)
    gradient = torch.zeros(ELEMENTS)
    record: dict[str, list[float]] = {key: [] for key in ("t", "gain", "noise", "change", "error", "variance", "best")}
    log = {round(10 ** (i / 12)) for i in range(12 * 5)}
    kalman, best = torch.zeros(ELEMENTS), kalman_gain(ratio)
    for t in range(1, LEARNING + 1):
        gradient += noise / math.sqrt(ratio) * torch.randn(ELEMENTS, generator=generator)
        seen = gradient + noise * torch.randn(ELEMENTS, generator=generator)
        param.grad = seen
        optimizer.step()
        kalman += best * (seen - kalman)
        if t in log:
            (posterior,) = optimizer.get_current_posterior()
            state = optimizer.state[param]
            two_a = 2e-8 + 1.0 + 1e-4
            record["t"].append(t)
            record["gain"].append((1.0 - posterior.beta1).median().item())
            # In units of the noise's variance: the mean of an inverse gamma of shape a and rate b is near b / a.
            record["noise"].append((state["bhg"] / two_a).median().item() / noise**2)
            record["change"].append((state["bg"] / two_a).median().item() / noise**2 * ratio)
            record["variance"].append(posterior.variance.median().item() / noise**2)
            record["error"].append((posterior.mean - gradient).square().mean().item() / noise**2)
            record["best"].append((kalman - gradient).square().mean().item() / noise**2)
    return record


def plot_steps(taken: dict[str, Tensor], out: Path) -> None:
    """The mean step of each rule, and how much it varies between elements that differ by their noise only."""
    figure, axes = _figure(2, 1, (8, 7))
    for name, steps_of in taken.items():
        axes[0].plot(steps_of.mean(1), label=name, linewidth=1.3)
        axes[1].plot(steps_of.std(1), label=name, linewidth=1.3)
    axes[0].set(title="Mean step / lr over elements", ylabel="step / lr")
    axes[1].set(title="Standard deviation of the step over elements", xlabel="step", ylabel="step / lr", ylim=(0, 1.3))
    axes[0].axvline(STEPS // 2, color="gray", linewidth=0.8, linestyle=":")
    axes[0].legend(ncols=2)
    _save(figure, axes, out)


def plot_learned(records: list[dict[str, Any]], out: Path) -> None:
    """What VSGD learns, beside the truth."""
    figure, axes = _figure(2, 2, (10, 8))
    colors = dict(zip(RATIOS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    for r in records:
        style = "-" if r["sd"] == NOISES[1] else "--"
        color = colors[r["ratio"]]
        label = f"ratio {r['ratio']:g}, noise {r['sd']:g}"
        axes[0].plot(r["t"], r["gain"], style, color=color, label=label)
        axes[1].plot(r["t"], r["noise"], style, color=color)
        axes[2].plot(r["t"], r["change"], style, color=color)
        axes[3].plot(r["t"], [e / b for e, b in zip(r["error"], r["best"], strict=True)], style, color=color)
    for ratio, color in colors.items():
        axes[0].axhline(kalman_gain(ratio), color=color, linestyle=":", linewidth=1)
    for i in (1, 2, 3):
        axes[i].axhline(1.0, color="black", linestyle=":", linewidth=1)
    axes[0].set(title="Learned gain w (dotted: the best constant gain)", ylabel="w")
    axes[1].set(title="Learned variance of the noise / true")
    axes[2].set(title="Learned variance of the gradient's change / true", xlabel="step")
    axes[3].set(title="Mean square error of μ / the best filter's", xlabel="step")
    for axis in axes:
        axis.set(xscale="log", yscale="log")
    axes[0].legend(fontsize=7)
    _save(figure, axes, out)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    return figure, list(axes.flat)


def _save(figure: Any, axes: list[Any], out: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rules", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    out = parser.parse_args(argv).out
    torch.set_num_threads(1)  # more only wait for each other at this size
    taken = {name: steps(name) for name in RULES}
    plot_steps(taken, out / "rules_steps.png")
    records = [{"ratio": ratio, "sd": sd, **learned(ratio, sd)} for ratio in RATIOS for sd in NOISES]
    plot_learned(records, out / "rules_posterior.png")
    half = STEPS // 2
    summary = {
        name: {
            "mean": round(s[half // 2 : half].mean().item(), 4),
            "sd over elements": round(s[half // 2 : half].std(1).mean().item(), 4),
            "steps until the mean step has turned": int((s[half:].mean(1) < 0).int().argmax()) + 1,
        }
        for name, s in taken.items()
    }
    rounded = [
        {key: [float(f"{x:.4g}") for x in v] if isinstance(v, list) else v for key, v in record.items()}
        for record in records
    ]
    (out / "rules.json").write_text(json.dumps({"steps": summary, "posterior": rounded}) + "\n")
    for name, row in summary.items():
        print(name, row)
    for r in records:
        print(
            f"ratio {r['ratio']:g}, noise {r['sd']:g}: gain {r['gain'][-1]:.3g} (best {kalman_gain(r['ratio']):.3g}), "
            f"noise x{r['noise'][-1]:.3g}, change x{r['change'][-1]:.3g}, "
            f"error {r['error'][-1]:.3g} (best {r['best'][-1]:.3g}, believed {r['variance'][-1]:.3g})"
        )


if __name__ == "__main__":
    main()
