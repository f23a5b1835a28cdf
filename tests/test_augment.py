"""Batched crop and resize against Pillow and torchvision, on real photographs."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, kstest
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from utils.augment import (
    DRAWS,
    MIX_X,
    MIX_Y,
    crop_boxes,
    crop_resize,
    flips,
    mix_pairs,
    normalize,
    resize,
)


def photographs(height, width):
    """Both of scikit-learn's photographs, cut to a size: uint8 (2, 3, height, width)."""
    images = [load_sample_image(n)[100 : 100 + height, 200 : 200 + width] for n in
              ("flower.jpg", "china.jpg")]  # fmt: skip
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def pillow(image, box, size, flip=False):
    top, left, height, width = box
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    ("source", "target"),
    [((32, 32), (224, 224)), ((32, 32), (32, 32)), ((64, 48), (32, 40)), ((100, 90), (33, 17)),
     ((32, 32), (48, 24)), ((8, 8), (224, 224))],
)  # fmt: skip
def test_pixels_are_pillows(source, target):
    """Never more than 1 of 255 apart, and mostly equal: training crops and evaluation."""
    images = photographs(*source).repeat(16, 1, 1, 1)
    draws = torch.rand(32, DRAWS, generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor(source).expand(32, 2)
    boxes, mirrored = crop_boxes(draws, sizes[:, 0], sizes[:, 1]), flips(draws)
    assert 0 < mirrored.sum() < 32
    ours = crop_resize(images, boxes, target, mirrored)
    theirs = torch.stack([pillow(i, b.tolist(), target, f) for i, b, f in
                          zip(images, boxes, mirrored, strict=True)])  # fmt: skip
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.12  # ties of a half round either way
    whole = [0, 0, *source]
    theirs = torch.stack([pillow(image, whole, target) for image in images[:2]])
    assert (resize(images[:2], target) - theirs).abs().max() <= 1


def test_agrees_with_torchvision():
    image = photographs(64, 64)[:1]
    box = [5, 9, 40, 33]
    theirs = tvf.resized_crop(image, *box, [56, 56], InterpolationMode.BILINEAR, antialias=True)
    ours = crop_resize(image, torch.tensor([box]), (56, 56))
    assert (ours - theirs.float()).abs().max() <= 1
    theirs = tvf.resized_crop(image, *box, [20, 20], InterpolationMode.BILINEAR, antialias=True)
    assert (crop_resize(image, torch.tensor([box]), (20, 20)) - theirs.float()).abs().max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (40, 200), (200, 40)])
def test_boxes_are_distributed_as_torchvisions(size):
    n = 2000
    draws = torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(0))
    ours = crop_boxes(draws, torch.full((n,), size[0]), torch.full((n,), size[1]))
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all() and (ours[:, 1] + ours[:, 3] <= size[1]).all()
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    )
    for column in range(4):
        assert kstest(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > 1e-3


def test_boxes_fall_back_to_the_centre():
    draws = torch.ones(1, DRAWS) * 0.999  # as large as can be: never fits into a long strip
    box = crop_boxes(draws, torch.tensor([10]), torch.tensor([100]))
    assert box.tolist() == [[0, 43, 10, 13]]


def test_normalisation():
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def uniform(n, seed=0):
    return torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed))


def constant_images(n):
    """Image i is the constant i, so that a mixed pixel tells whose it is."""
    return torch.arange(n).float()[:, None, None, None].expand(n, 1, 10, 12).clone()


def test_mixup_mixes_neighbours_by_a_beta_share():
    n = 4000
    images, targets = mix_pairs(constant_images(n), torch.arange(n) % 2, uniform(n), mixup=0.4,
                                cutmix=0.0, classes=2)  # fmt: skip
    first, second = images[0::2, 0, 0, 0], images[1::2, 0, 0, 0]
    own = torch.arange(n)[1::2] - first  # image 2k is share * 2k + (1 - share) * (2k + 1)
    assert torch.allclose(first + second, 2 * torch.arange(n)[0::2] + 1.0, atol=1e-2)
    assert torch.allclose(targets[0::2, 0], own, atol=1e-2)
    assert torch.allclose(targets[1::2, 1], own, atol=1e-2)
    assert torch.allclose(targets.sum(dim=1), torch.ones(n))
    assert kstest(own.double().clamp(0, 1).numpy(), beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_targets_are_the_areas():
    n = 200
    images, targets = mix_pairs(constant_images(n), torch.arange(n), uniform(n), mixup=0.0,
                                cutmix=1.0, classes=n)  # fmt: skip
    for i in range(n):
        own = (images[i] == i).float().mean()
        assert own + (images[i] == (i ^ 1)).float().mean() == 1
        assert targets[i, i] == pytest.approx(own.item(), abs=1e-6)
        assert targets[i, i ^ 1] == pytest.approx(1 - own.item(), abs=1e-6)
    assert 0.2 < targets.diagonal().mean() < 0.9 and targets.diagonal().std() > 0.1


def test_cutmix_has_an_alpha_of_its_own():
    """A large one makes every box half of the image, which fits where its centre is the image's."""
    draws = uniform(100)
    draws[:, MIX_Y] = draws[:, MIX_X] = 0.5
    _, targets = mix_pairs(constant_images(100), torch.arange(100), draws, mixup=0.0, cutmix=1e4,
                           classes=100)  # fmt: skip
    assert (targets.diagonal() - 0.5).abs().max() < 0.1


def test_boxes_reach_every_border():
    side = torch.full((4000,), 32)
    top, left, height, width = crop_boxes(uniform(4000), side, side, 0.05).unbind(1)
    for first, length in ((top, height), (left, width)):
        first, last = first[length < 30], (first + length)[length < 30]
        assert first.min() == 0 and last.max() == 32


def test_both_mixes_are_chosen_by_pair():
    n = 400
    images, _ = mix_pairs(constant_images(n), torch.arange(n), uniform(n), mixup=1.0, cutmix=1.0,
                          classes=n)  # fmt: skip
    whole = ((images == images.round()).flatten(1).all(dim=1)).float()  # CutMix keeps integers
    assert torch.equal(whole[0::2], whole[1::2]) and 0.35 < whole.mean() < 0.65
