"""What a configuration file says: `load(path)` reads and checks it. bench/README.md describes its keys."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import vsgd_kernels

from .checks import of_type, whole
from .datasets import DATASETS
from .models import MODELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The classes that a configuration may name.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "VSGD": vsgd_kernels.VSGD,
    "ConstantVSGD": vsgd_kernels.ConstantVSGD,
    "StochGradAdam": vsgd_kernels.StochGradAdam,
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}
#: The types of a configuration's keys that are no whole numbers.
KINDS = {
    **dict.fromkeys(("question", "dataset", "model"), str),
    **dict.fromkeys(("seeds", "optimizer"), list),
    **dict.fromkeys(("data", "model_settings"), dict),
}
#: Those whose rounding or sampling has a seed, which is the run's.
SEEDED = (vsgd_kernels.VSGD, vsgd_kernels.ConstantVSGD, vsgd_kernels.StochGradAdam)


@dataclass(frozen=True)
class Contender:
    """An optimizer with settings, and the learning rates that are tried for it."""

    name: str
    optimizer: str
    lr: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def hyperparameters(self) -> dict[str, Any]:
        """All of the optimizer's settings but the learning rate, those by default too."""
        defaults = self.make(torch.nn.Linear(1, 1), self.lr[0], 0).defaults
        return {key: value for key, value in defaults.items() if key not in ("lr", "seed")}

    def make(self, model: torch.nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
        """The optimizer of a run."""
        kind = OPTIMIZERS[self.optimizer]
        seeded = {"seed": seed} if kind in SEEDED else {}
        try:
            return kind(model.parameters(), lr=lr, **seeded, **self.settings)
        except TypeError as error:
            raise ValueError(f"optimizer {self.name!r}: {error}") from None


@dataclass(frozen=True)
class Experiment:
    """A configuration. Every learning rate is tried with the first seed; the best then runs with all of them."""

    name: str
    question: str
    dataset: str
    model: str
    iterations: int
    halve_every: int
    seeds: tuple[int, ...]
    contenders: tuple[Contender, ...]
    evaluations: int = 10
    data: dict[str, Any] = field(default_factory=dict)
    model_settings: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self, contender: Contender, device: torch.device) -> str:
        """Changes with every setting that changes a run of this contender, and with the kind of device."""
        said = {**asdict(self), "device": device.type}
        for key in ("name", "question", "seeds", "contenders"):
            del said[key]
        said["contender"] = {key: value for key, value in asdict(contender).items() if key not in ("name", "lr")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path) -> Experiment:
    """Reads a configuration.

    Raises:
        ValueError: it is missing, no TOML, or says something that cannot be; the message names the key.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    try:
        return parse(path.stem, said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse(name: str, said: dict[str, Any]) -> Experiment:
    """An experiment from the tables of its configuration."""
    said = {"optimizer": [], "seeds": [], **said}
    for key, kind in KINDS.items():
        if key in said:
            of_type(key, said[key], kind)
    contenders = tuple(_contender(entry) for entry in said.pop("optimizer"))
    try:
        experiment = Experiment(name, contenders=contenders, **{**said, "seeds": tuple(said["seeds"])})
    except TypeError as error:  # a key is missing or unknown; the message has its name
        raise ValueError(str(error).partition(" ")[2]) from None
    _one_of("dataset", experiment.dataset, DATASETS)
    _one_of("model", experiment.model, MODELS)
    for key in ("iterations", "halve_every", "evaluations"):
        whole(key, getattr(experiment, key), 1)
    seeds = experiment.seeds
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int and 0 <= s < 9_999 for s in seeds):
        raise ValueError(f"seeds must be different whole numbers from 0 to 9998, at least one, got {list(seeds)}")
    if len({c.name for c in contenders}) < max(1, len(contenders)):
        raise ValueError("[[optimizer]] must stand there at least once, each with a name of its own")
    trials = {c.name: len(c.lr) for c in contenders}
    if len(set(trials.values())) > 1:
        raise ValueError(f"every optimizer must have the same number of learning rates, got {trials}")
    return experiment


def _contender(entry: Any) -> Contender:
    of_type("optimizer", entry, dict)
    unknown = set(entry) - {"name", "class", "lr", "settings"}
    if unknown or "class" not in entry or "lr" not in entry:
        raise ValueError(f"an [[optimizer]] has a class, an lr, and may have a name and settings, got {entry}")
    for key, kind in (("class", str), ("name", str), ("settings", dict)):
        of_type(key, entry.get(key, kind()), kind)
    _one_of("class", entry["class"], OPTIMIZERS)
    lr = entry["lr"] if isinstance(entry["lr"], list) else [entry["lr"]]
    if not lr or not all(type(x) in (float, int) and 0 < x < math.inf for x in lr) or len(set(lr)) < len(lr):
        raise ValueError(f"lr must be different positive numbers, got {entry['lr']!r}")
    return Contender(
        entry.get("name", entry["class"]), entry["class"], tuple(map(float, lr)), entry.get("settings", {})
    )


def _one_of(key: str, value: Any, known: dict[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}")
