"""Fused VSGD (Variational Stochastic Gradient Descent) optimizers for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from . import memory
from .checkpoint import authors_state_dict
from .constant_vsgd import ConstantVSGD
from .sample_vsgd import SampleVSGD
from .stoch_grad_adam import StochGradAdam
from .vsgd import VSGD, Posterior

try:
    __version__ = version("vsgd-kernels")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "unknown"

__all__ = [
    "VSGD",
    "ConstantVSGD",
    "Posterior",
    "SampleVSGD",
    "StochGradAdam",
    "__version__",
    "authors_state_dict",
    "memory",
]
