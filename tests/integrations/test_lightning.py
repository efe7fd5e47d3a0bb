"""PyTorch Lightning.

    def configure_optimizers(self):
        optimizer = VSGD(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}

`Trainer(gradient_clip_val=1.0)` works as it is at full precision. At "bf16-mixed" and "16-mixed" Lightning refuses to
clip for optimizers that unscale gradients themselves, as torch's fused ones do. There, leave it to the scaler:
`optimizer._step_supports_amp_scaling = False` in `configure_optimizers`.
"""

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from tests.integrations.common import (
    CLIP,
    MICRO_BATCH,
    STEPS,
    assert_same_training,
    loss_of,
    make_data,
    make_model,
    make_scheduler,
)
from vsgd_kernels import VSGD
from vsgd_kernels.state_formats import FORMATS

EPOCHS = 4
PER_EPOCH = STEPS // EPOCHS


class Module(lightning.LightningModule):
    """As a user would write it."""

    def __init__(self, interrupted_at=None, unscales=True, **settings):
        super().__init__()
        self.model = make_model()
        self.settings = settings
        self.unscales = unscales
        self.interrupted_at = interrupted_at

    def training_step(self, batch, index):
        if self.global_step == self.interrupted_at:
            raise InterruptedError
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        optimizer = VSGD(self.parameters(), lr=1e-2, **self.settings)
        if not self.unscales:
            optimizer._step_supports_amp_scaling = False
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}


def fit(folder, module, checkpoint=None, **settings):
    """Trains to the end."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        default_root_dir=folder,
        callbacks=[lightning.callbacks.ModelCheckpoint(save_top_k=-1, every_n_epochs=EPOCHS // 2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(make_data(PER_EPOCH), MICRO_BATCH), ckpt_path=checkpoint)
    return trainer.optimizers[0]


def train_plainly(clip, autocast=torch.float32, scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model = make_model()
    optimizer = VSGD(model.parameters(), lr=1e-2)
    scheduler = make_scheduler(optimizer)
    for _ in range(EPOCHS):
        for batch in torch.utils.data.DataLoader(make_data(PER_EPOCH), MICRO_BATCH):
            with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
    return optimizer


@pytest.mark.parametrize("clip", [None, CLIP])
def test_equals_a_loop(tmp_path, clip):
    optimizer = fit(tmp_path, Module(), gradient_clip_val=clip)
    assert_same_training(optimizer, train_plainly(clip))


@pytest.mark.parametrize("style", FORMATS)
def test_resume_is_exact(tmp_path, style):
    settings = {"state_format": style}
    whole = fit(tmp_path / "whole", Module(**settings))
    with pytest.raises(InterruptedError):
        fit(tmp_path / "halves", Module(interrupted_at=STEPS // 2 + 1, **settings))
    (checkpoint,) = (tmp_path / "halves").rglob("*.ckpt")
    resumed = fit(tmp_path / "halves", Module(**settings), checkpoint=checkpoint)
    assert_same_training(resumed, whole)


def test_bf16_mixed(tmp_path):
    optimizer = fit(tmp_path, Module(), precision="bf16-mixed")
    assert_same_training(optimizer, train_plainly(None, torch.bfloat16))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_clipping_in_mixed_precision(tmp_path, precision):
    """Refused, as for torch's fused optimizers, until the scaler does the unscaling."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]

    def make_scaler():
        return torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None

    plugin = MixedPrecision(precision, "cpu", make_scaler())  # the Trainer's own 16-mixed is for GPUs
    with pytest.raises(RuntimeError, match="VSGD, does not allow for gradient clipping because it performs unscaling"):
        fit(tmp_path, Module(), plugins=plugin, gradient_clip_val=CLIP)
    plugin = MixedPrecision(precision, "cpu", make_scaler())
    optimizer = fit(tmp_path, Module(unscales=False), plugins=plugin, gradient_clip_val=CLIP)
    assert_same_training(optimizer, train_plainly(CLIP, dtype, make_scaler()))
