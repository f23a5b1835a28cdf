"""Crop, resize, flip, normalise and mix a whole batch on its device.

Pure functions: random numbers come in as arguments. A bilinear resize is a product with two small
matrices, out = Wy @ image @ Wx^T. Their weights are Pillow's: a triangle, which is widened where
the image shrinks, so that nothing aliases. Pixels are rounded after each of the two products, as
Pillow does, and differ from Pillow's by at most 2 of 255. B batch, C channels, h w source size,
H W target size in pixels.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECTS = 3 / 4, 4 / 3  # the smallest and the largest aspect ratio of a crop, width / height
TRIES = 10  # random boxes before the central fallback, as in torchvision
# The columns of `draws`, uniform numbers per image: TRIES areas, TRIES aspect ratios, then
TOP, LEFT, FLIP, MIX_KIND, MIX_FRACTION, MIX_Y, MIX_X = range(2 * TRIES, 2 * TRIES + 7)
DRAWS = 2 * TRIES + 7


def crop_boxes(draws: Tensor, height: Tensor, width: Tensor, min_area: float = 0.05) -> Tensor:
    """Random crops (Inception style) of images of (height, width) pixels, each (B,).

    The area is uniform in [min_area, 1] of the image, the aspect ratio log-uniform in ASPECTS.
    The first of ten tries that fits is taken, else the largest central box with an allowed aspect
    ratio, as in torchvision's RandomResizedCrop. `draws` (B, DRAWS) are uniform in [0, 1).
    Returns int64 (B, 4): top, left, height, width.
    """
    draws, h, w = draws.double(), height.double()[:, None], width.double()[:, None]
    area = h * w * (min_area + (1 - min_area) * draws[:, :TRIES])  # (B, TRIES)
    low, high = map(log, ASPECTS)
    aspect = torch.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    box_w, box_h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    first = fits.byte().argmax(dim=1, keepdim=True)  # (B, 1)
    box_h, box_w = box_h.gather(1, first), box_w.gather(1, first)
    top = (draws[:, TOP : TOP + 1] * (h - box_h + 1)).floor()
    left = (draws[:, LEFT : LEFT + 1] * (w - box_w + 1)).floor()

    central_w = torch.where(w / h > ASPECTS[1], (h * ASPECTS[1]).round(), w)
    central_h = torch.where(w / h < ASPECTS[0], (w / ASPECTS[0]).round(), h)
    none = ~fits.any(dim=1, keepdim=True)
    box_h, box_w = torch.where(none, central_h, box_h), torch.where(none, central_w, box_w)
    top = torch.where(none, ((h - central_h) / 2).floor(), top)
    left = torch.where(none, ((w - central_w) / 2).floor(), left)
    return torch.cat([top, left, box_h, box_w], dim=1).long()


def flips(draws: Tensor) -> Tensor:
    """Which of the images (B,) are mirrored: each with probability 1/2."""
    return draws[:, FLIP] < 0.5


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the work that the device still has to do."""
    return tensor.to(device, non_blocking=True)


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights (B, target, source) that resize the pixels [start, start + length) to `target`.

    `start` and `length` are (B,). Pixels outside the interval have weight 0, as if it had been
    cut out first. Rows sum to 1.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / target
    t = torch.arange(target, device=start.device)[None, :, None]
    k = torch.arange(source, device=start.device)[None, None, :]
    center = start + (t + 0.5) * scale
    weights = (1 - (k + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((k >= start) & (k < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(
    images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None
) -> Tensor:
    """Cut `boxes` (B or 1, 4) out of uint8 images (B, C, h, w) and resize them to `size` (H, W).

    `flip` (B,) mirrors left and right. Returns float32 (B, C, H, W) of whole numbers in 0..255.
    """
    top, left, height, width = send(boxes, images.device).unbind(dim=1)
    rows = resize_matrix(top, height, images.shape[2], size[0])[:, None]  # (B, 1, H, h)
    columns = resize_matrix(left, width, images.shape[3], size[1])[:, None]  # (B, 1, W, w)
    if flip is not None:
        flip = send(flip, images.device)[:, None, None, None]
        columns = torch.where(flip, columns.flip(2), columns)
    narrow = (images.float() @ columns.mT).add_(0.5).floor_()  # (B, C, h, W)
    return (rows @ narrow).add_(0.5).floor_()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The plain resize of evaluation: uint8 (B, C, h, w) to float32 (B, C, H, W) in 0..255."""
    box = torch.tensor([[0, 0, images.shape[2], images.shape[3]]])
    return crop_resize(images, box, size)


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
