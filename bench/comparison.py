"""What the runs of `bench.train` say of two contenders, seed by seed."""

from __future__ import annotations

from typing import Any

from . import plots
from .metrics import Spread, spread

#: How a metric is shown: its name, the factor, digits, and whether more is better.
METRICS = {"accuracy": ("test accuracy, %", 100.0, 2, True), "loss": ("test loss, nats / character", 1.0, 4, False)}

Results = dict[str, Any]


def finals(results: Results) -> dict[str, list[float]]:
    """The test metric of each contender's runs with the chosen learning rate."""
    return {
        name: [run["test"][results["metric"]] for run in own] for name, own in plots.chosen_runs(results).items() if own
    }


def gains(results: Results, a: str, b: str) -> list[float] | None:
    """By how much contender a ended better than b, for each seed, as it is shown; None where runs diverged."""
    _, scale, _, more = METRICS[results["metric"]]
    values = finals(results)
    if a not in values or b not in values or len(values[a]) != len(values[b]):
        return None
    return [(x - y) * scale * (1 if more else -1) for x, y in zip(values[a], values[b], strict=True)]


def at_edge(results: Results, name: str) -> bool:
    """Whether a contender's chosen learning rate is the smallest or largest of those tried."""
    grid = next(c["lr"] for c in results["experiment"]["contenders"] if c["name"] == name)
    chosen = {run["lr"] for run in results["runs"] if run["contender"] == name and run["chosen"]}
    return len(grid) > 1 and bool(chosen & {min(grid), max(grid)})


def verdict(results: Results | None, a: str, b: str) -> str:
    """Whether a is better than b, in a word or two: "yes" and "no" are said only where all seeds agree."""
    if results is None:
        return "not run"
    found = gains(results, a, b)
    if found is None:
        return "diverged"
    ahead = sum(gain > 0 for gain in found)
    return "yes" if ahead == len(found) else "no" if ahead == 0 else "no clear difference"


def compare(results: Results, a: str, b: str) -> str:
    """How much better or worse a ended than b, in one sentence."""
    found = gains(results, a, b)
    if found is None:
        return f"{a} and {b} cannot be compared: some of their runs diverged."
    _, _, digits, more = METRICS[results["metric"]]
    difference = spread(found)
    size = Spread(abs(difference.mean), difference.sd, difference.n).text(digits) + (" points" if more else " nats")
    sign = "ahead of" if difference.mean > 0 else "behind"
    if verdict(results, a, b) == "no clear difference":
        return f"No clear difference: {a} is {sign} {b} by {size}, but not with all seeds."
    return f"{a} is {sign} {b} with all seeds, by {size}."
