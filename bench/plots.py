"""Plots of training runs, from their results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

LABELS = {"accuracy": "accuracy on pictures kept back", "loss": "loss on text kept back [nats / character]"}


def chosen_runs(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs with the chosen learning rate that have ended, by contender, in the configuration's order."""
    by_name: dict[str, list[dict[str, Any]]] = {c["name"]: [] for c in results["experiment"]["contenders"]}
    for run in results["runs"]:
        if run["chosen"] and run["test"]:
            by_name[run["contender"]].append(run)
    return by_name


def curves(results: dict[str, Any], path: Path) -> None:
    """Training loss, and the metric on what was kept back: the mean over seeds, and a band from worst to best."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    metric = results["metric"]
    for name, own in chosen_runs(results).items():
        if not own:
            continue
        label = f"{name}, lr {own[0]['lr']:g}"
        _band(axes[0], _by_iteration(own, lambda entry: entry["train_loss"]), label)
        _band(axes[1], _by_iteration(own, lambda entry: entry["validation"][metric]), label)
    axes[0].set(xlabel="iteration", ylabel="training loss [nats]", title=results["experiment"]["name"])
    axes[1].set(xlabel="iteration", ylabel=LABELS[metric])
    axes[1].legend(fontsize="small")
    _save(figure, axes, path)


def versus(points: dict[float, list[float]], xlabel: str, ylabel: str, path: Path) -> None:
    """Values of several seeds over a setting on a logarithmic axis: each value, and the line through the means."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    _band(axis, points, None)
    for x, values in points.items():
        axis.scatter([x] * len(values), values, color="black", s=12, zorder=3)
    axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    _save(figure, [axis], path)


def entropies(results: dict[str, Any], path: Path) -> None:
    """Histograms of the test predictions' normalised entropy, the mean over seeds, on a logarithmic axis."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, own in chosen_runs(results).items():
        if not own:
            continue
        histograms = [run["test"]["entropy_histogram"] for run in own]
        share = [statistics.fmean(counts) / sum(histograms[0]) for counts in zip(*histograms, strict=True)]
        edges = [i / len(share) for i in range(len(share) + 1)]
        axis.stairs(share, edges, label=f"{name}, lr {own[0]['lr']:g}", linewidth=1.8)
    axis.set(xlabel="normalised entropy of a prediction", ylabel="share of the test set", yscale="log")
    axis.legend()
    _save(figure, [axis], path)


def _by_iteration(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[float, list[float]]:
    """A value of each entry of the runs' histories."""
    points: dict[float, list[float]] = {}
    for entry in (entry for run in runs for entry in run["history"]):
        points.setdefault(entry["iteration"], []).append(value(entry))
    return points


def _band(axis: Any, points: dict[float, list[float]], label: str | None) -> None:
    """The line through the means of the values at each x, and a band from the smallest to the largest."""
    xs, columns = list(points), list(points.values())
    line = axis.plot(xs, list(map(statistics.fmean, columns)), label=label)[0]
    axis.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.2)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, axes: Any, path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
    # Without the version and date that matplotlib writes into it, the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
