"""Processes that are killed, forked, and many at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import killed
from tests.cases import assert_same_bits

ROOT = Path(__file__).parent.parent


def start(*arguments, **env):
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **env},
    )  # fmt: skip


def finish(process, timeout=300):
    """What a process printed; it must end well, and in time."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out


@pytest.mark.parametrize("writer", killed.WRITERS)
def test_killed_while_saving(writer, tmp_path):
    """After kills, some in the middle of a checkpoint, the last complete one is that of an unbroken run."""
    unfinished = int(finish(start("-m", "tests.killed", writer, str(tmp_path))))
    assert unfinished > 0, "no kill fell into a write"
    params, optimizer, reached = killed.resumed(killed.WRITERS[writer][1], tmp_path)
    assert reached >= killed.LIVES
    unbroken, twin = killed.build()
    for step in range(1, reached + 1):
        killed.train_step(unbroken, twin, step)
    assert_same_bits(values_of(params, optimizer), values_of(unbroken, twin))
    for step in range(reached + 1, reached + 3):
        killed.train_step(params, optimizer, step)
        killed.train_step(unbroken, twin, step)
    assert_same_bits(values_of(params, optimizer), values_of(unbroken, twin))


def values_of(params, optimizer):
    return [value for param in params for value in (param.detach(), *optimizer.state[param].values())]


FORK = """
import os, torch
from tests import killed
params, optimizer = killed.build()
killed.trained(params, optimizer, range({before}))
read, write = os.pipe()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch asks of forked processes: OpenMP's threads are the parent's
    os.write(write, repr(killed.trained(params, optimizer, range({before}, {before} + 3))).encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(os.read(read, 10_000).decode())
print(killed.trained(params, optimizer, range({before}, {before} + 3)))
"""


@pytest.mark.parametrize("before", [0, 2], ids=["after the import", "after two steps"])
def test_fork(before):
    """The child and the parent each take the steps that they would have taken alone."""
    child, parent = finish(start("-c", FORK.format(before=before))).splitlines()
    assert child == parent == repr(killed.trained(*killed.build(), range(before + 3)))


def test_eight_processes_import_at_once(tmp_path):
    """Without a compiler, importing builds nothing and waits for nothing; all take the same steps."""
    folders = {name: str(tmp_path / name) for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")}
    code = "from tests import killed; from vsgd_kernels.__main__ import environment; "
    code += "print(killed.trained(*killed.build(), range(2))); print(environment())"
    processes = [start("-c", code, PATH="/nonexistent", CC="/nonexistent/gcc", **folders) for _ in range(8)]
    (out,) = {finish(process) for process in processes}
    assert out.splitlines()[0] == repr(killed.trained(*killed.build(), range(2)))
    assert any(line.split()[:3] == ["cpp", "cpu", "yes,"] for line in out.splitlines())
    assert not list(tmp_path.iterdir())
