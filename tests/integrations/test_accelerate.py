"""Accelerate.

    optimizer = VSGD(model.parameters(), lr=1e-2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)  # before optimizer.step(), where accelerator.sync_gradients
    accelerator.save_state(folder)

`load_state(folder)` goes on to the bit.
"""

import contextlib

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from tests.cases import assert_same_bits
from tests.integrations.common import (
    CLIP,
    MICRO_BATCH,
    STEPS,
    assert_same_training,
    loss_of,
    make_data,
    make_model,
    make_scheduler,
    params_of,
)
from vsgd_kernels import VSGD
from vsgd_kernels.state_formats import FORMATS

ACCUMULATE = 2


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps the settings of the first Accelerator for all others of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A training by Accelerate."""

    def __init__(self, mixed_precision="no", dropout=0.0, **settings):
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATE
        )
        model = make_model(dropout)
        optimizer = VSGD(model.parameters(), lr=1e-2, **settings)
        loader = torch.utils.data.DataLoader(make_data(STEPS * ACCUMULATE), MICRO_BATCH)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, make_scheduler(optimizer)
        )

    def train(self, first=0, last=STEPS):
        """From one step to another."""
        loader = self.accelerator.skip_first_batches(self.loader, first * ACCUMULATE)
        for i, batch in enumerate(loader, first * ACCUMULATE):
            if i == last * ACCUMULATE:
                break
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def train_plainly(autocast):
    model = make_model()
    optimizer = VSGD(model.parameters(), lr=1e-2)
    scheduler = make_scheduler(optimizer)
    batches = iter(torch.utils.data.DataLoader(make_data(STEPS * ACCUMULATE), MICRO_BATCH))
    for _ in range(STEPS):
        for _ in range(ACCUMULATE):
            features, classes = next(batches)
            with autocast:
                output = model(features)
            loss = torch.nn.functional.cross_entropy(output.float(), classes)
            (loss / ACCUMULATE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("mixed_precision", "autocast"),
    [("no", contextlib.nullcontext()), ("bf16", torch.autocast("cpu", torch.bfloat16))],
    ids=["float32", "bf16"],
)
def test_equals_a_loop(mixed_precision, autocast):
    run = Run(mixed_precision)
    run.train()
    assert_same_training(run.optimizer.optimizer, train_plainly(autocast))


@pytest.mark.parametrize("style", FORMATS)
def test_load_state_goes_on_exactly(tmp_path, style):
    """With dropout, whose random state is saved too."""
    settings = {"dropout": 0.1, "state_format": style}
    whole = Run(**settings)
    whole.train(last=STEPS // 2)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(first=STEPS // 2)
    resumed = Run(**settings)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(first=STEPS // 2)
    assert_same_training(resumed.optimizer.optimizer, whole.optimizer.optimizer)


def test_overflow_is_no_step():
    """float16's loss scaling, which Accelerate sets up on a GPU only, as it does it there."""
    accelerate.Accelerator(cpu=True)
    model, twin = make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    optimizer = AcceleratedOptimizer(VSGD(model.parameters(), lr=1e-2), scaler=scaler)
    plain = VSGD(twin.parameters(), lr=1e-2)
    for i, batch in enumerate(torch.utils.data.DataLoader(make_data(3), MICRO_BATCH)):
        scaler.scale(loss_of(model, batch)).backward()
        if i == 1:
            model[0].weight.grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in params_of(optimizer)]
        optimizer.step()
        optimizer.zero_grad()
        if i == 1:
            assert_same_bits([p.detach() for p in params_of(optimizer)], before)
            assert scaler.get_scale() == 4.0
        else:
            plain.zero_grad()
            loss_of(twin, batch).backward()
            plain.step()
    assert_same_training(optimizer.optimizer, plain, steps=2)
