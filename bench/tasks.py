"""What is learned: batches of a data set, and how good a model is on the part it was not trained on.

A batch depends on the seed and the iteration alone, so that a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .augmentations import AUGMENTATIONS
from .checks import whole
from .datasets import Images, Text
from .metrics import ENTROPY_BINS, normalized_entropy

EVALUATION_BATCH = 250
TEXT_EVALUATION_BATCHES = 20
#: Which pictures are kept back to choose learning rates by is the same for every seed.
SPLIT_SEED = 20_000


def generator_of(seed: int, count: int) -> torch.Generator:
    """A generator for one batch or epoch of one seed; seeds are below 10,000."""
    return torch.Generator().manual_seed(count * 10_000 + seed)


class ImageTask:
    """Classification. Pictures are normalised by the mean and standard deviation of each channel of the training set.

    Args:
        data: the pictures.
        batch: how many in a batch; the last of an epoch that would be smaller are left out.
        augmentation: how training pictures are altered, in `AUGMENTATIONS`.
        examples: so many training pictures are used, or None for all; `held_back` others serve to choose by.
    """

    better = max  # of two values of `metric`
    metric = "accuracy"

    def __init__(
        self, data: Images, batch: int, augmentation: str = "none", examples: int | None = None, held_back: int = 1000
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}")
        for key, value in (("batch", batch), ("held_back", held_back), ("examples", examples)):
            if value is not None:
                whole(key, value, 1)
        order = torch.randperm(len(data.train_x), generator=generator_of(0, SPLIT_SEED))
        kept = order[held_back:][:examples]
        if len(kept) < (examples or batch) or len(kept) < batch:
            raise ValueError(
                f"{examples} examples in batches of {batch} and {held_back} held back do not fit {len(data.train_x)}"
            )
        self.train = data.train_x[kept], data.train_y[kept]
        self.parts = {
            "validation": (data.train_x[order[:held_back]], data.train_y[order[:held_back]]),
            "test": (data.test_x, data.test_y),
        }
        self.settings: dict[str, Any] = {"batch": batch, "augmentation": augmentation}
        self.settings |= {"examples": len(kept), "held_back": held_back}
        self.batch, self.augment, self.outputs = batch, AUGMENTATIONS[augmentation], data.classes
        self.shape = tuple(data.train_x.shape[1:])
        pixels = self.train[0].float().div_(255).transpose(0, 1).flatten(1)
        self.mean, self.std = pixels.mean(1).view(-1, 1, 1), pixels.std(1).clamp_min(1e-6).view(-1, 1, 1)
        self._epoch: tuple[int, int, Tensor] | None = None

    def training_batch(self, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
        """The pictures, normalised, and classes of one iteration, from 0."""
        per_epoch = len(self.train[0]) // self.batch
        epoch, place = divmod(iteration, per_epoch)
        if self._epoch is None or self._epoch[:2] != (seed, epoch):
            # Odd counts are epochs, even ones batches, so that no two share their random numbers.
            order = torch.randperm(len(self.train[0]), generator=generator_of(seed, 2 * epoch + 1))
            self._epoch = (seed, epoch, order)
        chosen = self._epoch[2][place * self.batch :][: self.batch]
        x = self.train[0][chosen]
        if self.augment is not None:
            x = self.augment(x, generator_of(seed, 2 * iteration))
        return self.normalized(x), self.train[1][chosen]

    def normalized(self, x: Tensor) -> Tensor:
        """Bytes [n, channels, height, width] as numbers of mean 0 and standard deviation 1."""
        return (x.float() / 255 - self.mean) / self.std

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, in nats."""
        return F.cross_entropy(outputs, targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str, device: torch.device) -> dict[str, Any]:
        """Accuracy and loss on "validation" or "test", and a histogram of the predictions' normalised entropy."""
        model.eval()
        correct, loss, entropies = 0, 0.0, []
        xs, ys = self.parts[part]
        for x, y in zip(xs.split(EVALUATION_BATCH), ys.split(EVALUATION_BATCH), strict=True):
            outputs, y = model(self.normalized(x).to(device)), y.to(device)
            correct += (outputs.argmax(1) == y).sum().item()
            loss += F.cross_entropy(outputs, y, reduction="sum").item()
            entropies.append(normalized_entropy(outputs).cpu())
        model.train()
        entropy = torch.cat(entropies)
        return {
            "accuracy": correct / len(ys),
            "loss": loss / len(ys),
            "entropy_mean": entropy.mean().item(),
            "entropy_histogram": torch.histc(entropy, ENTROPY_BINS, 0.0, 1.0).int().tolist(),
        }


class TextTask:
    """Prediction of each next character; what is measured is the loss in nats a character."""

    better = min
    metric = "loss"

    def __init__(self, data: Text, batch: int, context: int = 64) -> None:
        for key, value in (("batch", batch), ("context", context)):
            whole(key, value, 1)
        self.train = data.train
        self.parts = {"validation": data.validation, "test": data.test}
        self.batch, self.context, self.outputs, self.shape = batch, context, data.characters, (context,)
        if min(map(len, (data.train, data.validation, data.test))) <= context:
            raise ValueError(f"context of {context} does not fit the text")
        measured = TEXT_EVALUATION_BATCHES * batch * context
        self.settings = {"batch": batch, "context": context, "evaluation_characters": measured}

    def training_batch(self, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
        """Characters [batch, context], and those that follow, from random places."""
        return self._draw(self.train, generator_of(seed, 2 * iteration))

    def _draw(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - self.context, (self.batch, 1), generator=generator)
        chosen = text[starts + torch.arange(self.context + 1)]
        return chosen[:, :-1], chosen[:, 1:]

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, in nats."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str, device: torch.device) -> dict[str, Any]:
        """The loss on "validation" or "test": the same places for every seed and optimizer."""
        model.eval()
        losses = [self.loss(model(x.to(device)), y.to(device)).item() for x, y in self._evaluation_batches(part)]
        model.train()
        return {"loss": sum(losses) / len(losses)}

    def _evaluation_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(TEXT_EVALUATION_BATCHES):
            yield self._draw(self.parts[part], generator_of(9_999, i))


Task = ImageTask | TextTask


def make_task(data: Images | Text, settings: dict[str, Any]) -> Task:
    """The task of a data set with the settings of a configuration's [data] table."""
    kind = ImageTask if isinstance(data, Images) else TextTask
    try:
        return kind(data, **settings)
    except TypeError as error:
        raise ValueError(f"[data] has the settings {settings}: {error}") from None
