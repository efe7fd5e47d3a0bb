"""What the backends for GPUs share: tables on the device, one launch for all tensors of a path, device-side counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, Gradients, SampleBatch
from ..formats import extra_bits
from ..rules import arithmetic_dtype
from ..state_formats import format_of
from .device_samples import PreparedSamples, SampleLaunch
from .on_device import ALIGNMENT, Chunked, OnDevice, misaligned
from .scalars import DeviceScalars
from .table import COLUMNS, Table

_LAYOUT = COLUMNS.index("layout")
_ADDRESSES = [COLUMNS.index(name) for name in ("param", "low", "variance", "state0", "state1", "state2", "state3")]


class Path(NamedTuple):
    """What specialises a kernel.

    Attributes:
        dtype: of parameters and gradients.
        aligned: whether every address is a multiple of `ALIGNMENT`.
        strided: whether the operands run over memory in different orders.
        format: of the states.
        extra: bits of the masters beyond those of the parameters.
    """

    dtype: torch.dtype
    aligned: bool
    strided: bool
    format: str
    extra: int


class DeviceBackend(ABC):
    """A backend that steps all tensors of a `Path` in one launch; its classes launch the kernels.

    Attributes:
        chunk: elements that a program steps.
    """

    chunk = 1024
    alignment: int | None = ALIGNMENT

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Prepared:
        """Builds the tables on the device."""
        return Prepared(batch, grads, self.chunk)

    def norm(self, prepared: Prepared, grads: Gradients) -> None:
        """Torch finds it."""
        return None

    def run(self, prepared: Prepared, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch: one launch for each path, and before it one that counts where the counts are on the device.

        Only where they are not does a found_inf have to be waited for.
        """
        with prepared.guard():
            prepared.point_to(grads)
            if prepared.scalars and found_inf is not None:
                if found_inf.item():
                    return
                found_inf = None
            if prepared.scalars:
                prepared.count_on_host(prepared.scalars)
            else:
                prepared.take_hyper()
                for launch in prepared.launches:
                    self.count(prepared, launch, found_inf)
            for launch in prepared.launches:
                if launch.programs:
                    self.step(prepared, launch, grad_scale, found_inf)

    @abstractmethod
    def count(self, prepared: Prepared, launch: StepLaunch, found_inf: Tensor | None) -> None:
        """Counts a step of the launch's tensors, unless found_inf, and computes its scalars."""

    @abstractmethod
    def step(self, prepared: Prepared, launch: StepLaunch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the launch's tensors, unless found_inf."""

    def prepare_samples(self, batch: SampleBatch, samples: list[Tensor]) -> PreparedSamples:
        """Builds the tables on the device."""
        return PreparedSamples(batch, samples, self.chunk)

    def add_samples(self, prepared: PreparedSamples, samples: Gradients, counts: list[int]) -> None:
        """Adds samples: one launch for each path."""
        with prepared.guard():
            prepared.take(samples, counts)
            for launch in prepared.launches:
                if launch.programs:
                    self.add(prepared, launch)

    @abstractmethod
    def add(self, prepared: PreparedSamples, launch: SampleLaunch) -> None:
        """Adds the launch's samples."""


class Prepared(OnDevice):
    """A batch's launches."""

    def __init__(self, batch: Batch, grads: list[Tensor], chunk: int) -> None:
        super().__init__(batch.params[0].device)
        self.batch = batch
        self.chunk = chunk
        self.scalars = None if batch.capturable else DeviceScalars(batch, self.device)
        table, self.grads = Table(batch, grads), Gradients.of(grads).addresses
        aligned = ~(misaligned(table.rows[:, _ADDRESSES]).any(1) | misaligned(self.grads))
        strided = table.rows[:, _LAYOUT] >= 0
        paths: dict[Path, list[int]] = {}
        for i, param in enumerate(self.batch.params):
            style, extra = format_of(self.batch.states[i]), extra_bits(self.batch.lows[i])
            path = Path(param.dtype, bool(aligned[i]), bool(strided[i]), style, extra)
            paths.setdefault(path, []).append(i)
        self.hyper = self.upload(self.batch.hyper)
        self._hyper_version = self.batch.hyper._version
        self.launches = [StepLaunch(self, table, path, indices) for path, indices in paths.items()]

    def tensors(self) -> Iterator[Tensor]:
        """All that lies on the device."""
        yield self.hyper
        for launch in self.launches:
            yield from launch.tensors()

    def point_to(self, grads: Gradients) -> None:
        """Takes the addresses of gradients that are laid out and aligned as those it was built with."""
        before, self.grads = self.grads, grads.addresses
        if before is self.grads or torch.equal(before, self.grads):
            return
        for launch in self.launches:
            self.copy(launch.grads, self.grads if len(self.launches) == 1 else self.grads[launch.indices])

    def count_on_host(self, scalars: DeviceScalars) -> None:
        """Counts a step, and gives the launches the scalars of it."""
        if scalars.count(self.copy):
            self._streams.clear()  # none of them knows the new tensors
            for launch in self.launches:
                launch.scalar_row = self.upload(scalars.row[launch.indices])
        for launch in self.launches:
            launch.scalars = scalars.of[launch.arithmetic]

    def take_hyper(self) -> None:
        """Takes the hyperparameters, as far as they have changed, and learning rates that are on the device."""
        if self.batch.hyper._version != self._hyper_version:
            self._hyper_version = self.batch.hyper._version
            self.copy(self.hyper, self.batch.hyper.clone())
        for group, lr in self.batch.lrs.items():
            self.hyper[group, self.batch.rule.hyper.index("lr")] = lr


class StepLaunch(Chunked):
    """The tensors of one path, as the kernels see them; n of them.

    Attributes:
        arithmetic: the dtype that is computed in.
        grads: [n] int64, addresses of the gradients.
        scalar_row: [n] int64, the tensor's row of `scalars`.
        scalars: [rows, Rule.scalar_count] in arithmetic dtype, the scalars of the step.
    """

    def __init__(self, prepared: Prepared, table: Table, path: Path, indices: list[int]) -> None:
        super().__init__(prepared, table, indices, prepared.chunk)
        self.path = path
        self.arithmetic = arithmetic_dtype(path.dtype)
        self.grads = prepared.upload(prepared.grads[self.indices])
        if prepared.scalars:
            self.scalar_row = prepared.upload(prepared.scalars.row[self.indices])
            self.scalars = prepared.scalars.of[self.arithmetic]
        else:
            self.scalar_row = prepared.upload(torch.arange(len(indices), device="cpu"))
            shape = (len(indices), prepared.batch.rule.scalar_count)
            self.scalars = torch.empty(shape, dtype=self.arithmetic, device=prepared.device)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that lies on the device."""
        return *super().tensors(), self.grads, self.scalar_row, self.scalars
