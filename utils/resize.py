"""From a decoded image to the pixels that a model sees. C channels, h w source, H W target size."""

from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.pixels import ALIASED, Pixels, Window
from utils.augment import crop_resize

SMALL_SIDE = 64  # images up to this are resized by `utils.augment`, as images in memory are


class Decoded(NamedTuple):
    """An upright image. A JPEG may be decoded at 1 / `scale`, and then begin inside a pixel."""

    pixels: np.ndarray  # uint8 (h, w, C)
    sides: tuple[int, int]  # h, w before it was scaled
    scale: int = 1
    start: tuple[float, float] = (0.0, 0.0)  # (top, left) of the image in `pixels`


def resize(image: Decoded, window: Window, size: tuple[int, int], how: Pixels) -> Tensor:
    """The uint8 pixels (C, H, W) of `size` that a model sees of an image through `window`.

    Pixels outside the box of the window are not blended in. Differs from Pillow's resize by at
    most 1 of 255, of images up to SMALL_SIDE by 2, and with bicubic of photographs by 9: of some
    images Pillow resizes the columns first.
    """
    if max(image.sides) <= SMALL_SIDE:
        return crop_resize(_to_batch(image.pixels), window, size, how)[0].byte()
    top, left, height, width = (side / image.scale for side in window.box)
    top, left = top + image.start[0], left + image.start[1]
    y, x, bottom, right = floor(top), floor(left), ceil(top + height), ceil(left + width)
    part, mode = image.pixels[y:bottom, x:right], how.interpolation.removesuffix("_no_antialias")
    on_pixels = (y, x, bottom, right) == (top, left, top + height, left + width)
    if how.interpolation == ALIASED or (on_pixels and part.shape[2] != 4):
        antialias = how.interpolation != ALIASED
        whole = F.interpolate(_to_batch(part), window.whole, mode=mode, antialias=antialias)[0]
    else:  # Pillow resizes from between pixels, and mixes colours by their alpha
        part = Image.fromarray(part[..., 0] if part.shape[2] == 1 else part)
        edges = (left - x, top - y, left + width - x, top + height - y)
        resized = part.resize(window.whole[::-1], Image.Resampling[mode.upper()], edges)
        whole = _to_batch(np.array(resized))[0]
    y, x = window.corner
    return whole[:, y : y + size[0], x : x + size[1]].contiguous()


def _to_batch(pixels: np.ndarray) -> Tensor:
    """Pixels (h, w) or (h, w, C) as (1, C, h, w), in the memory format of fast kernels."""
    height, width = pixels.shape[:2]
    pixels = pixels.reshape(height, width, -1)
    channels = pixels.shape[2]
    # Views of one row or column may pass as contiguous and have strides that PyTorch misreads.
    if pixels.strides != (width * channels, channels, 1):
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
