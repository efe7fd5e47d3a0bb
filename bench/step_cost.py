"""What a step costs: `python -m bench.step_cost`. All optimizers are measured in turn, in one process."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from .cases import BASELINE, CASES, OPTIMIZERS, Entry, count, make_params
from .host_time import check_folders, environment

Row = dict[str, str | int | float | None]

WARMUP = 2
#: Slow optimizers step in every so many rounds.
SLOW_EVERY = 15
#: A spread that a quiet machine does not show.
NOISY = 0.5
#: Rounds when none are asked for: as many as step this many parameters, within bounds.
_PARAMETERS, _FEWEST, _MOST = 2_500_000_000, 50, 300


def measure(case: str, optimizers: dict[str, Entry], rounds: int) -> list[Row]:
    """Times `step()` of each optimizer over the parameters of a case.

    The optimizers share parameters and gradients, and in each round step once in turn, so that whatever else the
    machine does meets all of them alike.

    Args:
        case: a name in `CASES`.
        optimizers: by name; ratios are to `BASELINE`, and None where it is not among them.
        rounds: how often each steps; a slow one does once in `SLOW_EVERY` rounds.

    Returns:
        A row an optimizer. Times are medians; `spread` is the distance between the quartiles over the median; GB/s
        counts the bytes of the byte limit only.
    """
    params, numel = make_params(CASES[case]), count(CASES[case])
    made = {name: entry.make(params) for name, entry in optimizers.items()}
    for optimizer in made.values():
        for _ in range(WARMUP):
            optimizer.step()
    seconds = _time_in_turn(case, made, [name for name, entry in optimizers.items() if entry.slow], rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = optimizers.get(BASELINE)
    return [
        {
            "case": case,
            "optimizer": name,
            "parameters": numel,
            "rounds": rounds,
            "steps": len(seconds[name]),
            "ms": median[name] * 1e3,
            "spread": _spread(seconds[name]),
            "ns_per_parameter": median[name] * 1e9 / numel,
            "gb_per_s": entry.bytes_per_parameter * numel / median[name] / 1e9,
            "ratio": median[name] / median[BASELINE] if baseline else None,
            "byte_limit_ratio": entry.bytes_per_parameter / baseline.bytes_per_parameter if baseline else None,
        }
        for name, entry in optimizers.items()
    ]


def _time_in_turn(
    case: str, optimizers: dict[str, torch.optim.Optimizer], slow: list[str], rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    shuffle = random.Random(0).shuffle
    for i in tqdm(range(rounds), desc=case, unit="round"):
        turn = [name for name in optimizers if name not in slow or i % SLOW_EVERY == 0]
        shuffle(turn)  # none always finds the caches as the same other one left them
        for name in turn:
            begin = time.perf_counter()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _spread(times: list[float]) -> float | None:
    if len(times) < 4:
        return None  # too few to tell
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / median


def default_rounds(case: str) -> int:
    return max(_FEWEST, min(_MOST, _PARAMETERS // count(CASES[case])))


def render(env: dict[str, str | int], rows: list[Row], tablefmt: str) -> str:
    """The rows as text: what they were measured on, and one table."""
    rounds = {row["case"]: row["rounds"] for row in rows}
    head = (
        f"CPU: {env['cpu']}; {env['threads']} threads; torch {env['torch']}; float32.\n"
        f"Rounds: {', '.join(f'{case} {n}' for case, n in rounds.items())}. Times are medians of `step()` alone."
    )
    if any(row["spread"] is not None and row["spread"] > NOISY for row in rows):
        head += f"\nSpreads above {NOISY:.0%}: the machine was not quiet, measure again before you trust those ratios."
    columns = {
        "case": "case",
        "optimizer": "optimizer",
        "steps": "steps",
        "ms": "ms",
        "spread": "spread",
        "ns_per_parameter": "ns / parameter",
        "gb_per_s": "GB/s",
        "ratio": f"time / {BASELINE}",
        "byte_limit_ratio": "byte limit",
    }
    formats = ("", "", "", ".3f", ".0%", ".3f", ".1f", ".2f", ".3f")
    cells = [[row[key] for key in columns] for row in rows]
    return f"{head}\n\n{tabulate(cells, list(columns.values()), tablefmt=tablefmt, floatfmt=formats, missingval='-')}\n"


def main(
    argv: list[str] | None = None,
    optimizers: dict[str, Entry] = OPTIMIZERS,
    name: str = "step_cost",
    what: str = "a step costs",
) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=f"Measures what {what}.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, metavar="N", help="rounds (default: fewer for larger cases)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    check_folders(parser, args.markdown, args.json)

    torch.set_num_threads(args.threads)
    env = environment()
    rows = [row for case in args.cases for row in measure(case, optimizers, args.steps or default_rounds(case))]
    print(render(env, rows, "simple"))
    if args.markdown:
        args.markdown.write_text(render(env, rows, "github"))
    if args.json:
        args.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
