"""How the benchmarks alter training pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from bench import augmentations


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_crop_and_flip_is_a_window_of_the_padded_picture(generator):
    x = torch.randint(1, 256, (40, 3, 8, 6), generator=generator, dtype=torch.uint8)
    out = augmentations.crop_and_flip(x, generator)
    padded = torch.nn.functional.pad(x, [4] * 4)
    found = set()
    for before, after in zip(padded, out, strict=True):
        windows = {(top, left): before[:, top : top + 8, left : left + 6] for top in range(9) for left in range(9)}
        places = [(*place, False) for place, window in windows.items() if torch.equal(after, window)]
        places += [(*place, True) for place, window in windows.items() if torch.equal(after, window.flip(2))]
        assert places
        found.update(places[:1])
    # they do differ, in all three
    assert [len({place[i] for place in found}) > 1 for i in range(3)] == [True] * 3


def test_nothing_is_left_of_the_other_alterations_where_they_have_no_strength(monkeypatch):
    x = torch.from_numpy(random_bytes(20, 3, 8, 8))
    cropped, altered = (
        change(x, torch.Generator().manual_seed(1))
        for change in (augmentations.crop_and_flip, augmentations.crop_flip_turn_and_recolour)
    )
    assert not torch.equal(altered, cropped)
    for strength in ("DEGREES", "SHIFT", "ZOOM", "RECOLOUR"):
        monkeypatch.setattr(augmentations, strength, 0.0)
    altered = augmentations.crop_flip_turn_and_recolour(x, torch.Generator().manual_seed(1))
    assert torch.equal(altered, cropped)


def test_pictures_are_turned_shifted_and_zoomed_about_their_middle(monkeypatch):
    pixels = random_bytes(20, 20, 3)
    picture = Image.fromarray(pixels)

    def turned(*chance):
        return np.asarray(augmentations._turned(picture, *chance))

    shifted = np.zeros_like(pixels)  # by a tenth to the right, and up
    shifted[:-2, 2:] = pixels[2:, :-2]
    np.testing.assert_array_equal(turned(0, 1, -1, 0), shifted)
    monkeypatch.setattr(augmentations, "DEGREES", 90.0)
    np.testing.assert_array_equal(turned(1, 0, 0, 0), np.rot90(pixels, -1))
    monkeypatch.setattr(augmentations, "ZOOM", 1.0)
    np.testing.assert_array_equal(turned(0, 0, 0, 1), pixels[5:15, 5:15].repeat(2, 0).repeat(2, 1))


def test_pictures_are_recoloured_by_the_parts_asked_for():
    pixels = random_bytes(6, 6, 3)
    bright = augmentations._recoloured(Image.fromarray(pixels), [1.0, 0.0, 0.0], [2, 0, 1])
    expected = np.minimum(pixels * 1.2, 255)
    assert np.abs(np.asarray(bright) - expected).max() <= 1  # whole numbers
    flat = augmentations._recoloured(Image.fromarray(pixels), [0.0, -5.0, 0.0], [0, 1, 2])  # no contrast at all
    assert np.asarray(flat).std() == 0


def test_alterations_of_colour_need_colours():
    with pytest.raises(ValueError, match="3 channels, got 1"):
        augmentations.crop_flip_turn_and_recolour(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.Generator())
