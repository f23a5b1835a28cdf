"""The one way from an image to pixels: decode, turn upright, convert, crop, resize.

Training, evaluation, prediction, the page and the notebook all use it, so that one image is the
same pixels everywhere. B batch, C channels, h w source size, H W target size in pixels.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from math import ceil, floor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.errors import UserError
from models.modeling import VisionTransformer
from models.pixels import ALIASED, PLAIN, Pixels, Window
from models.state_dict import WHITE, Metadata
from utils import jpeg
from utils.augment import normalize
from utils.bit_depth import bit_depth_of, is_wide, to_8_bits, wide_values
from utils.resize import SMALL_SIDE, Decoded, resize

with suppress(ImportError):  # an optional plugin: HEIC, as telephones save it
    import pillow_heif

    pillow_heif.register_heif_opener()

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels
SAMPLE = 256  # images that are decoded to find what is common to all
# Formats that Pillow recognises and cannot decode, or only with a program of the machine.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Pillow warns of odd metadata and transparency. In a data set that is many lines, which hide the
# progress bar. Errors still come. Set for the process: catch_warnings is not safe with threads.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)  # Pillow's own limit
Image.MAX_IMAGE_PIXELS = None  # `Decoding` has the limit: Pillow would warn of half of it


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded to 8-bit pixels, and how these are resized for a model."""

    channels: int = 3  # 1 grey, 3 RGB, 4 RGBA
    # Of images that store more than 8 bits: 12 means values below 4096, 0 floats from 0 to 1.
    # None: each image by its own largest value.
    bit_depth: int | None = None
    background: tuple[int, int, int] | None = WHITE  # behind transparency; None drops the alpha
    truncated: bool = False  # take what can be decoded of a file that is cut short
    max_pixels: int = MAX_PIXELS  # of one image: more may be an attack
    # The index names the images that it keeps by this object's repr. These do not change them.
    exact: bool = field(default=False, repr=False)  # decode all of a JPEG, however large it is
    pixels: Pixels = field(default=PLAIN, repr=False)  # how images are resized

    @classmethod
    def of(cls, model: VisionTransformer, metadata: Metadata, **options) -> "Decoding":
        """As the images were decoded on which `model` was trained."""
        stored = metadata.bit_depth, metadata.background
        return cls(model.in_channels, *stored, pixels=metadata.pixels, **options)

    def scale(self, window: Window) -> int:
        """A JPEG is decoded at 1 / this, so that more than twice the sides of the result are left.

        Not for a resize without antialiasing: it reads single pixels, which a scale would average.
        """
        small = max(window.box[2:]) <= SMALL_SIDE
        if self.exact or small or self.pixels.interpolation == ALIASED:
            return 1
        sides = zip(window.box[2:], window.whole, strict=True)
        reduction = min(side / wanted for side, wanted in sides)
        return next((scale for scale in (8, 4, 2) if reduction > 2 * scale), 1)

    @property
    def stored(self) -> dict:
        """What Metadata keeps of it."""
        return {name: getattr(self, name) for name in ("bit_depth", "background", "pixels")}


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


Source = str | Path | bytes | Item | Image.Image | np.ndarray


def read_image(source: Source, how: Decoding | None = None) -> Image.Image:
    """Decode `source` with `how.channels` channels, turned as its EXIF data says.

    `source` is a path, the bytes of a file, an Item, a PIL image, or an array (h, w) or (h, w, C).
    Of an animation the first frame is taken. Palettes and CMYK are converted. Raises UserError,
    which names the file, for a damaged file, for pixels below 0, and for more than `how.max_pixels`
    pixels.
    """
    how = how or Decoding()
    with _opened(source, how) as image:
        return _converted(image, how)


