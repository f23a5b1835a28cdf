"""Batched crop and resize against Pillow and torchvision, on photographs and on noise."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, kstest
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop

from models.pixels import PLAIN, Window
from utils import augment
from utils.augment import DRAWS, Augmentation, crop_box, crop_resize, flips, mix_pairs, mixes, send
from utils.crop_table import CropTable


def photographs(height, width):
    """Both of scikit-learn's photographs, cut to a size: uint8 (2, 3, height, width)."""
    photos = [load_sample_image(name) for name in ("flower.jpg", "china.jpg")]
    photos = np.stack(photos)[:, 100 : 100 + height, 200 : 200 + width]
    return torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()


def noise(height, width):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


def pillow(image, box, size, flip=False):
    top, left, height, width = box
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def uniform(n, seed=0):
    return torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed))


def crop_boxes(n, size, seed=0):
    """Boxes (n, 4) of images of one size."""
    return torch.tensor([crop_box(row, *size) for row in uniform(n, seed).tolist()])


LARGER = [((side, side), (size, size)) for side in (32, 64) for size in (224, 384)]
SIZES = [((8, 8), (224, 224)), ((32, 32), (32, 32)), ((32, 32), (48, 24)), ((64, 48), (32, 40))]


@pytest.mark.parametrize("content", [photographs, noise])
@pytest.mark.parametrize("source, target", [*LARGER, *SIZES, ((100, 90), (33, 17))])
def test_pixels_are_pillows(source, target, content):
    """Mostly equal: crops of training at most 1 of 255 apart, the resize of evaluation 2."""
    images = content(*source).repeat(8, 1, 1, 1)
    boxes, mirrored = crop_boxes(16, source, seed=3), flips(uniform(16, seed=3))
    assert 0 < mirrored.sum() < 16
    crops = zip(images, boxes.tolist(), mirrored, strict=True)
    cropped = torch.stack([pillow(image, box, target, flip) for image, box, flip in crops])
    resized = torch.stack([pillow(image, [0, 0, *source], target) for image in images[:2]])
    windows = [Window(box, target, (0, 0)) for box in boxes.tolist()]
    table = CropTable(Augmentation("crop+flip", target), PLAIN, source, torch.device("cpu"))
    crops = table.resize(images, *table.places(windows, mirrored))
    whole = Window((0, 0, *source), target, (0, 0))
    pairs = (crops, cropped, 1), (crop_resize(images[:2], whole, target), resized, 2)
    for ours, theirs, apart in pairs:
        difference = (ours - theirs).abs()
        assert difference.max() <= apart
        # Halves are rounded either way; half the size, 64 -> 32, makes most of them.
        assert (difference > 0).float().mean() < (0.25 if source == (64, 48) else 0.12)
        assert (difference > 1).float().mean() < 1e-3
    if (source, target) in LARGER:  # few crops have halves
        assert (crops != cropped).float().mean() < 4e-3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_small_tensors_are_sent_in_one_piece(device, monkeypatch):
    """That a GPU unpacks them rightly is tested without one: its copy stays on the CPU."""
    sent = []
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: sent.append("pinned") or t)
        copy = lambda tensor, to, **options: sent.append((to.type, options)) or tensor  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "to", copy)
    numbers = torch.arange(35).view(5, 7)
    small = [numbers[:3, :1] > 0, numbers.T, numbers[1, :3] / 7, torch.tensor(2.5).double()]
    small += [numbers[0, :5].byte(), torch.tensor([]).long(), numbers[2:, 2:5].int()]
    for found, tensor in zip(send(torch.device(device), *small), small, strict=True):
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert sent == (["pinned", ("cuda", {"non_blocking": True})] if device == "cuda" else [])


