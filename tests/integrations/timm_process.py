"""The tests of timm, which `test_timm.py` runs in a process of their own."""

import sys
from importlib.machinery import ModuleSpec
from unittest import mock

import pytest
import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # absent, or built for another torch

    class Torchvision(mock.MagicMock):
        """Has whatever is looked up in it: timm's optimizers and transformers need nothing of it."""

        __path__ = ()
        __spec__ = ModuleSpec("torchvision", None)

        class FrozenBatchNorm2d(torch.nn.Module):
            """A class, for `isinstance`."""

    for name in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms"):
        sys.modules["torchvision" + name] = Torchvision()
    sys.modules["torchvision.transforms.functional"] = Torchvision()

import timm
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler

from tests.cases import CASES, through_a_file
from tests.integrations.common import CLIP, MICRO_BATCH, STEPS, assert_same_training
from vsgd_kernels import VSGD

for case in CASES.values():
    has_betas = "betas" in case.settings  # timm takes them away from all others
    default_registry.register(timm.optim.OptimInfo(case.optimizer.__name__, case.optimizer, has_betas=has_betas))

IMAGE = 16


def make_model():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=IMAGE, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5
    )


def make_batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(MICRO_BATCH, 3, IMAGE, IMAGE, generator=generator)
        yield images, torch.randint(5, (MICRO_BATCH,), generator=generator)


def make_scheduler(optimizer):
    return CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False)


def train(model, optimizer, first=0, last=STEPS, scaler=None):
    """As timm's training script does."""
    scheduler = make_scheduler(optimizer)
    for i, (images, classes) in enumerate(make_batches()):
        if not first <= i < last:
            continue
        scheduler.step_update(i)
        loss = torch.nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        if scaler:
            scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters())
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_factory_makes_what_a_user_would(case):
    """Settings arrive, and weights decay but biases, norms and what the model excepts."""
    name = case.optimizer.__name__.lower()
    model, twin = make_model(), make_model()
    optimizer = timm.optim.create_optimizer_v2(model, name, **case.settings)
    assert type(optimizer) is case.optimizer
    excepted = twin.no_weight_decay()
    decays = {n: p.ndim > 1 and not n.endswith(".bias") and n not in excepted for n, p in twin.named_parameters()}
    plain = case.optimizer(
        [
            {"params": [p for n, p in twin.named_parameters() if not decays[n]], "weight_decay": 0.0},
            {"params": [p for n, p in twin.named_parameters() if decays[n]]},
        ],
        **case.settings,
    )
    train(model, optimizer)
    train(twin, plain)
    assert_same_training(optimizer, plain)


def test_layer_decay_resumes_exactly():
    """`lr_scale`, which timm's schedulers read, is in the groups and in a checkpoint."""

    def make(model):
        return timm.optim.create_optimizer_v2(model, "vsgd", lr=1e-2, weight_decay=0.05, layer_decay=0.5)

    model, twin = make_model(), make_model()
    optimizer = make(model)
    train(model, optimizer, last=STEPS // 2)
    twin.load_state_dict(through_a_file(model.state_dict()))
    resumed = make(twin)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.125, 0.25, 0.5, 1.0}
    assert [g["lr_scale"] for g in resumed.param_groups] == [g["lr_scale"] for g in optimizer.param_groups]
    train(model, optimizer, first=STEPS // 2)
    train(twin, resumed, first=STEPS // 2)
    assert_same_training(resumed, optimizer)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert all(lr == rates[1.0] * scale for scale, lr in rates.items())


def test_native_scaler():
    """timm's own loss scaling with clipping; a power of two scales exactly."""
    model, twin = make_model(), make_model()
    optimizer, plain = VSGD(model.parameters(), lr=1e-2), VSGD(twin.parameters(), lr=1e-2)
    scaler = NativeScaler("cpu")
    train(model, optimizer, scaler=scaler)
    train(twin, plain)
    assert scaler._scaler.get_scale() == 2.0**16  # nothing was skipped
    assert_same_training(optimizer, plain)
