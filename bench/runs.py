"""One training run: checkpointed, and resumed to the bit (on the CPU with the same number of threads)."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vsgd_kernels import backends

from . import atomic, models
from .checks import first_line
from .experiment import Contender, Experiment
from .host_time import cpu_model
from .tasks import Task

#: The paper's: after each `halve_every` iterations the learning rate is half of what it was.
HALVING = 0.5
PACKAGES = ("triton", "numpy", "scikit-learn", "pillow", "vsgd-kernels")


@dataclass(frozen=True)
class Run:
    """A run of an experiment, and where it keeps its files."""

    experiment: Experiment
    contender: Contender
    lr: float
    seed: int
    device: torch.device
    folder: Path

    def path(self, suffix: str) -> Path:
        """A file's; its name changes with every setting, so that another setting is another run."""
        name = re.sub(r"[^A-Za-z0-9.]+", "_", self.contender.name)
        fingerprint = self.experiment.fingerprint(self.contender, self.device)
        label = f"{name}-lr{self.lr!r}-seed{self.seed}-{fingerprint}"
        return self.folder / self.experiment.name / f"{label}{suffix}"

    def record(self) -> dict[str, Any] | None:
        """What the run measured, if it has ended."""
        path = self.path(".json")
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise RuntimeError(f"{path} is no record of a run ({error}); delete it to run anew") from None
        return {**record, "contender": self.contender.name}  # which may have been another's with the same settings


def execute(run: Run, task: Task) -> dict[str, Any]:
    """The run's record; it begins, or goes on from its last checkpoint, unless it has ended before.

    A loss that is not finite, in training or on what was kept back, ends a run: `diverged_at` is then the iteration at
    which that was seen, and `validation` and `test` are None.
    """
    if (record := run.record()) is not None:
        return record
    trainer = _Trainer(run, task)
    trainer.train()
    record = trainer.record()
    atomic.write_text(run.path(".json"), json.dumps(record) + "\n")
    run.path(".pt").unlink(missing_ok=True)
    return record


class _Trainer:
    """Model, optimizer and schedule of a run; everything that a checkpoint holds."""

    def __init__(self, run: Run, task: Task) -> None:
        self.run, self.task = run, task
        torch.manual_seed(run.seed)  # of the initialisation; no model here draws numbers in training
        experiment = run.experiment
        self.model = models.build(experiment.model, experiment.model_settings, task.shape, task.outputs).to(run.device)
        self.optimizer = run.contender.make(self.model, run.lr, run.seed)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, experiment.halve_every, HALVING)
        self.iteration, self.seconds, self.diverged_at = 0, 0.0, None
        self.history: list[dict[str, Any]] = []
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        if run.path(".pt").exists():
            self._resume(run.path(".pt"))

    def train(self) -> None:
        total = self.run.experiment.iterations
        every = max(1, total // self.run.experiment.evaluations)
        metric = self.task.metric
        name = f"{self.run.contender.name}, lr {self.run.lr:g}, seed {self.run.seed}"
        with tqdm(total=total, initial=self.iteration, desc=name, unit="it", leave=False) as bar:
            while self.iteration < total and self.diverged_at is None:
                until = min(self.iteration - self.iteration % every + every, total)
                loss = self._interval(until, bar)
                measured = self.task.evaluate(self.model, "validation", self.run.device)
                if not (math.isfinite(loss) and math.isfinite(measured["loss"])):
                    self.diverged_at = self.iteration
                    return
                measured.pop("entropy_histogram", None)
                lr = self.schedule.get_last_lr()[0]
                self.history.append({"iteration": until, "lr": lr, "train_loss": loss, "validation": measured})
                bar.set_postfix({"training loss": f"{loss:.3f}", metric: f"{measured[metric]:.3f}"})
                if until < total:
                    atomic.write(self.run.path(".pt"), self._save)

    def _interval(self, until: int, bar: tqdm) -> float:
        """Trains up to an iteration; the mean training loss of what it trained."""
        begin, count = time.perf_counter(), until - self.iteration
        total = torch.zeros((), device=self.run.device)
        while self.iteration < until:
            inputs, targets = self.task.training_batch(self.run.seed, self.iteration)
            loss = self.task.loss(self.model(inputs.to(self.run.device)), targets.to(self.run.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()  # read by the host once an interval, for each reading waits for a GPU
            self.iteration += 1
            bar.update()
        mean = total.item() / count
        self.seconds += time.perf_counter() - begin
        return mean

    def record(self) -> dict[str, Any]:
        contender, done = self.run.contender, self.diverged_at is None
        return {
            "contender": contender.name,
            "optimizer": contender.optimizer,
            "settings": contender.settings,
            "lr": self.run.lr,
            "seed": self.run.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "diverged_at": self.diverged_at,
            "validation": self.task.evaluate(self.model, "validation", self.run.device) if done else None,
            "test": self.task.evaluate(self.model, "test", self.run.device) if done else None,
            "training_seconds": self.seconds,
            "history": self.history,
            "environment": environment(self.run.device),
        }

    def _save(self, path: Path) -> None:
        here = {"iteration": self.iteration, "seconds": self.seconds, "history": self.history}
        torch.save({**here, **{name: part.state_dict() for name, part in self.parts.items()}}, path)

    def _resume(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location=self.run.device, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.iteration, self.seconds, self.history = saved["iteration"], saved["seconds"], saved["history"]
        except Exception as error:  # whatever torch.load or load_state_dict say of a file that is none of theirs
            raise RuntimeError(
                f"{path} is no checkpoint of this run ({first_line(error)}); delete it to begin anew"
            ) from error


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "backend": backends.choose(None, device).name,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which its metadata may lack
        **versions,
    }
