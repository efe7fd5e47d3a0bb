"""`python -m tests.killed WRITER FOLDER`: trains and saves a checkpoint after each step, and is killed again and again.

Each life resumes from the last complete checkpoint. What was left of incomplete ones is printed: how many.
"""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.cases import CODED, gradient
from vsgd_kernels import VSGD

LIVES = 8
DTYPES = (torch.float32, torch.bfloat16, *[torch.float32] * len(CODED))
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: seconds from a life's first checkpoint on
LONGEST = 0.05


def build():
    """A model of every state format, and of masters."""
    start = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(50_000, generator=start).to(dtype)) for dtype in DTYPES]
    groups = [{"params": params[:2]}]
    groups += [{"params": [param], "state_format": style} for param, style in zip(params[2:], CODED, strict=True)]
    return params, VSGD(groups, lr=1e-2, seed=3)


def train_step(params, optimizer, step):
    """The step with that number; its gradients depend on nothing else."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = gradient(param, generator)
    optimizer.step()


def trained(params, optimizer, steps):
    """The sums of all values' bits after some steps."""
    for step in steps:
        train_step(params, optimizer, step)
    values = [value for param in params for value in (param.detach(), *optimizer.state[param].values())]
    return [value.view(BITS[value.element_size()]).sum().item() for value in values]


def contents(params, optimizer, step):
    return {"params": [param.detach() for param in params], "optimizer": optimizer.state_dict(), "step": step}


def save_file(folder, saved):
    torch.save(saved, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def load_file(folder):
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def save_distributed(folder, saved):
    """torch's writer finishes a checkpoint by giving it `.metadata`."""
    import torch.distributed.checkpoint as dcp  # a second of every process that trains alone

    dcp.save(saved, checkpoint_id=folder / f"{saved['step']:06}", no_dist=True)


def load_distributed(folder):
    import torch.distributed.checkpoint as dcp

    complete = sorted(path for path in folder.iterdir() if (path / ".metadata").exists())
    if not complete:
        return None
    params, optimizer = build()
    train_step(params, optimizer, 0)  # so that there are states to be read into
    saved = contents(params, optimizer, 0)
    dcp.load(saved, checkpoint_id=complete[-1], no_dist=True)
    return saved


WRITERS = {"torch.save": (save_file, load_file), "distributed": (save_distributed, load_distributed)}


def resumed(load, folder):
    """Parameters, optimizer and step of the last complete checkpoint, or those at the start."""
    params, optimizer = build()
    saved = load(folder)
    if saved is None:
        return params, optimizer, 0
    with torch.no_grad():
        for param, value in zip(params, saved["params"], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return params, optimizer, saved["step"]


def live(writer, folder, ready):
    """Goes on until it is killed; says when it has saved once."""
    save, load = WRITERS[writer]
    params, optimizer, step = resumed(load, folder)
    while True:
        step += 1
        train_step(params, optimizer, step)
        save(folder, contents(params, optimizer, step))
        os.write(ready, b"!")


def main(writer, folder):
    warnings.simplefilter("ignore")
    WRITERS[writer][1](folder)  # whose imports the lives share
    torch.set_num_threads(1)  # the lives are forks
    source = random.Random(writer)
    lives = unfinished = 0
    while lives < LIVES or (unfinished == 0 and lives < 10 * LIVES):
        lives += 1
        waiting, ready = os.pipe()
        child = os.fork()
        if child == 0:
            live(writer, folder, ready)
        os.close(ready)  # so that reading ends where the child does
        os.read(waiting, 1)
        os.close(waiting)
        time.sleep(source.uniform(0.0, LONGEST))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "a life ended by itself"
        temporary = [*folder.glob("*.tmp"), *(path for path in folder.glob("0*") if not (path / ".metadata").exists())]
        unfinished += bool(temporary)
    print(unfinished)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
