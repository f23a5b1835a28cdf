"""Crop, resize, flip, normalise and mix a whole batch on its device.

Pure functions: random numbers come in as arguments. A resize is a product with two small matrices,
out = Wy @ image @ Wx^T. Their weights are Pillow's: a triangle or a cubic, which is widened where
the image shrinks, so that nothing aliases. Pixels are rounded after each of the two products, as
Pillow does, and differ from Pillow's by at most 2 of 255. B batch, C channels, h w source size,
H W target size in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images."""

    kind: str  # one of AUGMENTATIONS
    size: tuple[int, int]  # (H, W) in pixels
    min_area: float = 0.05  # the smallest fraction of an image that a crop keeps
    mixup: float = 0.0  # the alphas of `mix_pairs`, 0 for off
    cutmix: float = 0.0
    flip: bool = False  # beside the kind

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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the work that the device still has to do."""
    return tensor.to(device, non_blocking=True)


def resize_matrix(
    start: Tensor, length: Tensor, source: int, whole: int, corner: Tensor, target: int, how: Pixels
) -> Tensor:
    """Weights (B, target, source) that resize the pixels [start, start + length) to `whole`.

    Only the rows from `corner` on are made; `start`, `length` and `corner` are (B,). Pixels outside
    the interval have weight 0, as if it had been cut out first. Rows sum to 1.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / whole
    t = corner[:, None, None] + torch.arange(target, device=start.device)[None, :, None]
    k = torch.arange(source, device=start.device)[None, None, :]
    center = start + (t + 0.5) * scale
    widened = 1 if how.interpolation == ALIASED else scale.clamp(min=1)
    weights = _kernel((k + 0.5 - center).abs() / widened, how.interpolation == "bicubic")
    weights = weights * ((k >= start) & (k < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def _kernel(x: Tensor, bicubic: bool) -> Tensor:
    """Weights at distances `x` of pixels; the cubic is Keys's with a = -0.5, as Pillow's."""
    if not bicubic:
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, far * (x < 2))


def crop_resize(
    images: Tensor,
    windows: Sequence[Window],
    size: tuple[int, int],
    flip: Tensor | None = None,
    how: Pixels = PLAIN,
) -> Tensor:
    """What a model of `size` (H, W) sees of uint8 images (B, C, h, w) through B or 1 `windows`.

    The windows have equal `whole`. `flip` (B,) mirrors left and right. Returns float32
    (B, C, H, W) of whole numbers in 0..255.
    """
    numbers = torch.tensor([(*window.box, *window.corner) for window in windows])
    top, left, height, width, y, x = send(numbers, images.device).unbind(dim=1)
    whole = windows[0].whole
    rows = resize_matrix(top, height, images.shape[2], whole[0], y, size[0], how)  # (B, H, h)
    columns = resize_matrix(left, width, images.shape[3], whole[1], x, size[1], how)  # (B, W, w)
    if flip is not None:
        columns = torch.where(send(flip, images.device)[:, None, None], columns.flip(1), columns)
    narrow = images.float() @ columns[:, None].mT  # (B, C, h, W); a cubic may leave 0..255
    narrow = narrow.add_(0.5).floor_().clamp_(0, 255)
    return (rows[:, None] @ narrow).add_(0.5).floor_().clamp_(0, 255)


def normalize(images: Tensor) -> Tensor:
    """Pixels 0..255 to [-1, 1]: (x - 127.5) / 127.5, as all of Google's checkpoints expect."""
    return images.float().sub(127.5).div_(127.5)


def mix_pairs(
    images: Tensor, labels: Tensor, draws: Tensor, *, mixup: float, cutmix: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbours in a batch.

    Images 2k and 2k+1 of (B, C, H, W), B even, are mixed with each other, so that both of a pair
    are in one micro-batch. `mixup` and `cutmix` are the alphas of their Beta distributions, 0 for
    off; with both on, each pair takes one of them with probability 1/2. Fractions and boxes come
    from `draws` (B, DRAWS, on the CPU) of the first of the pair. Returns (images, targets float32
    (B, classes) that sum to 1).
    """
    from scipy.special import betaincinv  # the quantile function of the Beta distribution

    draws = draws.double()[0::2].repeat_interleave(2, dim=0)  # (B, DRAWS): the pair's
    cut = draws[:, MIX_KIND] < 0.5 if mixup and cutmix else torch.full((len(draws),), cutmix > 0)
    quantile = draws[:, MIX_FRACTION].numpy()
    mixup_own = torch.from_numpy(betaincinv(mixup or 1.0, mixup or 1.0, quantile))  # (B,)
    cutmix_own = torch.from_numpy(betaincinv(cutmix or 1.0, cutmix or 1.0, quantile))

    height, width = images.shape[2:]
    side = (1 - cutmix_own).sqrt()
    half_height, half_width = side * height / 2, side * width / 2
    center_y, center_x = draws[:, MIX_Y] * height, draws[:, MIX_X] * width
    top = (center_y - half_height).round().clamp(0, height)
    bottom = (center_y + half_height).round().clamp(0, height)
    left = (center_x - half_width).round().clamp(0, width)
    right = (center_x + half_width).round().clamp(0, width)
    area = (bottom - top) * (right - left) / (height * width)
    own = torch.where(cut, 1 - area, mixup_own)  # the fraction that an image keeps of itself

    # Only six numbers per image go to the device; the masks, as large as images, are made there.
    numbers = torch.stack([cut, own, top, bottom, left, right], dim=1).float()
    cut, own, top, bottom, left, right = send(numbers, images.device).T[:, :, None, None]
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
