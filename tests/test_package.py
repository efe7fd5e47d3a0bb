"""Installation, the command line, and how a backend is chosen."""

import itertools
import os
import subprocess
import sys
import venv
import warnings
from pathlib import Path

import pytest
import torch

from vsgd_kernels import VSGD, __main__, backends, memory
from vsgd_kernels.backends import library
from vsgd_kernels.formats import MASTER_WEIGHTS
from vsgd_kernels.state_formats import FORMATS

ROOT = Path(__file__).parent.parent


def chosen_by(optimizer):
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    optimizer.step()
    return {launch.backend.name for launch, _ in optimizer._stepper._plan._launches}


def leaf():
    return torch.nn.Parameter(torch.ones(3))


def test_the_fused_kernel_is_what_runs():
    """Not a fallback: the suite would otherwise compare the reference with itself."""
    assert chosen_by(VSGD([leaf()])) == {"cpp"}


def test_argument_then_variable_then_availability(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv(backends.VARIABLE, "eager")
    assert chosen_by(VSGD([leaf()])) == {"eager"}
    assert chosen_by(VSGD([leaf()], backend="cpp")) == {"cpp"}
    monkeypatch.delenv(backends.VARIABLE)
    monkeypatch.setattr(backends.BACKENDS["cpp"], "why_unavailable", lambda: "not compiled")
    monkeypatch.setattr(backends.BACKENDS["cuda"], "on_host", False)
    backends._warn_of_eager.cache_clear()
    with pytest.warns(UserWarning, match=r"many times slower .*\(cpp: not compiled\)"):
        assert chosen_by(VSGD([leaf()])) == {"eager"}
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        assert chosen_by(VSGD([leaf()])) == {"eager"}


def test_a_checkout_without_kernels(tmp_path, monkeypatch):
    """An installation elsewhere is of no use where Python takes the checkout."""
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(library, "_FOLDER", tmp_path / "vsgd_kernels")
    assert f"is the checkout {tmp_path}, in which nothing was compiled" in library.why_not_loaded.__wrapped__()


def test_importing_leaves_the_compiler_alone():
    """torch._dynamo takes a second to import."""
    code = "import sys, vsgd_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_device_that_a_backend_does_not_serve():
    with pytest.raises(ValueError, match=r"backend='cpp' runs on cpu, got a parameter on cuda:0"):
        backends.choose("cpp", torch.device("cuda:0"))


def test_env(capsys, monkeypatch):
    assert __main__.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["torch", f"{torch.__version__},"] for line in lines)
    assert "step checks   compiled for this torch" in lines
    assert any(line.split() == ["cpp", "cpu", "yes,", backends.BACKENDS["cpp"].best_isa()] for line in lines)
    assert any(line.split() == ["triton", "cuda,", "cpu", "yes"] for line in lines)
    assert any(line.split() == ["eager", "any", "device", "yes"] for line in lines)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(backends.BACKENDS["cpp"], "why_unavailable", lambda: "no compiled kernels; build them")
    monkeypatch.setenv(backends.VARIABLE, "cpp")
    assert __main__.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "no: no compiled kernels; build them" in out
    assert torch.cuda.is_available() or "no: torch sees no GPU" in out
    assert "VSGD_KERNELS_BACKEND='cpp' is not available: no compiled kernels" in out


