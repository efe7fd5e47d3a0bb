"""What the runs of `bench.train` say of two contenders, seed by seed."""

from __future__ import annotations

from typing import Any

from . import plots
from .metrics import Spread, spread

#: How a metric is shown: its name, the factor, digits, and whether more is better.
METRICS = {"accuracy": ("test accuracy, %", 100.0, 2, True), "loss": ("test loss, nats / character", 1.0, 4, False)}

Results = dict[str, Any]


def finals(results: Results) -> dict[str, dict[int, float]]:
    """The test metric of each contender's runs with the chosen learning rate that have ended, by seed."""
    return {
        name: {run["seed"]: run["test"][results["metric"]] for run in own}
        for name, own in plots.chosen_runs(results).items()
        if own
    }


def gains(results: Results, a: str, b: str) -> list[float] | None:
    """By how much contender a ended better than b, for each seed, as it is shown; None where runs diverged."""
    _, scale, _, more = METRICS[results["metric"]]
    values, seeds = finals(results), results["experiment"]["seeds"]
    x, y = values.get(a, {}), values.get(b, {})
    if not all(seed in x and seed in y for seed in seeds):
        return None
    return [(x[seed] - y[seed]) * scale * (1 if more else -1) for seed in seeds]


def at_edge(results: Results, name: str) -> bool:
    """Whether a contender's chosen learning rate is the smallest or largest of those tried."""
    grid = next(c["lr"] for c in results["experiment"]["contenders"] if c["name"] == name)
    chosen = {run["lr"] for run in results["runs"] if run["contender"] == name and run["chosen"]}
    return len(grid) > 1 and bool(chosen & {min(grid), max(grid)})


def brief(results: Results | None, a: str, b: str) -> str:
    """Where a ended beside b, in few words."""
    if results is None:
        return "not run"
    difference = _difference(results, a, b)
    if difference is None:
        return "some runs diverged"
    side, size, agree = difference
    if agree:
        seeds = len(results["experiment"]["seeds"])
        return f"{side} with {'the only seed' if seeds == 1 else f'all {seeds} seeds'}, by {size}"
    return f"no clear difference ({side} by {size})"


def compare(results: Results, a: str, b: str) -> str:
    """How much better or worse a ended than b, in one sentence."""
    difference = _difference(results, a, b)
    if difference is None:
        return f"{a} and {b} cannot be compared: some of their runs diverged."
    side, size, agree = difference
    beside = f"ahead of {b}" if side == "ahead" else f"behind {b}"
    if agree:
        only = len(results["experiment"]["seeds"]) == 1
        return f"{a} is {beside} with {'the only seed' if only else 'all seeds'}, by {size}."
    return f"No clear difference: {a} is {beside} by {size}, but not with all seeds."


def _difference(results: Results, a: str, b: str) -> tuple[str, str, bool] | None:
    """Whether a ended ahead or behind, by how much, and whether all seeds agree."""
    found = gains(results, a, b)
    if found is None:
        return None
    _, _, digits, more = METRICS[results["metric"]]
    difference = spread(found)
    size = Spread(abs(difference.mean), difference.sd, difference.n).text(digits) + (" points" if more else " nats")
    agree = all(gain > 0 for gain in found) or all(gain < 0 for gain in found)
    return "ahead" if difference.mean > 0 else "behind", size, agree
