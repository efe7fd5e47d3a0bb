"""The optimizers as torch's own optimizer tests describe theirs (`torch.testing._internal.common_optimizers`)."""

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

from tests.cases import CASES, gradient
from vsgd_kernels.checkpoint import SETTINGS

#: The schedulers that torch's tests combine with SGD and Adam, each a list of constructors.
TORCHS_SCHEDULERS = [
    schedulers
    for info in optim_db
    if info.optim_cls in (torch.optim.SGD, torch.optim.Adam)
    for schedulers in info.scheduler_inputs
]


def _info(case):
    def inputs(device, dtype=None):
        kwargs = {
            "default": {},
            "other settings": case.settings,
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor lr": {"lr": torch.tensor(3e-3)},
            "capturable, tensor lr": {"lr": torch.tensor(3e-3), "capturable": True},
            "bf16 states": {"state_format": "bf16", "seed": 3},
            "q8 states": {"state_format": "q8", "weight_decay": 0.1},
            "packed16 states": {"state_format": "packed16", "seed": 3},
        }
        if dtype in (torch.bfloat16, torch.float16):
            kwargs |= {f"masters {mode}": {"master_weights": mode} for mode in ("split8", None)}
        return [OptimizerInput(params=None, kwargs={"lr": 1e-2, **own}, desc=desc) for desc, own in kwargs.items()]

    return OptimizerInfo(
        case.optimizer,
        optim_inputs_func=inputs,
        scheduler_inputs=TORCHS_SCHEDULERS,
        supported_impls=("fused",),
        supports_fused_on=("cpu", "cuda"),
        has_capturable_arg=True,
        supports_complex=False,
        # What a checkpoint of this package may lack; a rule's own settings it may not.
        not_og_supported_flags=(*SETTINGS, "maximize"),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
    )


INFOS = [_info(case) for case in CASES.values()]

each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def each_input(*dtypes):
    """Parametrizes by info, dtype and the settings of one of the info's inputs."""
    return pytest.mark.parametrize(
        ("info", "dtype", "kwargs"),
        [
            pytest.param(info, dtype, own.kwargs, id=f"{info.name}, {str(dtype).removeprefix('torch.')}, {own.desc}")
            for info in INFOS
            for dtype in dtypes
            for own in info.optim_inputs_func("cpu", dtype)
        ],
    )


class Problem:
    """Least squares: a weight that is large enough for every state format, and a bias.

    Args:
        dtype: of the parameters; loss and gradients are computed in float32 or float64.
        contiguous: whether the parameters are, or every other element of something.
    """

    def __init__(self, dtype=torch.float32, contiguous=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = (70, 60), (70,)
        whole = [torch.randn((*shape, 2), generator=generator).to(dtype) for shape in shapes]
        views = [x[..., 0].contiguous() if contiguous else x[..., 0] for x in whole]
        self.params = [torch.nn.Parameter(x) for x in views]
        self.input = torch.randn(60, generator=generator)
        self.generator = generator

    def loss(self):
        """And the gradients."""
        for param in self.params:
            param.grad = None
        wide = torch.promote_types(self.params[0].dtype, torch.float32)
        weight, bias = (param.to(wide) for param in self.params)
        loss = (weight @ self.input.to(wide) + bias).square().mean()
        loss.backward()
        return loss.item()

    def random_gradients(self):
        """Instead of the loss's."""
        for param in self.params:
            param.grad = gradient(param, self.generator)

    def train(self, optimizer, steps=3):
        """Steps with random gradients."""
        for _ in range(steps):
            self.random_gradients()
            optimizer.step()


def leaf():
    return torch.nn.Parameter(torch.ones(3))
