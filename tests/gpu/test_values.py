"""What a step computes on a GPU: against the reference in float64, and against the CPU to the bit."""

import copy
from functools import partial

import pytest
import torch

from tests.cases import SIZES, check_step, extreme_gradients, gradient, layouts, make_params, step_counts
from tests.codes import started_from, with_rates_that_barely_do_not_fit
from tests.gpu.tensors import GPU, compare, give_gradients, on_gpu, outcome, values_of
from vsgd_kernels import VSGD
from vsgd_kernels.formats import MASTER_WEIGHTS, is_16_bit
from vsgd_kernels.state_formats import FORMATS

pytestmark = GPU


@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
@pytest.mark.parametrize("capturable", [False, True])
def test_sizes(case, dtype, name, capturable, generator):
    params = on_gpu([torch.randn(n, generator=generator).to(dtype) for n in SIZES])
    optimizer = case.optimizer(params, **case.settings, capturable=capturable, backend=name)
    for _ in range(3):
        give_gradients(params, generator)
        check_step(optimizer, params)


@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
def test_layouts(case, dtype, name, generator):
    """As views of GPU memory, with the strides that they have on the CPU."""

    def moved(tensor):
        base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype, device="cuda")
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)

    def moved_gradient(tensor):
        storage = tensor.untyped_storage()
        base = torch.tensor([], dtype=dtype).set_(storage).cuda()
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    pairs = layouts(dtype, generator).values()
    params = [torch.nn.Parameter(moved(p)) for p, _ in pairs]
    optimizer = case.optimizer(params, lr=1e-2, backend=name)
    for _ in range(3):
        for param, (_, grad) in zip(params, pairs, strict=True):
            param.grad = moved_gradient(grad)
        check_step(optimizer, params)


def test_backends_give_the_same_bits(case, dtype, generator):
    """Triton, CUDA and the CPU, extreme gradients included."""
    grads = [torch.cat([gradient(torch.empty(5001), generator), extreme_gradients()]).to(dtype)]
    start = [torch.linspace(-3, 3, len(grads[0])).to(dtype)]
    compare(*(outcome(case, name, start, [grads] * 3, **case.settings) for name in ("cpp", "triton", "cuda")))


@pytest.mark.parametrize("masters", MASTER_WEIGHTS, ids=str)
@pytest.mark.parametrize("style", FORMATS)
def test_formats_give_the_same_bits(case, dtype, style, masters, generator):
    """Codes and parameters of the CPU's kernel, tails and several chunks among them, and blocks with NaN."""
    if masters != "exact" and not is_16_bit(dtype):
        pytest.skip("parameters of 16 bits have masters")
    if dtype == torch.float64 and style != "fp32":
        pytest.skip("float64 has no other format")
    settings = {**case.settings, "state_format": style, **({"master_weights": masters} if is_16_bit(dtype) else {})}
    start = [torch.randn(n, generator=generator).to(dtype) for n in (4096, 4097, 20_000, 100_001)]
    grads = [[gradient(t, generator) for t in start] for _ in range(3)]
    grads[1][2][700:1300:200] = float("nan")
    compare(*(outcome(case, name, start, grads, seed=3, **settings) for name in ("cpp", "triton", "cuda")))


def test_codes_of_rates_that_barely_do_not_fit(backend, generator):
    """The CPU's: of blocks in which packed16 looks for steps further than others need."""
    numbers = with_rates_that_barely_do_not_fit(generator)
    outcomes = []
    for name, device in (("cpp", "cpu"), (backend, "cuda")):
        own = [number.to(device) for number in numbers]
        param, optimizer = started_from(partial(VSGD, state_format="packed16"), name, 5.0, own)
        param.grad = torch.ones_like(param)
        optimizer.step()
        outcomes.append([value.cpu() for value in optimizer.state[param].values()])
    compare(*outcomes)


