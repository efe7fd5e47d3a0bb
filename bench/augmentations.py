"""Training pictures, altered at random as the authors' code does: `AUGMENTATIONS` has each way by its name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F

PADDING = 4  # pixels, of the crops
DEGREES, SHIFT, ZOOM, RECOLOUR = 45.0, 0.1, 0.1, 0.2  # at most; the last three as parts of 1
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture [n, channels, height, width] cropped at random from its padded self, and mirrored or not."""
    n, _, height, width = x.shape
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, [PADDING] * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_flip_turn_and_recolour(x: Tensor, generator: torch.Generator) -> Tensor:
    """`crop_and_flip`, then each picture of bytes [n, 3, height, width] turned, shifted, zoomed and recoloured.

    What the authors train on Tiny ImageNet with: angles up to 45 degrees, shifts and zooms up to a tenth, and
    brightness, contrast and saturation up to a fifth more or less, in random order.
    """
    if x.shape[1] != 3:
        raise ValueError(f"augmentation needs pictures of 3 channels, got {x.shape[1]}")
    x = crop_and_flip(x, generator)
    chances = (2 * torch.rand(len(x), 4 + len(ENHANCERS), generator=generator) - 1).tolist()  # from -1 to 1
    orders = torch.rand(len(x), len(ENHANCERS), generator=generator).argsort(1).tolist()
    altered = [
        _recoloured(_turned(Image.fromarray(picture), *chance[:4]), chance[4:], order)
        for picture, chance, order in zip(x.permute(0, 2, 3, 1).numpy(), chances, orders, strict=True)
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in altered])).permute(0, 3, 1, 2)


def _turned(picture: Image.Image, turn: float, right: float, down: float, zoom: float) -> Image.Image:
    """About its middle; each number is from -1 to 1, the part of what there is at most. Uncovered pixels are black."""
    x, y = picture.width / 2, picture.height / 2
    dx, dy = round(right * SHIFT * picture.width), round(down * SHIFT * picture.height)
    scale, angle = 1 + zoom * ZOOM, math.radians(turn * DEGREES)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # From a pixel of the result back to that of the picture.
    back = (cos, sin, x - cos * (x + dx) - sin * (y + dy), -sin, cos, y + sin * (x + dx) - cos * (y + dy))
    return picture.transform(picture.size, Image.Transform.AFFINE, back, Image.Resampling.NEAREST)


def _recoloured(picture: Image.Image, amounts: list[float], order: list[int]) -> Image.Image:
    for i in order:
        picture = ENHANCERS[i](picture).enhance(1 + amounts[i] * RECOLOUR)
    return picture


#: None leaves pictures as they are.
AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor] | None] = {
    "none": None,
    "crop-flip": crop_and_flip,
    "crop-flip-turn-recolour": crop_flip_turn_and_recolour,
}
