"""The one way from an image to pixels: decode, turn upright, convert, crop, resize.

Training, evaluation, prediction, the page and the notebook all use it, so that one image is the
same pixels everywhere. B batch, C channels, h w source size, H W target size in pixels.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.errors import UserError
from models.modeling import VisionTransformer
from utils.augment import crop_resize, normalize

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels
SMALL_SIDE = 64  # images up to this are resized by `utils.augment`, as images in memory are

Source = str | Path | Image.Image | np.ndarray

# Pillow warns of odd metadata and transparency. In a data set that is many lines, which hide the
# progress bar. Errors still come. Set for the process: catch_warnings is not safe with threads.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def read_image(source: Source, channels: int = 3) -> Image.Image:
    """Decode `source` with 1 (grey), 3 (RGB) or 4 (RGBA) channels, turned as its EXIF data says.

    `source` is a path, a PIL image, or a uint8 array (h, w) or (h, w, C). Of an animation the
    first frame is taken, of 16-bit pixels the upper 8 bits. Palettes and CMYK are converted;
    transparency is dropped unless there are 4 channels. Raises UserError, which names the file,
    for a damaged file, float pixels, or more pixels than Pillow deems safe.
    """
    mode = CHANNEL_MODES[channels]
    with _image_errors(source):
        if isinstance(source, np.ndarray):
            return _convert(Image.fromarray(source), mode)
        if isinstance(source, Image.Image):
            return _convert(source, mode)
        with Image.open(source) as image:
            return _convert(image, mode)


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header alone, before EXIF turns it. Raises UserError."""
    with _image_errors(path), Image.open(path) as image:
        return image.size


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255: all white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("32-bit float pixels, whose range is not known")
    return image.convert(mode)


@contextmanager
def _image_errors(source: Source) -> Iterator[None]:
    """Turn whatever the decoders of untrusted files raise into a UserError of one line."""
    try:
        yield
    except Exception as error:
        name = source if isinstance(source, str | Path) else "the image"
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(f"{name} is not a readable image ({reason})") from error


def to_pixels(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> Tensor:
    """The uint8 pixels (C, H, W) that a model sees of an image of `read_image`.

    `box` (top, left, height, width) is cut out first, then resized to `size` (H, W).
    """
    top, left, height, width = box or (0, 0, image.height, image.width)
    if max(image.size) <= SMALL_SIDE:
        boxes = torch.tensor([[top, left, height, width]])
        return crop_resize(to_tensor(image)[None], boxes, size)[0].byte()
    if box:  # a resize of the whole image would blend in pixels from outside the box
        image = image.crop((left, top, left + width, top + height))
    return to_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR))


def to_input(source: Source, model: VisionTransformer) -> Tensor:
    """`source` as the model takes it: (1, C, H, W) in [-1, 1], on its device, in its dtype."""
    pixels = to_pixels(read_image(source, model.in_channels), model.img_size)
    weight = model.head.weight
    return normalize(pixels[None]).to(weight.device, weight.dtype)


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels uint8 (C, h, w) of an image in one of CHANNEL_MODES."""
    pixels = torch.from_numpy(np.array(image))  # (h, w) or (h, w, C)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (C, H, W) in [-1, 1] as an image; of 2 or more than 4 channels the first is shown."""
    pixels = pixels if len(pixels) in CHANNEL_MODES else pixels[:1]
    pixels = pixels.detach().float().cpu().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    pixels = pixels.permute(1, 2, 0).numpy()  # (H, W, C)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def image_files(folder: Path) -> list[Path]:
    """All files below `folder` with the suffix of a known image format, sorted; no hidden ones.

    Links are followed, to each folder once. A link that leads nowhere is in the list, so that
    reading it names it.
    """
    suffixes = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(path for path in found if path.is_file() or path.is_symlink())
