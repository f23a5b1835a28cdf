"""Crop, resize, flip, normalise and mix a whole batch on its device.

Pure functions: random numbers come in as arguments. A resize is a product with two small matrices,
out = Wy @ image @ Wx^T. Their weights are Pillow's: a triangle or a cubic, which is widened where
the image shrinks, so that nothing aliases. Pixels are rounded after each of the two products, as
Pillow does, and differ from Pillow's by at most 2 of 255. B batch, C channels, h w source size,
H W target size in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, floor, log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from models.pixels import ALIASED, PLAIN, Pixels, Window

AUGMENTATIONS = ("crop", "crop+flip", "resize_crop", "none")
ASPECTS = 3 / 4, 4 / 3  # the smallest and the largest aspect ratio of a crop, width / height
TRIES = 10  # random boxes before the central fallback, as in torchvision
# The columns of `draws`, uniform numbers per image: TRIES areas, TRIES aspect ratios, then
TOP, LEFT, FLIP, MIX_KIND, MIX_FRACTION, MIX_Y, MIX_X = range(2 * TRIES, 2 * TRIES + 7)
DRAWS = 2 * TRIES + 7
# For RandAugment and random erasing follow TRIES areas and TRIES ratios of erased boxes, then
ERASED, ERASE_TOP, ERASE_LEFT = range(DRAWS + 2 * TRIES, DRAWS + 2 * TRIES + 3)
OPERATIONS = DRAWS + 2 * TRIES + 3  # then two for each operation: which one, and its sign


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images."""

    kind: str  # one of AUGMENTATIONS
    size: tuple[int, int]  # (H, W) in pixels
    min_area: float = 0.05  # the smallest fraction of an image that a crop keeps
    mixup: float = 0.0  # the alphas of `mix_pairs`, 0 for off
    cutmix: float = 0.0
    flip: bool = False  # beside the kind
    rand_augment: tuple[int, int] | None = None  # operations of an image, magnitude 0 to 30
    random_erasing: float = 0.0  # the probability

    @property
    def policy_draws(self) -> int:
        """How many numbers `utils.rand_augment` needs for each image, after DRAWS; 0 if off."""
        if not self.rand_augment and not self.random_erasing:
            return 0
        return OPERATIONS - DRAWS + 2 * (self.rand_augment or (0, 0))[0]

    def mirrored(self, draws: Tensor) -> Tensor:
        """Which images (B,) are mirrored."""
        return flips(draws) & (self.flip or self.kind == "crop+flip")

    def window(self, draws: Sequence[float] | None, how: Pixels, height: int, width: int) -> Window:
        """What the model sees of an image of (height, width) pixels. `draws` are DRAWS numbers."""
        if self.kind.startswith("crop"):
            box = crop_box(draws, height, width, self.min_area)
            # So that no scale of a JPEG puts the edges between pixels: that is faster to resize.
            if min(box[2] / self.size[0], box[3] / self.size[1]) > 4:
                box = tuple(side // 8 * 8 for side in box)
            return Window(box, self.size, (0, 0))
        place = (draws[TOP], draws[LEFT]) if self.kind == "resize_crop" else None
        return how.window(height, width, self.size, place)


def crop_box(
    draws: Sequence[float], height: int, width: int, min_area: float = 0.05
) -> tuple[int, int, int, int]:
    """A random crop (Inception style) of an image: top, left, height and width in pixels.

    The area is uniform in [min_area, 1] of the image, the aspect ratio log-uniform in ASPECTS.
    The first of ten tries that fits is taken, else the largest central box with an allowed aspect
    ratio, as in torchvision's RandomResizedCrop. `draws` (DRAWS) are uniform in [0, 1). Plain
    numbers, because tensors of one image take ten times as long.
    """
    low, high = map(log, ASPECTS)
    for share, place in zip(draws[:TRIES], draws[TRIES:TOP], strict=True):
        area = height * width * (min_area + (1 - min_area) * share)
        aspect = exp(low + (high - low) * place)
        box_h, box_w = round(sqrt(area / aspect)), round(sqrt(area * aspect))
        if 0 < box_w <= width and 0 < box_h <= height:
            top = floor(draws[TOP] * (height - box_h + 1))
            return top, floor(draws[LEFT] * (width - box_w + 1)), box_h, box_w
    box_h = round(width / ASPECTS[0]) if width / height < ASPECTS[0] else height
    box_w = round(height * ASPECTS[1]) if width / height > ASPECTS[1] else width
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w


def flips(draws: Tensor) -> Tensor:
    """Which of the images (B,) are mirrored: each with probability 1/2."""
    return draws[:, FLIP] < 0.5


def send(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Small `tensors` on `device`. A GPU gets them in one piece, without waiting for it."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    pieces = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    ends = [-len(piece) % 8 for piece in pieces]  # so that each begins at a multiple of 8 bytes
    padded = [F.pad(piece, (0, end)) for piece, end in zip(pieces, ends, strict=True)]
    sizes = [len(piece) for piece in padded]
    whole = torch.cat(padded).pin_memory().to(device, non_blocking=True)
    rows = zip(whole.split(sizes), ends, tensors, strict=True)
    return [row[: len(row) - end].view(t.dtype).view(t.shape) for row, end, t in rows]


def side_weights(
    length: Tensor, source: int, whole: int, corner: Tensor, target: int, how: Pixels
) -> Tensor:
    """Weights (B, source, target) that resize the first `length` of `source` pixels to `whole`.

    Only the pixels from `corner` on are made; `length` and `corner` are (B,). Pixels after
    `length` have weight 0, as if they had been cut off first. Columns sum to 1.
    """
    length = length.double()[:, None, None]
    scale = length / whole
    t = corner[:, None, None] + torch.arange(target)[None, None, :]
    k = torch.arange(source)[None, :, None]
    center = (t + 0.5) * scale
    widened = 1 if how.interpolation == ALIASED else scale.clamp(min=1)
    weights = _kernel((k + 0.5 - center).abs() / widened, how.interpolation == "bicubic")
    weights = weights * (k < length)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def _kernel(x: Tensor, bicubic: bool) -> Tensor:
    """Weights at distances `x` of pixels; the cubic is Keys's with a = -0.5, as Pillow's."""
    if not bicubic:
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, far * (x < 2))


def resize_with(images: Tensor, rows: Tensor, columns: Tensor, how: Pixels) -> Tensor:
    """Resize images (B, C, h, w) by weights of rows (B or 1, h, H) and columns (B or 1, w, W).

    Returns float32 (B, C, H, W) of whole numbers in 0..255.
    """
    channels, height = images.shape[1:3]

    def rounded(x: Tensor) -> Tensor:
        x = x.add_(0.5).floor_()
        return x.clamp_(0, 255) if how.interpolation == "bicubic" else x  # it may leave 0..255

    # Channels lie inside the rows, so that each side is one product for all of them.
    x = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = rounded(x.flatten(1, 2) @ columns)  # (B, h C, W)
    x = rounded(rows.mT @ x.unflatten(1, (height, channels)).flatten(2))  # (B, H, C W)
    return x.unflatten(2, (channels, -1)).transpose(1, 2)  # (B, C, H, W)


def crop_resize(
    images: Tensor, window: Window, size: tuple[int, int], how: Pixels = PLAIN
) -> Tensor:
    """What a model of `size` (H, W) sees of images (B, C, h, w) through one window.

    Returns float32 (B, C, H, W) of whole numbers in 0..255.
    """
    top, left, height, width = window.box
    part = images[:, :, top : top + height, left : left + width]
    return resize_with(part, *_window_weights(window, size, how, images.device), how)


@lru_cache(maxsize=8)  # all batches of an evaluation have one window
def _window_weights(
    window: Window, size: tuple[int, int], how: Pixels, device: torch.device
) -> list[Tensor]:
    """Weights of rows (1, h, H) and of columns (1, w, W)."""
    weights = (
        side_weights(torch.tensor([side]), side, whole, torch.tensor([corner]), target, how)
        for side, whole, corner, target in zip(window.box[2:], *window[1:], size, strict=True)
    )
    return send(device, *weights)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels 0..255 to [-1, 1]: (x - 127.5) / 127.5, as all of Google's checkpoints expect.

    It is computed in float32, and rounded once to `dtype`.
    """
    normal = torch.empty(images.shape, dtype=dtype, device=images.device)
    return torch.div(images.sub(127.5), 127.5, out=normal)


def mixes(draws: Tensor, size: tuple[int, int], mixup: float, cutmix: float) -> Tensor:
    """How `mix_pairs` mixes images of `size`: (B, 6), float32; B is even.

    `mixup` and `cutmix` are the alphas of their Beta distributions, 0 for off; with both on, each
    pair takes one of them with probability 1/2. Fractions and boxes come from the `draws` (B,
    DRAWS) of the first of the pair.
    """
    from scipy.special import betaincinv  # the quantile function of the Beta distribution

    draws = draws.double()[0::2].repeat_interleave(2, dim=0)  # (B, DRAWS): the pair's
    cut = draws[:, MIX_KIND] < 0.5 if mixup and cutmix else torch.full((len(draws),), cutmix > 0)
    quantile = draws[:, MIX_FRACTION].numpy()
    mixup_own = torch.from_numpy(betaincinv(mixup or 1.0, mixup or 1.0, quantile))  # (B,)
    cutmix_own = torch.from_numpy(betaincinv(cutmix or 1.0, cutmix or 1.0, quantile))

    height, width = size
    side = (1 - cutmix_own).sqrt()
    half_height, half_width = side * height / 2, side * width / 2
    center_y, center_x = draws[:, MIX_Y] * height, draws[:, MIX_X] * width
    top = (center_y - half_height).round().clamp(0, height)
    bottom = (center_y + half_height).round().clamp(0, height)
    left = (center_x - half_width).round().clamp(0, width)
    right = (center_x + half_width).round().clamp(0, width)
    area = (bottom - top) * (right - left) / (height * width)
    own = torch.where(cut, 1 - area, mixup_own)  # the fraction that an image keeps of itself

    return torch.stack([cut, own, top, bottom, left, right], dim=1).float()


def mix_pairs(images: Tensor, labels: Tensor, how: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbours in a batch.

    Images 2k and 2k+1 of (B, C, H, W) are mixed with each other, so that both of a pair are in one
    micro-batch. `how` are the `mixes`. Returns (images, targets float32 (B, classes) that sum to
    1).
    """
    height, width = images.shape[2:]
    cut, own, top, bottom, left, right = how.T[:, :, None, None]
    y = torch.arange(height, device=images.device)[None, :, None]
    x = torch.arange(width, device=images.device)[None, None, :]
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, H, W)
    keep = torch.where(cut > 0, (~inside).float(), own)[:, None]  # (B, 1, H, W)

    targets = F.one_hot(labels, classes).float()
    own = own.squeeze(2)  # (B, 1)
    images = keep * images + (1 - keep) * _swap_pairs(images)
    return images, own * targets + (1 - own) * _swap_pairs(targets)


def _swap_pairs(rows: Tensor) -> Tensor:
    """Rows (B, ...) in the order 1, 0, 3, 2, ..."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
