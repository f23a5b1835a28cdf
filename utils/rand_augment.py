"""RandAugment (arXiv:1909.13719) and random erasing (arXiv:1708.04896), as torchvision's v2 does.

Both change uint8 images after the crop and the flip, a whole batch on its device: images with the
same operation are one sub-batch. The draws are on the host, so that a GPU is never waited for. B
batch, C channels (1 or 3 for RandAugment, any number for erasing), H W size in pixels.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import atan, degrees, exp, floor, log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.augment import (
    DRAWS,
    ERASE_LEFT,
    ERASE_TOP,
    ERASED,
    OPERATIONS,
    TRIES,
    Augmentation,
    send,
)

MAGNITUDES = 31  # from 0 to 30
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED += ("Brightness", "Color", "Contrast", "Sharpness")
NAMES = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
AREAS, RATIOS = (0.02, 0.33), (0.3, 3.3)  # of erased boxes; a ratio is height / width
GREY = 128  # of erased boxes: zero, to half a level, where images are in [-1, 1]


def apply(images: Tensor, draws: Sequence[Sequence[float]], how: Augmentation) -> Tensor:
    """Images (B, C, H, W), whole numbers of any type, after RandAugment and random erasing: uint8.

    `draws` has DRAWS + `how.policy_draws` numbers for each. Raises TypeError, as torchvision
    does, where RandAugment gives other than 1 or 3 channels to an operation of colours.
    """
    images = images.to(torch.uint8, memory_format=torch.contiguous_format)
    count, magnitude = how.rand_augment or (0, 0)
    height, width = images.shape[2:]
    columns = range(OPERATIONS, OPERATIONS + 2 * count, 2)
    picks = [[pick(*row[at : at + 2]) for row in draws] for at in columns]
    orders = [sorted(range(len(draws)), key=picked.__getitem__) for picked in picks]
    returns = [sorted(range(len(draws)), key=order.__getitem__) for order in orders]
    boxes = [erase_box(row, how.random_erasing, height, width) for row in draws]
    *orders, boxes = send(images.device, *map(torch.tensor, (*orders, *returns, boxes)))
    for picked, order, back in zip(picks, orders[:count], orders[count:], strict=True):
        changes = _changes(magnitude, (height, width), images.device)
        parts = images.index_select(0, order).split([*map(picked.count, range(len(changes)))])
        pairs = zip(changes, parts, strict=True)
        images = torch.cat([change(part) for change, part in pairs if len(part)])
        images = images.index_select(0, back)
    return erase(images, boxes) if how.random_erasing else images


def pick(operation: float, sign: float) -> int:
    """Twice the number of an operation in NAMES, and 1 more if its magnitude is negative."""
    number = floor(operation * len(NAMES))
    return 2 * number + (NAMES[number] in SIGNED and sign < 0.5)


def erase_box(
    draws: Sequence[float], probability: float, height: int, width: int
) -> tuple[int, int, int, int]:
    """The box that is erased: top, left, height and width in pixels, or four zeros.

    Its area is uniform in AREAS of the image, its ratio log-uniform in RATIOS. The first of TRIES
    that fits is taken, else nothing is erased.
    """
    low, high = map(log, RATIOS)
    shares, places = draws[DRAWS : DRAWS + TRIES], draws[DRAWS + TRIES : ERASED]
    for share, place in zip(shares, places, strict=True) if draws[ERASED] < probability else ():
        area = height * width * (AREAS[0] + (AREAS[1] - AREAS[0]) * share)
        ratio = exp(low + (high - low) * place)
        box_h, box_w = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if box_h < height and box_w < width:
            top = floor(draws[ERASE_TOP] * (height - box_h + 1))
            return top, floor(draws[ERASE_LEFT] * (width - box_w + 1)), box_h, box_w
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Images (B, C, H, W) with the box of each, of `boxes` (B, 4), filled with GREY."""
    top, left, box_h, box_w = boxes.T[:, :, None, None]
    y = torch.arange(images.shape[2], device=images.device)[None, :, None]
    x = torch.arange(images.shape[3], device=images.device)[None, None, :]
    rows, columns = (y >= top) & (y < top + box_h), (x >= left) & (x < left + box_w)
    return torch.where((rows & columns)[:, None], GREY, images)


@lru_cache(maxsize=4)
def _changes(
    magnitude: int, size: tuple[int, int], device: torch.device
) -> list[Callable[[Tensor], Tensor]]:
    """What every `pick` does to uint8 images (B, C, H, W) of `size`, on `device`.

    Images are moved to the nearest pixel, and 0 comes in from outside: torchvision's defaults.
    """
    import torchvision.transforms.v2.functional as tv  # slow: only runs that use it wait for it

    height, width = size
    numbers = torch.arange(1.0, height * width + 1).view(1, height, width)  # of all pixels
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}

    def affine(**values):
        return partial(_move, tv.affine(numbers, **still | values).flatten().long().to(device))

    def change(name: str, sign: int) -> Callable[[Tensor], Tensor]:
        def level(last: float, first: float = 0.0) -> float:
            return sign * torch.linspace(first, last, MAGNITUDES)[magnitude].item()

        match name:
            case "ShearX":
                return affine(shear=[degrees(atan(level(0.3))), 0.0], center=[0, 0])
            case "ShearY":
                return affine(shear=[0.0, degrees(atan(level(0.3)))], center=[0, 0])
            case "TranslateX":
                return affine(translate=[int(level(150 / 331 * width)), 0])
            case "TranslateY":
                return affine(translate=[0, int(level(150 / 331 * height))])
            case "Rotate":
                source = tv.rotate(numbers, level(30.0)).flatten().long().to(device)
                return partial(_move, source)
            case "Posterize":
                return partial(tv.posterize, bits=8 - round(magnitude / 7.5))
            case "Solarize":
                return partial(tv.solarize, threshold=255 * level(0.0, 1.0))
        factor = 1 + level(0.9)
        return {
            "Identity": lambda images: images,
            "Brightness": partial(tv.adjust_brightness, brightness_factor=factor),
            "Color": partial(tv.adjust_saturation, saturation_factor=factor),
            "Contrast": partial(tv.adjust_contrast, contrast_factor=factor),
            "Sharpness": partial(_sharpness, factor),
            "AutoContrast": tv.autocontrast,
            "Equalize": tv.equalize,
        }[name]

    return [change(name, sign) for name in NAMES for sign in (1, -1)]


def _move(source: Tensor, images: Tensor) -> Tensor:
    """Each pixel comes from pixel number `source` (H W,), counted from 1; 0 is black."""
    padded = F.pad(images.flatten(2), (1, 0))
    return padded.gather(2, source.expand(*images.shape[:2], -1)).view(images.shape)


def _sharpness(factor: float, images: Tensor) -> Tensor:
    """torchvision's adjust_sharpness. It waits for a GPU, which may round its convolution."""
    if min(images.shape[2:]) <= 2:
        return images
    sharp = images.float()
    inner = sharp[:, :, 1:-1, 1:-1]
    sums = F.avg_pool2d(sharp, 3, stride=1, divisor_override=1)  # of nine whole numbers: exact
    blurred = sums.add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1 - factor)
    return sharp.clamp_(0, 255).byte()
