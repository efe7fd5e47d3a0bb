"""Builds the native kernels where torch and a C++17 compiler are at hand; without them the package is pure Python.

Everything that needs neither is in pyproject.toml. The extension uses the LibTorch stable ABI and nothing of Python's C
API, so that one wheel serves every torch from 2.11 on (by its symbols from 2.10 on) and Python 3.10 and later.
"""

import sys
import warnings

from setuptools import setup

try:
    import torch  # noqa: F401
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    # An isolated build does not see torch, and must not: it would fetch gigabytes of it.
    warnings.warn("torch is not importable: building without native kernels", stacklevel=1)
    setup()
    sys.exit()


class OptionalBuild(BuildExtension):
    """A failed compilation leaves a package that works on the eager backend."""

    def run(self) -> None:  # noqa: D102
        try:
            super().run()
        except Exception as error:
            warnings.warn(f"building without native kernels, the compiler failed: {error}", stacklevel=1)
            self.extensions = []


setup(
    ext_modules=[
        CppExtension(
            "vsgd_kernels._C",
            ["csrc/register.cpp", "csrc/step_cpu.cpp", "csrc/step_device.cpp"],
            depends=[f"csrc/{name}.h" for name in ("chunks", "formats", "numbers", "rules", "step_cpu", "step_device", "watch")],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                # One rounding for each operation on every instruction set, so that all give the same bits.
                "-ffp-contract=off",
                # sqrt and selects as plain instructions; without these no loop vectorises.
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-g0",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
