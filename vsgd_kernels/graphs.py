"""CUDA graphs."""

import torch


def capturing() -> bool:
    """Whether a graph is being made of what is launched now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
