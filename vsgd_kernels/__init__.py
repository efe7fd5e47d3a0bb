"""Fused VSGD (Variational Stochastic Gradient Descent) optimizers for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from .checkpoint import authors_state_dict
from .vsgd import VSGD, Posterior

try:
    __version__ = version("vsgd-kernels")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "unknown"

__all__ = ["VSGD", "Posterior", "__version__", "authors_state_dict"]
