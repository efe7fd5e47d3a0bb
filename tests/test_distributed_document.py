"""The program in docs/distributed.md, as its text says to run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.xdist_group("distributed_document")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    text = (ROOT / "docs" / "distributed.md").read_text()
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    return path


def run(program, processes, steps, folder):
    """The line that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(program), str(steps), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loss(line):
    return float(line.rpartition(" ")[2])


def test_program(program, tmp_path):
    """It learns, and goes on where it was, with another number of processes too."""
    first, second, third = (run(program, count, steps, tmp_path) for count, steps in ((2, 10), (2, 20), (3, 30)))
    assert loss(first) < 5.5  # it begins at ln 256 = 5.55
    assert second.startswith("step 20: ")
    assert loss(second) < loss(first)
    assert third.startswith("step 30: ")
    assert loss(third) < loss(second)