def decode(source: Source, how: Decoding, window_of: Callable | None = None) -> Decoded:
    """The pixels of `read_image`, for a Window that `window_of(height, width)` returns, if any."""

    def scale_of(height: int, width: int) -> int:
        return how.scale(window_of(height, width)) if window_of else 1

    wanted = (how.channels, how.max_pixels, scale_of)
    if isinstance(source, str | Path) and (found := jpeg.decode_plain_file(source, *wanted)):
        return found
    with _opened(source, how) as image:
        if image.format in ("JPEG", "MPO") and getattr(image, "tile", None):  # not decoded yet
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.fp.seek(0)
            if found := jpeg.decode(image.fp.read(), *wanted, turn):
                return found
        pixels = np.array(_converted(image, how))  # (h, w) or (h, w, C)
        return Decoded(pixels.reshape(*pixels.shape[:2], -1), pixels.shape[:2])


def _converted(image: Image.Image, how: Decoding) -> Image.Image:
    """An open image as `read_image` returns it."""
    values = wide_values(image)
    if values is None:
        image = ImageOps.exif_transpose(image)
    else:
        depth = bit_depth_of(values) if how.bit_depth is None else how.bit_depth
        key = image.info.get("transparency")  # of a PNG: the value that is transparent
        image = Image.fromarray(to_8_bits(values, depth))
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
        return Head(*image.size, is_wide(image), image.has_transparency_data)


def sampled_bit_depth(sources: Sequence[Source], how: Decoding) -> int | None:
    """The largest bit depth of SAMPLE images, which are decoded; None if all of them have 8 bits.

    Unreadable images are passed over.
    """

    def depth_of(source: Source) -> int | None:
        with suppress(UserError), _opened(source, how) as image:
            return None if (values := wide_values(image)) is None else bit_depth_of(values)

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


def missing_plugin(source: str | Path | bytes) -> str | None:
    """What Pillow lacks for a HEIC or AVIF file; None for any other content."""
    with _file(source) as file:
        start = file.read(12)
    if start[4:8] != b"ftyp":
        return None
    kind = start[8:12]
    if kind in (b"avif", b"avis"):
        return "a Pillow with AVIF"
    return "pillow-heif" if kind[:3] in (b"hei", b"hev", b"mif", b"msf") else None


def _file(source: str | Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


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
                file = stack.enter_context(_file(source))
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
            plugin = missing_plugin(source) if isinstance(source, str | Path | bytes) else None
            reason = f"it needs {plugin}" if plugin else "unknown format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(f"{name} is not a readable image ({reason})") from error


def to_pixels(source: Source, size: tuple[int, int], how: Decoding) -> Tensor:
    """What a model of `size` sees of `source`: uint8 (C, H, W). Raises UserError."""
    window_of = partial(how.pixels.window, size=size)
    image = decode(source, how, window_of)
    return resize(image, window_of(*image.sides), size, how.pixels)


def to_input(source: Source, model: VisionTransformer, how: Decoding | None = None) -> Tensor:
    """`source` as the model takes it: (1, C, H, W) in [-1, 1], on its device, in its dtype."""
    weight = model.head.weight
    pixels = to_pixels(source, model.img_size, how or Decoding(model.in_channels))
    return normalize(pixels[None]).to(weight.device, weight.dtype)


def seen_part(image: Image.Image, size: tuple[int, int], how: Pixels) -> Image.Image:
    """The part of an image that a model of `size` sees, for maps of attention."""
    window = how.window(image.height, image.width, size)
    y, x = (side / whole for side, whole in zip(window.box[2:], window.whole, strict=True))
    top, left = window.box[0] + window.corner[0] * y, window.box[1] + window.corner[1] * x
    bottom, right = top + size[0] * y, left + size[1] * x
    # At least one pixel; the small number undoes rounding.
    edges = (floor(left + 1e-6), floor(top + 1e-6), ceil(right - 1e-6), ceil(bottom - 1e-6))
    return image.crop(edges)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (C, H, W) in [-1, 1] as an image; of 2 or more than 4 channels the first is shown."""
    pixels = pixels if len(pixels) in CHANNEL_MODES else pixels[:1]
    pixels = pixels.detach().float().cpu().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    pixels = pixels.permute(1, 2, 0).numpy()  # (H, W, C)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