def test_no_cuda_code(capsys, monkeypatch):
    """A CPU build names the reason, refuses the backend where it is asked for, and steps without it."""
    cuda = backends.BACKENDS["cuda"]
    monkeypatch.setattr(cuda, "on_host", False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    assert __main__.main(["env"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda "))
    assert "has no CUDA code; with nvcc installed, `VSGD_KERNELS_CUDA=1" in line
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: .* has no CUDA code"):
        VSGD([leaf()], backend="cuda")
    assert chosen_by(VSGD([leaf()])) == {"cpp"}


def test_no_compiler_for_triton(monkeypatch):
    triton = backends.BACKENDS["triton"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "finds none; install gcc or clang, or set CC" in triton.why_unavailable()


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (
            ["--params", "7e9", "--dtype", "bf16"],
            {
                "VSGD, q8, exact": (14.0, 14.0, 21.656, 14.0, 63.656),
                "VSGD, q8, split8": (14.0, 14.0, 21.656, 7.0, 56.656),
                "VSGD, bf16, None": (14.0, 14.0, 42.0, 0.0, 70.0),
                # 2 bytes, and of three words in 128 elements 12 / 128: 7e9 times 2.09375
                "VSGD, packed16, exact": (14.0, 14.0, 14.656, 14.0, 56.656),
                "VSGD, packed16, None": (14.0, 14.0, 14.656, 0.0, 42.656),
                "AdamW": (14.0, 14.0, 28.0, 0.0, 56.0),
                "AdamW, fp32 masters": (14.0, 14.0, 56.0, 28.0, 112.0),
            },
        ),
        (["--params", "1e9"], {"VSGD, fp32": (4.0, 4.0, 12.0, 0.0, 20.0), "AdamW": (4.0, 4.0, 8.0, 0.0, 16.0)}),
        (["--params", "5e3"], {"VSGD, fp32": (20.0, 20.0, 60.0, 0.0, 100.0)}),
    ],
)
def test_memory(capsys, arguments, rows):
    assert __main__.main(["memory", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == ("kB" if arguments[1] == "5e3" else "GB")
    for name, sizes in rows.items():
        (line,) = (line for line in lines if line.startswith(f"{name}  "))
        assert tuple(map(float, line[len(name) :].split())) == sizes


def test_memory_of_a_model_is_what_its_optimizer_holds():
    model = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.Linear(300, 3)).bfloat16()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    frozen = model[1].bias.requires_grad_(False)
    frozen.grad = None
    rows = {row.optimizer: row for row in memory.usage(model)}
    assert rows == {row.optimizer: row for row in memory.usage(model.parameters())}
    assert rows["AdamW"].params == rows["AdamW"].grads + frozen.nbytes
    for style, masters in itertools.product(FORMATS, MASTER_WEIGHTS):
        row = rows[f"VSGD, {style}, {masters}"]
        optimizer = VSGD(model.parameters(), lr=1e-2, state_format=style, master_weights=masters)
        optimizer.step()
        states = list(optimizer.state.values())
        assert row.masters == sum(state["low"].nbytes for state in states if masters)
        held = sum(v.nbytes for state in states for k, v in state.items() if k not in ("step", "low"))
        # A last block that is not full costs a whole word.
        assert row.states <= held <= row.states + 3 * 4 * len(states), row.optimizer


@pytest.mark.parametrize("params", ["0", "-1", "inf", "nan"])
def test_memory_refused(capsys, params):
    with pytest.raises(SystemExit):
        __main__.main(["memory", "--params", params])
    assert "--params must be greater than 0 and finite" in capsys.readouterr().err


def run(python, code, **env):
    env = {**os.environ, "TRITON_INTERPRET": "0", **env}
    return subprocess.run([python, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT.parent, check=False)


STEP = """
import torch, vsgd_kernels
from vsgd_kernels import backends
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
vsgd_kernels.VSGD([p], lr=1e-2).step()
print(float(p[0]) < 1, vsgd_kernels.__file__, backends.BACKENDS["cpp"].why_unavailable())
"""


@pytest.fixture
def bare_python(tmp_path):
    """A virtual environment that sees this one's torch and nothing of this checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith(("__editable__", "vsgd_kernels", "vsgd-kernels")):
            (site / path.name).symlink_to(path)
    return tmp_path / "venv" / "bin" / "python", site


def build(target, *arguments, prebuilt=None, **env):
    """Builds from a copy of the sources, so that of what the checkout has built nothing but `prebuilt` is found."""
    source = target / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("csrc", "vsgd_kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".typed"):
                destination = source / path.relative_to(ROOT)
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(path.read_bytes())
    if prebuilt:  # newer than its sources, it is not built again
        (source / "setup.cfg").write_text("[build]\nbuild_lib = built")
        (source / "built" / "vsgd_kernels").mkdir(parents=True)
        (source / "built" / "vsgd_kernels" / prebuilt.name).write_bytes(prebuilt.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "-w", str(target), *arguments]
    result = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def install(wheel, site):
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)


def test_without_a_compiler(tmp_path, bare_python):
    """The wheel builds, and steps on the eager backend, and says why."""
    python, site = bare_python
    wheel = build(tmp_path, "--no-build-isolation", CC="/nonexistent/gcc", CXX="/nonexistent/g++")
    install(wheel, site)
    result = run(python, STEP)
    assert result.stdout.startswith(f"True {site}"), result.stderr
    assert "no compiled kernels" in result.stdout
    assert "C++17 compiler" in result.stdout
    refused = run(python, STEP, VSGD_KERNELS_BACKEND="cpp")
    assert "RuntimeError: VSGD_KERNELS_BACKEND='cpp' is not available" in refused.stderr


def test_built_without_torch(tmp_path, bare_python):
    """What an isolated build gives: torch cannot be imported while building."""
    python, site = bare_python
    hidden = tmp_path / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not here')")
    wheel = build(tmp_path, "--no-build-isolation", PYTHONPATH=str(hidden.parent))
    assert wheel.name.endswith("-py3-none-any.whl")
    install(wheel, site)
    assert run(python, STEP).stdout.startswith(f"True {site}")


def test_damaged_library(tmp_path, bare_python):
    python, site = bare_python
    hidden = tmp_path / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not here')")
    install(build(tmp_path, "--no-build-isolation", PYTHONPATH=str(hidden.parent)), site)
    (site / "vsgd_kernels" / "_C.abi3.so").write_bytes(b"\x7fELF but not really")
    result = run(python, STEP)
    assert result.stdout.startswith(f"True {site}"), result.stderr
    assert "the compiled kernels _C.abi3.so do not load" in result.stdout


def test_wheel_with_kernels(tmp_path, bare_python):
    """One wheel for every Python from 3.10 on; it steps on the fused kernel, as the installation compiled it."""
    python, site = bare_python
    # Without a compiler nothing can be built anew, which torch would do where it finds ninja, in minutes.
    prebuilt = ROOT / "vsgd_kernels" / "_C.abi3.so"
    wheel = build(tmp_path, "--no-build-isolation", prebuilt=prebuilt, PATH="/nonexistent")
    assert "-cp310-abi3-" in wheel.name
    install(wheel, site)
    result = run(python, STEP, VSGD_KERNELS_BACKEND="cpp")
    assert result.stdout.startswith(f"True {site}"), result.stderr
    assert result.stdout.rstrip().endswith("None")
