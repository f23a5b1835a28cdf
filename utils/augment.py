"""Crop, resize, flip and normalise a whole uint8 batch on its device.

Pure functions: what is random comes in as uniform numbers. A bilinear resize is a product with
two small matrices, out = Wy @ image @ Wx^T, whose hat weights are Pillow's (widened where the
image shrinks, so that nothing aliases). Rounding after each pass gives Pillow's pixels; they
differ by 1 at most. B batch, C channels, h w source size, H W target size in pixels.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10  # boxes drawn before the central fallback, as in torchvision
# Uniform numbers a sample: TRIES areas, TRIES aspects, then
TOP, LEFT, FLIP, MIX_KIND, MIX_SHARE, MIX_Y, MIX_X = range(2 * TRIES, 2 * TRIES + 7)
DRAWS = 2 * TRIES + 7


def crop_boxes(
    draws: Tensor,
    height: Tensor,
    width: Tensor,
    min_area: float = 0.05,
    aspects: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Inception-style random crops of images of (height, width) pixels, each (B,).

    Area uniform in [min_area, 1] of the image, aspect log-uniform; the first of ten tries that
    fits, else the largest central box with an allowed aspect: torchvision's RandomResizedCrop.
    `draws` (B, DRAWS) are uniform in [0, 1). Returns (B, 4) int64: top, left, height, width.
    """
    draws, h, w = draws.double(), height.double()[:, None], width.double()[:, None]
    area = h * w * (min_area + (1 - min_area) * draws[:, :TRIES])  # (B, TRIES)
    low, high = log(aspects[0]), log(aspects[1])
    aspect = torch.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    box_w, box_h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    first = fits.byte().argmax(dim=1, keepdim=True)  # (B, 1)
    box_h, box_w = box_h.gather(1, first), box_w.gather(1, first)
    top = (draws[:, TOP : TOP + 1] * (h - box_h + 1)).floor()
    left = (draws[:, LEFT : LEFT + 1] * (w - box_w + 1)).floor()

    whole_w = torch.where(w / h > aspects[1], (h * aspects[1]).round(), w)
    whole_h = torch.where(w / h < aspects[0], (w / aspects[0]).round(), h)
    none = ~fits.any(dim=1, keepdim=True)
    box_h, box_w = torch.where(none, whole_h, box_h), torch.where(none, whole_w, box_w)
    top = torch.where(none, ((h - whole_h) / 2).floor(), top)
    left = torch.where(none, ((w - whole_w) / 2).floor(), left)
    return torch.cat([top, left, box_h, box_w], dim=1).long()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for what the device still has to do."""
    return tensor.to(device, non_blocking=True)


def flips(draws: Tensor) -> Tensor:
    """Which samples are mirrored: half of them."""
    return draws[:, FLIP] < 0.5


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights (B, target, source) that resize pixels [start, start + length) to `target`.

    `start` and `length` are (B,). Nothing outside the interval is read, as if it had been cut
    out first. Rows sum to 1.
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
    boxes = send(boxes, images.device)
    top, left, height, width = boxes.unbind(dim=1)
    rows = resize_matrix(top, height, images.shape[2], size[0])[:, None]  # (B, 1, H, h)
    columns = resize_matrix(left, width, images.shape[3], size[1])[:, None]  # (B, 1, W, w)
    if flip is not None:
        flip = send(flip, images.device)[:, None, None, None]
        columns = torch.where(flip, columns.flip(2), columns)
    x = images.float() @ columns.mT  # (B, C, h, W)
    x = x.add_(0.5).floor_()
    x = rows @ x  # (B, C, H, W)
    return x.add_(0.5).floor_()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The plain resize of evaluation: the whole of (B, C, h, w) to (H, W), float32 in 0..255."""
    whole = torch.tensor([[0, 0, images.shape[2], images.shape[3]]])
    return crop_resize(images, whole, size)


def normalize(images: Tensor) -> Tensor:
    """Pixels 0..255 to [-1, 1]: (x - 127.5) / 127.5, as all of Google's checkpoints expect."""
    return images.float().sub(127.5).div_(127.5)


def mix_pairs(
    images: Tensor, labels: Tensor, draws: Tensor, *, mixup: float, cutmix: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbours in a batch.

    Images 2k and 2k+1 of (B, C, H, W), B even, are mixed with each other, so that a pair never
    leaves its micro-batch. `mixup` and `cutmix` are the alphas of their Beta distributions, 0
    for off; with both on, each pair takes either with probability 1/2. Shares and boxes come
    from the first one's `draws` (B, DRAWS), which are on the CPU. Returns (images, targets
    float32 (B, classes) that sum to 1).
    """
    from scipy.special import betaincinv  # the inverse of Beta's distribution function

    draws = draws.double()[0::2].repeat_interleave(2, dim=0)  # (B, DRAWS): the pair's
    cut = draws[:, MIX_KIND] < 0.5 if mixup and cutmix else torch.full((len(draws),), cutmix > 0)
    quantile = draws[:, MIX_SHARE].numpy()
    mix_share = torch.from_numpy(betaincinv(mixup or 1.0, mixup or 1.0, quantile))  # (B,)
    cut_share = torch.from_numpy(betaincinv(cutmix or 1.0, cutmix or 1.0, quantile))

    height, width = images.shape[2:]
    side = (1 - cut_share).sqrt()
    center_y, center_x = draws[:, MIX_Y] * height, draws[:, MIX_X] * width
    top, bottom = ((center_y + sign * side * height / 2).round().clamp(0, height)
                   for sign in (-1, 1))  # fmt: skip
    left, right = ((center_x + sign * side * width / 2).round().clamp(0, width)
                   for sign in (-1, 1))  # fmt: skip
    area = (bottom - top) * (right - left) / (height * width)
    own = torch.where(cut, 1 - area, mix_share)

    # A few numbers a sample travel; the masks, as large as the images, are made where they are.
    numbers = torch.stack([cut, own, top, bottom, left, right], dim=1).float()
    cut, own, top, bottom, left, right = send(numbers, images.device).T[:, :, None, None]
    y = torch.arange(height, device=images.device)[None, :, None]
    x = torch.arange(width, device=images.device)[None, None, :]
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, H, W)
    keep = torch.where(cut > 0, (~inside).float(), own)[:, None]  # (B, 1, H, W)

    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    images = keep * images + (1 - keep) * partner
    targets = F.one_hot(labels, classes).float()
    partner = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    own = own.squeeze(2)  # (B, 1)
    return images, own * targets + (1 - own) * partner
