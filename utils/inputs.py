"""Images as callers of `Classifier` give them, one or many. B batch, h w size in pixels."""

import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from models.errors import UserError
from utils.bit_depth import is_wide
from utils.images import Decoding, Source, read_image

KINDS = (
    "an image is a path, a PIL image, the bytes of an image file, a uint8 array (h, w, 3) or "
    "(h, w), or a uint8 tensor (3, h, w) or (1, h, w)"
)


def is_one(images) -> bool:
    """Whether this is one image, and not several: a tensor of four dimensions is a batch."""
    one = isinstance(images, str | Path | bytes | Image.Image | np.ndarray)
    return one or (isinstance(images, Tensor) and images.dim() != 4)


def all_of(images) -> Iterable:
    """One image or several as a list, whose kinds are checked; else what is iterated later.

    Raises TypeError, which says what an image is.
    """
    if is_one(images):
        images = [images]
    # Neither the lines of an open file nor the keys of a dict are meant.
    elif isinstance(images, Mapping | io.IOBase) or not isinstance(images, Iterable):
        found = type(images).__name__
        raise TypeError(f"{KINDS}; many are a list, a generator or a batch of these; not {found}")
    elif not isinstance(images, list | tuple | Tensor):
        return images
    images = list(images)
    for image in images:
        _check(image)
    return images


def may_be_wide(image) -> bool:
    """Whether an image may have more than 8 bits in a channel."""
    return isinstance(image, str | Path | bytes) or (
        isinstance(image, Image.Image) and is_wide(image)
    )


def to_source(image, how: Decoding) -> Source:
    """An image of KINDS as `decode` takes it, while the caller's own may change. Or TypeError."""
    _check(image)
    if isinstance(image, Image.Image):
        if content := _encoded(image):
            return content
        if image.width * image.height <= how.max_pixels:
            with suppress(Exception):  # of a decoder; `portable` says what is wrong
                return ImageOps.exif_transpose(image)  # a copy
    if isinstance(image, Tensor):
        image = image.cpu().permute(1, 2, 0).numpy()  # (h, w, 3 or 1)
        image = image[..., 0] if image.shape[2] == 1 else image
    return np.array(image) if isinstance(image, np.ndarray) else image


def portable(source: Source, how: Decoding) -> Source | UserError:
    """The same for a worker process, to which Pillow's images lose their way; or its error."""
    if not isinstance(source, Image.Image):
        return source
    try:
        return np.array(read_image(source, how))
    except UserError as error:
        return error


def _check(image) -> None:
    if isinstance(image, str | Path | bytes | Image.Image):
        return
    found, good = type(image).__name__, False
    if isinstance(image, np.ndarray | Tensor):
        shape = tuple(image.shape)
        found = f"{image.dtype} {shape}"
        if isinstance(image, Tensor):
            good = image.dtype == torch.uint8 and len(shape) == 3 and shape[0] in (1, 3)
        else:
            good = image.dtype == np.uint8 and (len(shape) == 2 or shape[2:] == (3,))
    if not good or 0 in shape:
        raise TypeError(f"{KINDS}; not {found}")


def _encoded(image: Image.Image) -> bytes | None:
    """The file of an image that Pillow has opened and not decoded; None for any other.

    So it is decoded as by its path, and stays as it is. Pillow would decode a large JPEG at another
    scale, and would lose half of 16 bits when it is asked a second time.
    """
    if not getattr(image, "tile", None) or image.tell():  # of an animation, another frame is meant
        return None
    with suppress(AttributeError, OSError, ValueError):  # it is closed: decoding says so
        image.fp.seek(0)  # Pillow seeks its place itself
        return image.fp.read()
    return None
