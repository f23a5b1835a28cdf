"""JPEG files, the photographs of most data sets: a faster way to the very pixels of Pillow."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import simplejpeg
from PIL import ExifTags, Image

from utils.resize import Decoded

# (channels that are wanted, those of a file by Pillow and simplejpeg) -> how to decode them
COLOURS = {(3, "RGB"): "RGB", (3, "L"): "RGB", (1, "L"): "GRAY"}
COLOURS |= {(3, "YCbCr"): "RGB", (3, "Gray"): "RGB", (1, "Gray"): "GRAY"}
# EXIF's orientation -> steps through the stored rows and columns, and whether they change places
TURNS = {1: (1, 1, False), 2: (1, -1, False), 3: (-1, -1, False), 4: (-1, 1, False)}
TURNS |= {5: (1, 1, True), 6: (-1, 1, True), 7: (-1, -1, True), 8: (1, -1, True)}
START, SCAN, APP1 = b"\xff\xd8", 0xDA, 0xE1  # of a file, of its pixels, of EXIF and XMP data
ScaleOf = Callable[[int, int], int]  # takes the upright height and width; 1, 2, 4 or 8


def decode_file(path: Path | str, channels: int, most: int, scale_of: ScaleOf) -> Decoded | None:
    """The pixels of a plain file of at most so many; None leaves it to Pillow.

    Pillow takes a tenth of the whole time to open a file.
    """
    with suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
        if file.read(2) == START and not _may_be_turned(content := START + file.read()):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if height * width <= most and (channels, colours) in COLOURS:
                return _decode(content, COLOURS[channels, colours], height, width, 1, scale_of)
    return None


def decode(image: Image.Image, channels: int, scale_of: ScaleOf) -> Decoded | None:
    """The pixels of an open file, of which nothing is decoded yet; None leaves it to Pillow."""
    is_jpeg = image.format in ("JPEG", "MPO") and getattr(image, "tile", None)
    colours = COLOURS.get((channels, image.mode)) if is_jpeg else None
    if not colours:
        return None
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.fp.seek(0)
    with suppress(ValueError):  # Pillow says what is wrong, or takes what is there
        return _decode(image.fp.read(), colours, image.height, image.width, turn, scale_of)
    return None


def _may_be_turned(content: bytes) -> bool:
    """Whether there is EXIF or XMP data before the pixels, or anything odd."""
    place = len(START)
    while content[place : place + 1] == b"\xff" and content[place + 1] not in (SCAN, APP1):
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return content[place : place + 2] != bytes([0xFF, SCAN])


def _decode(
    content: bytes, colours: str, height: int, width: int, turn: int, scale_of: ScaleOf
) -> Decoded:
    """Raises ValueError for a damaged file."""
    row, column, swap = TURNS.get(turn, TURNS[1])
    scale = scale_of(width, height) if swap else scale_of(height, width)
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    pixels = simplejpeg.decode_jpeg(content, colours, **least)  # (h, w, C)
    # A last row or column that is a part of a pixel becomes the first where the order is reversed.
    top = (pixels.shape[0] - height / scale) * (row < 0)
    left = (pixels.shape[1] - width / scale) * (column < 0)
    pixels = pixels[::row, ::column]
    if swap:
        return Decoded(pixels.swapaxes(0, 1), (width, height), scale, (left, top))
    return Decoded(pixels, (height, width), scale, (top, left))