@pytest.mark.xdist_group("most of a GPU's memory")
def test_more_elements_than_32_bits_count(case, backend, generator):
    """Both ends of a bf16 tensor of more than 2^31 elements, against a small tensor of the same elements.

    Without masks: those of an element depend on where it is.
    """
    torch.cuda.empty_cache()
    gib = 70 if case.optimizer.rule.samples else 50
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")
    n, end = 2**31 + 4099, 1000
    small = on_gpu([torch.randn(2 * end, generator=generator).bfloat16()])
    big = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))]
    with torch.no_grad():
        big[0][:end], big[0][-end:] = small[0][:end], small[0][end:]
    optimizers = [case.optimizer(p, lr=1e-2, backend=backend, **case.plain()) for p in (small, big)]
    big[0].grad = torch.zeros_like(big[0])
    for _ in range(2):
        give_gradients(small, generator)
        big[0].grad[:end], big[0].grad[-end:] = small[0].grad[:end], small[0].grad[end:]
        for optimizer in optimizers:
            optimizer.step()
    for key in ("param", "low", *case.optimizer.rule.states):
        a, b = (o.param_groups[0]["params"][0] if key == "param" else o.state[p[0]][key]
                for o, p in zip(optimizers, (small, big), strict=True))  # fmt: skip
        assert torch.equal(a[:end], b[:end]), key
        assert torch.equal(a[end:], b[-end:]), key
    assert (big[0][end:-end] == 0).all()


def test_ten_thousand_tensors(case, backend, generator):
    start = [torch.randn(1 + i % 97, generator=generator) for i in range(10_000)]
    grads = [[gradient(t, generator) for t in start] for _ in range(2)]
    compare(*(outcome(case, name, start, grads, lr=1e-2) for name in ("cpp", backend)))


def test_moved_to_another_device(case, backend, generator):
    """A state that stayed behind is refused; one that a checkpoint brings along is moved."""
    params = make_params(generator)
    optimizer = case.optimizer(params, lr=1e-2)
    check_step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    for param in params:
        param.data, param.grad = param.data.cuda(), None
    give_gradients(params, generator)
    with pytest.raises(ValueError, match=r"must be on the parameter's device cuda:0, got cpu"):
        optimizer.step()
    for capturable in (False, True):
        moved = case.optimizer(params, lr=1e-2, backend=backend)
        moved.load_state_dict(saved)
        moved.param_groups[0]["capturable"] = capturable
        check_step(moved, params)
        assert step_counts(moved, params) == [2, 2, 2]


@pytest.mark.parametrize("style", FORMATS)
def test_saved_on_a_gpu(case, backend, style, generator, tmp_path):
    """Loaded with map_location="cpu", beside parameters on the CPU, it goes on there to the bit."""
    start = [torch.randn(n, generator=generator) for n in (5, 5000)]
    params = on_gpu(start)
    optimizer = case.optimizer(params, lr=1e-2, state_format=style, backend=backend)
    give_gradients(params, generator)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    twins = [torch.nn.Parameter(param.detach().cpu()) for param in params]
    twin = case.optimizer(twins, state_format=style)
    twin.load_state_dict(torch.load(tmp_path / "saved", map_location="cpu", weights_only=True))
    for _ in range(2):
        for param, other in zip(params, twins, strict=True):
            other.grad = gradient(other, generator)
            param.grad = other.grad.cuda()
        optimizer.step()
        twin.step()
    for a, b in zip(values_of(optimizer, params), values_of(twin, twins), strict=True):
        assert torch.equal(a.cpu(), b)


def test_mixed_devices(case, generator):
    params = [*make_params(generator), *on_gpu([p.detach() for p in make_params(generator)])]
    give_gradients(params, generator)
    optimizer = case.optimizer(params, lr=1e-2)
    for _ in range(2):
        check_step(optimizer, params)
    assert {launch.backend.name for launch, _ in optimizer._stepper._plan._launches} == {"cpp", "triton"}
