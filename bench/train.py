"""Trains what a configuration file says: `python -m bench.train bench/configs/NAME.toml`.

Every learning rate is tried with the first seed; the one that is best on the pictures or text kept back for that then
runs with all seeds. An interrupted command goes on where it was when it is given again. Writes NAME.json, .csv, .png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import atomic, checks, datasets, models, plots, runs, tasks
from .demo import CACHE
from .experiment import Contender, Experiment, load
from .fetch import DataError

RESULTS = Path(__file__).parent / "results" / "train"
COLUMNS = (
    "contender",
    "optimizer",
    "settings",
    "lr",
    "seed",
    "chosen",
    "parameters",
    "diverged_at",
    "training_seconds",
)

Records = list[dict[str, Any]]


def choose(records: Records, task: tasks.Task | type[tasks.Task]) -> float | None:
    """The learning rate whose run is best on what was kept back; None where all have diverged."""
    finished = [record for record in records if record["validation"]]
    if not finished:
        return None
    return task.better(finished, key=lambda record: record["validation"][task.metric])["lr"]


def run_all(
    experiment: Experiment, task: tasks.Task, execute: Callable[[Contender, float, int], dict[str, Any]]
) -> Records:
    """The records of all runs, `chosen` saying whether the run has the contender's chosen learning rate."""
    first, *others = experiment.seeds
    records = []
    most = sum(len(contender.lr) + len(others) for contender in experiment.contenders)
    with tqdm(total=most, desc=experiment.name, unit="run") as bar:
        for contender in experiment.contenders:
            own = []
            for lr in contender.lr:
                own.append(execute(contender, lr, first))
                bar.update()
            best = choose(own, task)
            for seed in others if best is not None else ():
                own.append(execute(contender, best, seed))
                bar.update()
            records += [{**record, "chosen": record["lr"] == best} for record in own]
    return records


def results_of(experiment: Experiment, task: tasks.Task, records: Records) -> dict[str, Any]:
    """What is committed; environments, which most runs share, stand once, and records have their numbers."""
    environments: list[dict[str, Any]] = []
    for record in records:
        if record["environment"] not in environments:
            environments.append(record["environment"])
    shared = [{**record, "environment": environments.index(record["environment"])} for record in records]
    return {
        "experiment": asdict(experiment),
        "task": task.settings,
        "hyperparameters": {contender.name: contender.hyperparameters() for contender in experiment.contenders},
        "metric": task.metric,
        "environments": environments,
        "runs": shared,
    }


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes NAME.json, NAME.csv and NAME.png."""
    name = results["experiment"]["name"]
    atomic.write_text(folder / f"{name}.json", json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    atomic.write(folder / f"{name}.csv", lambda path: _write_csv(results["runs"], path))
    atomic.write(folder / f"{name}.png", lambda path: plots.curves(results, path))


def _write_csv(records: Records, path: Path) -> None:
    measured = sorted({f"{part}_{key}" for r in records for part in ("validation", "test") for key in r[part] or ()})
    measured = [key for key in measured if not key.endswith("histogram")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *measured])
        for record in records:
            values = (part_of(record, *key.split("_", 1)) for key in measured)
            writer.writerow([*(record[key] for key in COLUMNS), *values])


def part_of(record: dict[str, Any], part: str, key: str) -> float | None:
    return record[part][key] if record[part] else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description="Trains what a configuration says.")
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="bench/configs/….toml")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the CPU (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: bench/results/train)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of data and checkpoints (default: .data)")
    args = parser.parse_args(argv)
    try:
        checks.whole("--threads", args.threads, 1)
        torch.set_num_threads(args.threads)
        device = checks.device(args.device)
        prepared = [_prepare(experiment, args.cache) for experiment in map(load, args.configs)]
        args.out.mkdir(parents=True, exist_ok=True)
        for experiment, task in prepared:
            _train(experiment, task, device, args.out, args.cache)
    except (ValueError, DataError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where this one was.", file=sys.stderr)
        return 130
    return 0


def _prepare(experiment: Experiment, cache: Path) -> tuple[Experiment, tasks.Task]:
    """The task of an experiment, once it is seen that the network and every optimizer can be made."""
    task = tasks.make_task(datasets.load(experiment.dataset, cache), experiment.data)
    model = models.build(experiment.model, experiment.model_settings, task.shape, task.outputs)
    for contender in experiment.contenders:
        contender.make(model, contender.lr[0], 0)
    return experiment, task


def _train(experiment: Experiment, task: tasks.Task, device: torch.device, out: Path, cache: Path) -> None:
    records = run_all(
        experiment,
        task,
        lambda contender, lr, seed: runs.execute(
            runs.Run(experiment, contender, lr, seed, device, cache / "runs"), task
        ),
    )
    write(results_of(experiment, task, records), out)
    print(f"{experiment.name}: {len(records)} runs; results are in {out}.")


if __name__ == "__main__":
    sys.exit(main())
