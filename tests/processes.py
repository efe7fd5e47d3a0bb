"""Processes that run functions of a test together, as ranks of a gloo process group."""

import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 240  # seconds, of one call


class Processes:
    """As many processes, which live until `stop`: starting them takes longer than most of what they run."""

    def __init__(self, count, folder):
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, *args):
        """What `function(*args)` returns on each rank; raises AssertionError with the trace of one that fails."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                self.stop()
                raise AssertionError(f"rank {rank} did not answer within {TIMEOUT} s")
            failed, result = pipe.recv()
            if failed:
                self.stop()  # the others may wait for it
                raise AssertionError(f"rank {rank}:\n{result}")
            results.append(result)
        return results

    def stop(self):
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    @property
    def alive(self):
        return all(process.is_alive() for process in self._processes)


def _serve(rank, count, store, pipe):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
