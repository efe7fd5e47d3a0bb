"""Gradients that two processes share: clipped by the norm of all of them, and released in backward."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from tests.cases import CASES, TOLERANCE
from tests.distributed import WIDTHS, assert_same_training, held, make_model, make_optimizer, shard, train
from tests.processes import Processes
from vsgd_kernels import VSGD, clipping

STEPS, MAX_NORM = 3, 0.05


pytestmark = pytest.mark.xdist_group("distributed_gradients")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    processes = Processes(2, tmp_path_factory.mktemp("store"))
    yield processes
    processes.stop()


def assert_close_norms(norm, other):
    assert norm.dtype == other.dtype
    assert abs(norm - other) <= TOLERANCE["norm"] * torch.finfo(norm.dtype).eps * other


def clip_under_fsdp(name):
    """To rounding, the training of one process; and in each step the norm and the scale of all gradients."""
    plain = CASES[name].plain()
    models = [shard(make_model()), make_model()]
    optimizers = [make_optimizer(name, model.parameters(), **plain, max_grad_norm=MAX_NORM) for model in models]
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, number)
        norms = [optimizer.grad_norm for optimizer in optimizers]
        assert norms[0] > MAX_NORM
        torch.testing.assert_close(norms[0], norms[1])
        theirs = clip_grad_norm_(models[0].parameters(), MAX_NORM).full_tensor()
        assert_close_norms(norms[0], theirs)
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(param.full_tensor(), other.detach(), rtol=1e-4, atol=1e-5)
    return norms[0].item()


@pytest.mark.parametrize("name", CASES)
def test_clipping_under_fsdp(processes, name):
    first, second = processes.run(clip_under_fsdp, name)
    assert first == second


def clip_any_placement():
    """Shared over one or two dimensions, by rows and columns, copied to all, empty on a process, and none at all."""
    generator = torch.Generator().manual_seed(0)
    meshes = [init_device_mesh("cpu", shape) for shape in ((2,), (1, 2), (2, 1))]
    whole, params = [], []
    for shape in ((7, 5), (1, 3), (2048, 3), (4,)):
        for mesh in meshes:
            for first in (Replicate(), Shard(0), Shard(len(shape) - 1)):
                placements = [first, *[Replicate()] * (mesh.ndim - 1)]
                value = torch.randn(shape, generator=generator)
                param = torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements))
                param.grad = distribute_tensor(value, mesh, placements)
                whole.append(value)
                params.append(param)
    partial = DTensor.from_local(torch.ones(3), meshes[0], [dist.tensor.Partial()])
    params.append(torch.nn.Parameter(distribute_tensor(torch.zeros(3), meshes[0], [Shard(0)])))
    params[-1].grad = partial
    params.append(torch.nn.Parameter(torch.zeros(9)))
    params[-1].grad = torch.full((9,), 3.0)
    whole += [torch.full((3,), 2.0), params[-1].grad]
    expected = torch.cat([value.flatten() for value in whole]).norm()
    assert_close_norms(clipping.global_norm(params), expected)
    divisor, norm = clipping.clip(clipping.global_norm(params), 1.0, torch.tensor(4.0))
    assert_close_norms(norm, expected / 4)
    assert_close_norms(divisor, expected + 4e-6)
    return divisor.item()


def test_clipping_of_any_placement(processes):
    first, second = processes.run(clip_any_placement)
    assert first == second


def clip_zero():
    """A process's optimizer clips by the norm of its own part."""
    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=VSGD, lr=1e-2, max_grad_norm=MAX_NORM)
    train(model, optimizer, 1)
    own = [param.grad.flatten() for group in optimizer.optim.param_groups for param in group["params"]]
    assert_close_norms(optimizer.optim.grad_norm, torch.cat(own).norm())
    return optimizer.optim.grad_norm.item()


def test_clipping_of_a_part(processes):
    first, second = processes.run(clip_zero)
    assert first != second


def release_under_fsdp(name, dtype, settings):
    """To the bit the training without release; each gradient is the sharded one."""
    models = [shard(make_model(dtype)) for _ in range(2)]
    optimizers = [
        make_optimizer(name, model.parameters(), **settings, gradient_release=i == 0) for i, model in enumerate(models)
    ]
    start = [held(param).clone() for param in models[0].parameters()]
    for number in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            with optimizer.accumulate_gradients():
                backward(model, number)
            train(model, optimizer, 1, number + STEPS)
        assert all(param.grad is None for param in models[0].parameters())
        assert all(isinstance(param.grad, DTensor) for param in models[1].parameters())
    assert_same_training(models[0], optimizers[0], models[1], optimizers[1])
    assert not any(torch.equal(a, held(b)) for a, b in zip(start, models[0].parameters(), strict=True) if a.numel())


def backward(model, number):
    generator = torch.Generator().manual_seed(number)
    parameter = next(model.parameters())
    x, y = (torch.randn(8, width, generator=generator).to(parameter.dtype) for width in (WIDTHS[0], WIDTHS[-1]))
    mse_loss(model(x), y).backward()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.optimizer.rule.samples])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, {}), (torch.bfloat16, {"state_format": "q8", "master_weights": "split8", "seed": 7})],
    ids=["fp32", "q8"],
)
def test_release_under_fsdp(processes, name, dtype, settings):
    processes.run(release_under_fsdp, name, dtype, settings)


def release_under_ddp():
    model = DistributedDataParallel(make_model())
    optimizer = VSGD(model.parameters(), gradient_release=True)
    with pytest.raises(RuntimeError, match="was stepped in backward and has been given a gradient since"):
        train(model, optimizer, 1)


def test_release_under_ddp_is_noticed(processes):
    processes.run(release_under_ddp)
