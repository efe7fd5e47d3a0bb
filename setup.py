"""Builds the native kernels where torch and a C++17 compiler are at hand; without them the package is pure Python.

Everything that needs neither is in pyproject.toml. The kernels use the LibTorch stable ABI and Python's limited API, so
that one wheel serves every torch from 2.11 on (by its symbols from 2.10 on) and Python 3.10 and later. Beside them is
a module that serves the torch and the Python that it was built with, and is left alone by others.

The CUDA kernels are built where nvcc is there and torch has CUDA; with VSGD_KERNELS_CUDA=1 wherever nvcc is, for any
torch, and with VSGD_KERNELS_CUDA=0 nowhere. TORCH_CUDA_ARCH_LIST, such as "8.6;9.0", names other architectures than
those below; what is older than 8.0 is left out.
"""

import os
import re
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    # An isolated build does not see torch, and must not: it would fetch gigabytes of it.
    warnings.warn("torch is not importable: building without native kernels", stacklevel=1)
    setup()
    sys.exit()

# Free-threaded Pythons have none: there the module does not compile, and the package is installed without.
HAS_LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
CUDA_REQUEST = os.environ.get("VSGD_KERNELS_CUDA")  # "1", "0", or None: as torch has it
# Machine code for these, and PTX of the last for what comes after it.
LISTED = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
CUDA_ARCHITECTURES = [major + minor for major, minor in LISTED if int(major) >= 8] or ["80", "90", "100"]


def find_cuda() -> Path | None:
    """The toolkit's folder, if the CUDA kernels are to be built."""
    if CUDA_REQUEST == "0" or (CUDA_REQUEST is None and torch.version.cuda is None):
        return None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for folder in map(Path, filter(None, candidates)):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    if CUDA_REQUEST == "1":
        raise RuntimeError("VSGD_KERNELS_CUDA=1, but there is no nvcc: install CUDA's toolkit or set CUDA_HOME")
    return None


def add_cuda(extension: CppExtension, cuda: Path) -> None:
    """Adds the CUDA kernels to the extension."""
    # A torch without CUDA does not look for the toolkit.
    cpp_extension.CUDA_HOME = str(cuda)
    extension.sources += sorted(map(str, Path("csrc").glob("*.cu")))
    extension.define_macros.append(("USE_CUDA", None))
    extension.include_dirs.append(str(cuda / "include"))
    extension.library_dirs += [str(cuda / "lib64")]
    # The runtime's own copy: a torch without CUDA brings none.
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    # torch's CUDA functions are found through libtorch, whatever it was linked with.
    extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]


SNAPSHOT = str(Path("csrc/snapshot.cpp"))
extension = CppExtension(
    "vsgd_kernels._C",
    sorted({*map(str, Path("csrc").glob("*.cpp"))} - {SNAPSHOT}),
    depends=sorted(map(str, Path("csrc").glob("*.h"))),
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
    extra_compile_args={
        "cxx": [
            "-std=c++17",
            "-O3",
            # Products and sums are fused where the code says so and nowhere else, so that all instruction sets give the
            # same bits.
            "-ffp-contract=off",
            # sqrt and selects as plain instructions; without these no loop vectorises.
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-g0",
        ],
        "nvcc": [
            "-std=c++17",
            "-O3",
            "-fmad=false",  # as above
            "-Xcompiler=-fvisibility=hidden",
            "--threads=0",  # as many architectures at a time as there are processors
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES),
            f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",
        ],
    },
    extra_link_args=[],
    py_limited_api=HAS_LIMITED_API,
)
snapshot = CppExtension(
    "vsgd_kernels._snapshot",
    [SNAPSHOT],
    depends=[str(Path("csrc/tensor_records.h"))],
    define_macros=[("VSGD_TORCH_VERSION", f'"{torch.__version__}"')],
    extra_compile_args=["-O3", "-fvisibility=hidden", "-g0"],
)


class OptionalBuild(BuildExtension):
    """A failed compilation leaves a package that works without: on the other backends."""

    def run(self) -> None:  # noqa: D102
        cuda = find_cuda()
        if cuda:
            without = {name: list(getattr(extension, name)) for name in ("sources", "define_macros", "libraries")}
            add_cuda(extension, cuda)
            try:
                return super().run()
            except Exception as error:
                if CUDA_REQUEST == "1":
                    raise
                warnings.warn(f"building without CUDA kernels, the compiler failed: {error}", stacklevel=1)
            vars(extension).update(without)
        try:
            super().run()
        except Exception as error:
            warnings.warn(f"building without native kernels, the compiler failed: {error}", stacklevel=1)
            self.extensions = []

    def build_extension(self, ext: CppExtension) -> None:  # noqa: D102
        self.force |= ext is snapshot  # it is as old as its torch
        try:
            super().build_extension(ext)
        except Exception as error:
            if ext is not snapshot:
                raise
            warnings.warn(f"building without {ext.name}, steps take longer to begin: {error}", stacklevel=1)
            self.extensions = [other for other in self.extensions if other is not ext]


setup(
    ext_modules=[extension, snapshot],
    cmdclass={"build_ext": OptionalBuild.with_options(use_ninja=cpp_extension.is_ninja_available())},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if HAS_LIMITED_API else {},
)
