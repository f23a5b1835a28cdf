"""The one way from an image to pixels: decode, turn upright, convert, crop, resize.

Training, evaluation, prediction, the page and the notebook all use it, so that one image is the
same pixels everywhere. B batch, C channels, h w source size, H W target size in pixels.
"""

import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.errors import UserError
from models.modeling import VisionTransformer
from models.state_dict import WHITE, Metadata
from utils.augment import crop_resize, normalize

with suppress(ImportError):  # an optional plugin: HEIC, as telephones save it
    import pillow_heif

    pillow_heif.register_heif_opener()

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels
SMALL_SIDE = 64  # images up to this are resized by `utils.augment`, as images in memory are
SAMPLE = 256  # images that are decoded to find what is common to all
BIT_DEPTHS = (8, 10, 12, 14, 16)  # to which the bits of the largest value are rounded up
# Formats that Pillow recognises and cannot decode, or only with a program of the machine.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# A second reading of 16-bit channels, of which Pillow keeps the upper byte: each raw mode -> one
# of the same size that keeps the lower byte. "RGBA" takes the four bytes of grey and alpha.
_SWAPPED = ";16B" if sys.byteorder == "little" else ";16L"
LOWER_BYTES = {"LA;16B": "RGBA"}
for _mode in ("RGB", "RGBA", "RGBX"):
    LOWER_BYTES |= {f"{_mode};16B": f"{_mode};16L", f"{_mode};16L": f"{_mode};16B"}
    LOWER_BYTES[f"{_mode};16N"] = f"{_mode}{_SWAPPED}"

# Pillow warns of odd metadata and transparency. In a data set that is many lines, which hide the
# progress bar. Errors still come. Set for the process: catch_warnings is not safe with threads.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)  # Pillow's own limit
Image.MAX_IMAGE_PIXELS = None  # `Decoding` has the limit: Pillow would warn of half of it


@dataclass(frozen=True)
class Decoding:
    """How image files become 8-bit pixels."""

    channels: int = 3  # 1 grey, 3 RGB, 4 RGBA
    # Of images that store more than 8 bits: 12 means values below 4096, 0 floats from 0 to 1.
    # None: each image by its own largest value.
    bit_depth: int | None = None
    background: tuple[int, int, int] | None = WHITE  # behind transparency; None drops the alpha
    truncated: bool = False  # take what can be decoded of a file that is cut short
    max_pixels: int = MAX_PIXELS  # of one image: more may be an attack

    @classmethod
    def of(cls, model: VisionTransformer, metadata: Metadata, **options) -> "Decoding":
        """As the images were decoded on which `model` was trained."""
        return cls(model.in_channels, metadata.bit_depth, metadata.background, **options)

    @property
    def stored(self) -> dict:
        """What Metadata keeps of it."""
        return {"bit_depth": self.bit_depth, "background": self.background}


class Head(NamedTuple):
    """What a file says of its image before it is decoded, and before EXIF turns it."""

    width: int
    height: int
    wide: bool  # more than 8 bits in a channel
    transparent: bool  # it may have transparent pixels


class Item(NamedTuple):
    """One image of a map-style data set of (image, label), read when it is asked for."""

    dataset: object
    index: int
    name: str  # for messages and checksums

    def __str__(self) -> str:
        return self.name

    def open(self) -> Image.Image:
        return self.dataset[self.index][0]


Source = str | Path | Item | Image.Image | np.ndarray


def read_image(source: Source, how: Decoding | None = None) -> Image.Image:
    """Decode `source` with `how.channels` channels, turned as its EXIF data says.

    `source` is a path, an Item, a PIL image, or an array (h, w) or (h, w, C). Of an animation the
    first frame is taken. Palettes and CMYK are converted. Raises UserError, which names the file,
    for a damaged file, for pixels below 0, and for more than `how.max_pixels` pixels.
    """
    how = how or Decoding()
    with _opened(source, how) as image:
        values = _wide_values(image)
        if values is None:
            image = ImageOps.exif_transpose(image)
        else:
            depth = bit_depth_of(values) if how.bit_depth is None else how.bit_depth
            key = image.info.get("transparency")  # of a PNG: the value that is transparent
            image = Image.fromarray(_to_8_bits(values, depth))
            if key is not None:
                opaque = (values.reshape(*values.shape[:2], -1) != key).any(axis=2)
                image.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
        if how.channels != 4 and how.background and image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (*how.background, 255))
            image = Image.alpha_composite(behind, image)
        return image.convert(CHANNEL_MODES[how.channels])


def read_head(source: Source) -> Head:
    """The head of an image, without decoding it. Raises UserError."""
    with _opened(source, None) as image:
        wide = image.mode[0] in "IF" or _raw_mode(image) in LOWER_BYTES
        return Head(*image.size, wide, image.has_transparency_data)


def sampled_bit_depth(sources: Sequence[Source], how: Decoding) -> int | None:
    """The largest bit depth of SAMPLE images, which are decoded; None if all of them have 8 bits.

    Unreadable images are passed over.
    """

    def depth_of(source: Source) -> int | None:
        with suppress(UserError), _opened(source, how) as image:
            return None if (values := _wide_values(image)) is None else bit_depth_of(values)

    with ThreadPoolExecutor() as pool:
        depths = set(pool.map(depth_of, sample(sources))) - {None}
    if 0 in depths and len(depths) > 1:
        raise UserError(f"some images are floats from 0 to 1, others have {max(depths)} bits")
    return max(depths, default=None)


