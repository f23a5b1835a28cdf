"""Crops by weights that are looked up, against cutting out, resizing and mirroring each image."""

import pytest
import torch

from models.pixels import INTERPOLATIONS, Pixels
from tests.test_augment import noise, photographs, uniform
from utils.augment import AUGMENTATIONS, Augmentation, crop_resize, flips
from utils.crop_table import CropTable

SIZES = [((48, 40), (24, 36)), ((32, 40), (65, 64)), ((40, 57), (21, 33)), ((100, 130), (20, 16))]


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("source, size", SIZES, ids=str)
def test_looked_up_crops_are_those_cut_out(source, size, interpolation, kind):
    """Bit for bit. Zeros before and after a part change no sum."""
    how, recipe = Augmentation(kind, size), Pixels(interpolation, "smaller_side", 0.8)
    table = CropTable(how, recipe, source, torch.device("cpu"))
    images = torch.cat([photographs(*source), noise(*source)]).repeat(8, 1, 1, 1)
    draws = uniform(32, seed=1)
    windows, mirrored = [how.window(row, recipe, *source) for row in draws.tolist()], flips(draws)
    assert (len(set(windows)) > 20) == (kind != "none") and 8 < mirrored.sum() < 24
    found = table.resize(images, *table.places(windows, mirrored))
    assert found.std() > 30
    for ours, image, window, flip in zip(found, images, windows, mirrored, strict=True):
        wanted = crop_resize(image[None], window, size, recipe)[0]
        assert torch.equal(ours, wanted.flip(2) if flip else wanted)
