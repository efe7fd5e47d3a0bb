"""Steps with the Triton backend where there is no GPU, by a driver that takes down what is launched and runs nothing.

Triton's own code launches the kernels, compiled for sm_90; their tables are in the host's memory. It takes a process of
its own: `fake_driver.py LIBRARY`, with LIBRARY's folder in LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH.
"""

import ctypes
import json
import sys

import torch

STREAM = 77


class Launch(ctypes.Structure):
    """``fake_driver.c``'s."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("programs", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 9),
    )


def pretend(library):
    """Has torch and Triton believe in a GPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from vsgd_kernels.backends.triton import TritonBackend

    driver.set_active(CudaDriver())
    TritonBackend.device_types = ("cpu",)
    counter = ctypes.c_int.in_dll(library, "launches")
    launched = (Launch * 64).in_dll(library, "launched")

    def take():
        """The launches since the last call."""
        found = [
            {
                "name": each.name.decode(),
                "programs": each.programs,
                "threads": each.threads,
                "stream": each.stream,
                "arguments": list(each.arguments),
            }
            for each in launched[: counter.value]
        ]
        counter.value = 0
        return found

    return take


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def tables_of(prepared, launch, amp):
    """What the kernels are to be given: of counting, and of the step."""
    step = (launch.rows, launch.grads, launch.layouts, launch.chunk_tensor, launch.first_chunk)
    step = (*step, launch.scalar_row, launch.scalars, *amp)
    return [list(map(address, (launch.rows, prepared.hyper, launch.scalars))), list(map(address, step))]


def main():
    """Prints, for each step with and without device-side counts, what was launched and what should have been.

    And what Triton's hooks see of more steps.
    """
    take = pretend(ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL))
    from triton.runtime.jit import JITFunction

    import vsgd_kernels

    through_triton = 0
    run = JITFunction.run

    def count_and_run(*args, **kwargs):
        nonlocal through_triton
        through_triton += 1
        return run(*args, **kwargs)

    JITFunction.run = count_and_run
    steps = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5000, 64)]
        for param in params:
            param.grad = torch.ones_like(param)
        # Its scalars take 40 bytes, so that every other step's begin where an alignment of 16 does not.
        optimizer = vsgd_kernels.ConstantVSGD(params, lr=0.1, backend="triton", capturable=capturable)
        for amp in ((), (), (), (torch.ones(1), torch.zeros(1)), (torch.ones(1), torch.zeros(1))):
            optimizer.grad_scale, optimizer.found_inf = amp or (None, None)
            optimizer.step()
            (prepared,) = (launch._prepared for launch, _ in optimizer._stepper._plan._launches)
            (launch,) = prepared.launches
            # Counted by the host, a step waits for found_inf.
            counted, stepped = tables_of(prepared, launch, amp if capturable else amp[:1])
            found, through_triton = through_triton, 0
            expected = {
                "through Triton": found,
                "counted": counted,
                "stepped": stepped,
                "threads": [32 * 4, 32 * 4],
            }
            steps.append({"launched": take(), "capturable": capturable, **expected})
    print(json.dumps({"steps": steps, "hooked": hooked(optimizer), "launched": take()}))


def hooked(optimizer):
    """What Triton's launch hooks see of steps: a hook in each chain, a function in place of one, and none."""
    from triton.knobs import runtime

    seen = []
    runtime.launch_enter_hook.add(lambda metadata: seen.append(["enter", metadata.get()["name"]]))
    runtime.launch_exit_hook.add(lambda metadata: seen.append(["exit", metadata.get()["name"]]))
    optimizer.step()
    runtime.launch_enter_hook = lambda metadata: seen.append(["called", metadata.get()["name"]])
    runtime.launch_exit_hook = None
    optimizer.step()
    runtime.launch_enter_hook = None
    optimizer.step()
    return seen


if __name__ == "__main__":
    main()