def depth_note(sources: Sequence[Source], how: Decoding) -> str | None:
    """A line for images whose values do not fit `how.bit_depth`; None if they do."""
    found = None if how.bit_depth is None else sampled_bit_depth(sources, how)
    if found in (None, how.bit_depth) or 0 < found < how.bit_depth:
        return None
    names = [f"{depth} bits" if depth else "floats up to 1" for depth in (found, how.bit_depth)]
    return "images have {}, and are read as {}: their brightness is wrong".format(*names)


def sample(sources: Sequence[Source]) -> list[Source]:
    """At most SAMPLE of them, at equal distances."""
    chosen = np.linspace(0, len(sources) - 1, min(SAMPLE, len(sources))).astype(int)
    return [sources[i] for i in chosen]


def has_transparent_pixels(source: Source, how: Decoding) -> bool:
    """Whether a pixel of an image is transparent, at least in part."""
    with suppress(UserError), _opened(source, how) as image:
        return image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    return False


def bit_depth_of(values: np.ndarray) -> int:
    """The bits of the largest value, rounded up to BIT_DEPTHS; 0 for floats from 0 to 1."""
    largest = values.max()
    if values.dtype.kind == "f" and largest < 2:  # interpolation overshoots 1 a little
        return 0
    bits = int(largest).bit_length()
    return next((depth for depth in BIT_DEPTHS if depth >= bits), bits)


def _to_8_bits(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """The upper 8 of `bit_depth` bits; larger values become 255."""
    floats = values.dtype.kind == "f"
    if values.min() < (-values.max() / 4 if floats else 0):  # interpolation undershoots 0 a little
        raise ValueError("it has pixels below 0")
    values = np.ldexp(values, 8 - bit_depth) if floats else values >> max(bit_depth - 8, 0)
    return values.clip(0, 255).astype(np.uint8)


def _wide_values(image: Image.Image) -> np.ndarray | None:
    """Pixels (h, w) or (h, w, C) of more than 8 bits, upright; None for an image of 8 bits."""
    if image.mode[0] in "IF":
        values = np.asarray(ImageOps.exif_transpose(image))
        return np.nan_to_num(values) if image.mode == "F" else values
    raw, file = _raw_mode(image), getattr(image, "fp", None)
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 284 is the planar configuration, 258 the bits
    if raw.startswith("RGBa;16") or (tags.get(284) == 2 and max(tags.get(258, (8,))) > 8):
        raise ValueError("16 bits a channel in separate planes, or premultiplied: save it as PNG")
    if raw not in LOWER_BYTES or not file:
        return None
    file.seek(0)
    content = io.BytesIO(file.read())  # Pillow may close the file after the first decoding
    file.seek(0)
    upper = np.asarray(ImageOps.exif_transpose(image)).astype(np.int32)
    with Image.open(content) as again:
        again.tile = [_with_raw_mode(tile, LOWER_BYTES[raw]) for tile in again.tile]
        lower = np.asarray(ImageOps.exif_transpose(again))
    return upper << 8 | (lower[..., [1, 1, 1, 3]] if raw == "LA;16B" else lower)


def _raw_mode(image: Image.Image) -> str:
    """How a file that is not decoded yet stores pixels; "" if that is not known."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0] if args else "")


def _with_raw_mode(tile, raw: str):
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


@cache
def formats() -> tuple[str, ...]:
    """Pillow's formats that can be decoded here."""
    Image.init()
    return tuple(name for name in Image.ID if name not in UNDECODABLE)


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of `formats`, in lower case, with their dot."""
    known = set(formats())
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def missing_plugin(path: str | Path) -> str | None:
    """What Pillow lacks for a HEIC or AVIF file; None for any other content."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] != b"ftyp":
        return None
    kind = start[8:12]
    if kind in (b"avif", b"avis"):
        return "a Pillow with AVIF"
    return "pillow-heif" if kind[:3] in (b"hei", b"hev", b"mif", b"msf") else None


@contextmanager
def _opened(source: Source, how: Decoding | None) -> Iterator[Image.Image]:
    """`source` as a PIL image, ready to be decoded, or (None) only looked at.

    Whatever a decoder of untrusted files raises becomes a UserError of one line.
    """
    try:
        with ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
            elif isinstance(source, np.ndarray):
                image = Image.fromarray(source)
            elif isinstance(source, Item):
                image = source.open()
            else:  # By a path, Pillow 13 maps uncompressed TIFFs, and turns some of them wrongly.
                file = stack.enter_context(open(source, "rb"))
                image = stack.enter_context(Image.open(file, formats=formats()))
            if how and image.width * image.height > how.max_pixels:
                size = f"{image.width}x{image.height} pixels"
                raise ValueError(f"{size} are more than the {how.max_pixels} of --max_pixels")
            if how:
                ImageFile.LOAD_TRUNCATED_IMAGES = how.truncated  # for the whole process
            yield image
    except Exception as error:
        name = source if isinstance(source, str | Path | Item) else "the image"
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            plugin = missing_plugin(source) if isinstance(source, str | Path) else None
            reason = f"it needs {plugin}" if plugin else "unknown format"
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
    pixels = to_pixels(read_image(source, Decoding(model.in_channels)), model.img_size)
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
