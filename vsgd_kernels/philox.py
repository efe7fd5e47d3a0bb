"""The random numbers of rules that draw: Philox 4x32-10 (Salmon et al. 2011), in plain torch.

Keyed by (seed, step) and counted by (parameter, element): the same on every backend, whatever block, thread or order an
element is stepped in, and the same again in a run that is resumed. ``csrc/philox.h`` is the same in C++; Triton has its
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state_formats import from_memory_order

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four words of each counter; all are 32 bits, tensors int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK32, k1 + _WEYL[1] & _MASK32
    return c0, c1, c2, c3


def words(seed: int, place: int, t: int, like: Tensor) -> Tensor:
    """32 random bits of each element.

    Args:
        seed: the group's.
        place: the parameter's number in its optimizer.
        t: the step.
        like: the parameter's first state; its memory's order is that in which elements are counted.

    Returns:
        int64 of the shape of `like`. An element's word is word `element % 4` of counter `element // 4`.
    """
    quads = torch.arange(-(-like.numel() // 4), device=like.device)
    rest = torch.full_like(quads, place), torch.full_like(quads, seed >> 32)
    four = philox((seed & _MASK32, t & _MASK32), (quads & _MASK32, quads >> 32, *rest))
    return from_memory_order(torch.stack(four, 1).view(-1)[: like.numel()], like)