@pytest.mark.parametrize("size", [(32, 32), (40, 200), (200, 40)])
def test_boxes_are_distributed_as_torchvisions(size):
    n = 2000
    ours = crop_boxes(n, size)
    first, last = ours[:, :2], ours[:, :2] + ours[:, 2:]
    assert (first >= 0).all() and (ours[:, 2:] > 0).all() and (last <= torch.tensor(size)).all()
    torch.manual_seed(0)
    image, area, aspect = torch.zeros(3, *size), [0.05, 1.0], [3 / 4, 4 / 3]
    theirs = torch.tensor([RandomResizedCrop.get_params(image, area, aspect) for _ in range(n)])
    for column in range(4):
        assert kstest(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > 1e-3


def test_boxes_reach_every_border():
    top, left, height, width = crop_boxes(4000, (32, 32)).unbind(1)
    for first, length in ((top, height), (left, width)):
        first, last = first[length < 30], (first + length)[length < 30]
        assert first.min() == 0 and last.max() == 32


def test_boxes_fall_back_to_the_centre():
    draws = [0.999] * DRAWS  # large areas never fit into a long strip
    assert crop_box(draws, 10, 100) == (0, 43, 10, 13)


def test_large_crops_lie_on_a_grid_that_every_scale_of_a_jpeg_keeps():
    """Eight pixels, for crops with more than four times the sides of the model; others anywhere."""
    crops, seen = Augmentation("crop", (24, 32)), {True: 0, False: 0}
    for row in uniform(300).tolist():
        box = crop_box(row, 301, 403)
        found = crops.window(row, PLAIN, 301, 403).box
        large = box[2] > 4 * 24 and box[3] > 4 * 32
        assert found == (tuple(side // 8 * 8 for side in box) if large else box)
        seen[large] += 1
    assert min(seen.values()) > 20


def test_normalisation():
    assert augment.normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def mixed(n, classes=None, draws=None, mixup=0.0, cutmix=0.0):
    """(images, targets): image i is the constant i, so that a mixed pixel tells where it is from.

    Labels repeat after `classes`, by default after `n`: every image has its own.
    """
    images = torch.arange(n).float()[:, None, None, None].expand(n, 1, 10, 12).clone()
    draws, classes = uniform(n) if draws is None else draws, classes or n
    labels = torch.arange(n) % classes
    return mix_pairs(images, labels, mixes(draws, (10, 12), mixup, cutmix), classes)


def test_mixup_mixes_neighbours_by_a_beta_fraction():
    n = 4000
    images, targets = mixed(n, classes=2, mixup=0.4)
    first, second = images[0::2, 0, 0, 0], images[1::2, 0, 0, 0]
    own = torch.arange(n)[1::2] - first  # image 2k is own * 2k + (1 - own) * (2k + 1)
    assert torch.allclose(first + second, 2 * torch.arange(n)[0::2] + 1.0, atol=1e-2)
    assert torch.allclose(targets[0::2, 0], own, atol=1e-2)
    assert torch.allclose(targets[1::2, 1], own, atol=1e-2)
    assert torch.allclose(targets.sum(dim=1), torch.ones(n))
    assert kstest(own.double().clamp(0, 1).numpy(), beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_targets_are_the_areas():
    n = 200
    images, targets = mixed(n, cutmix=1.0)
    for i in range(n):
        own = (images[i] == i).float().mean()
        assert own + (images[i] == (i ^ 1)).float().mean() == 1
        assert targets[i, i] == pytest.approx(own.item(), abs=1e-6)
        assert targets[i, i ^ 1] == pytest.approx(1 - own.item(), abs=1e-6)
    assert 0.2 < targets.diagonal().mean() < 0.9 and targets.diagonal().std() > 0.1


def test_cutmix_has_its_own_alpha():
    """A large one makes every box half of the image, and it fits if its centre is the image's."""
    draws = uniform(100)
    draws[:, augment.MIX_Y] = draws[:, augment.MIX_X] = 0.5
    _, targets = mixed(100, draws=draws, cutmix=1e4)
    assert (targets.diagonal() - 0.5).abs().max() < 0.1


def test_each_pair_takes_one_of_both_mixes():
    images, _ = mixed(400, mixup=1.0, cutmix=1.0)
    cut = (images == images.round()).flatten(1).all(dim=1).float()  # CutMix keeps whole numbers
    assert torch.equal(cut[0::2], cut[1::2]) and 0.35 < cut.mean() < 0.65
