"""JPEG files, the photographs of most data sets: a faster way to the very pixels of Pillow."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import simplejpeg

from utils.resize import Decoded

# (channels that are wanted, colours of the file) -> how to decode it; Pillow converts all others
COLOURS = {(3, "YCbCr"): "RGB", (3, "RGB"): "RGB", (3, "Gray"): "RGB", (1, "Gray"): "GRAY"}
# EXIF's orientation -> steps through the stored rows and columns, and whether they change places
TURNS = {1: (1, 1, False), 2: (1, -1, False), 3: (-1, -1, False), 4: (-1, 1, False)}
TURNS |= {5: (1, 1, True), 6: (-1, 1, True), 7: (-1, -1, True), 8: (1, -1, True)}
START, SCAN, APP1 = b"\xff\xd8", 0xDA, 0xE1  # of a file, of its pixels, of EXIF and XMP data
ScaleOf = Callable[[int, int], int]  # takes the upright height and width; 1, 2, 4 or 8


def decode_plain_file(
    path: Path | str, channels: int, max_pixels: int, scale_of: ScaleOf
) -> Decoded | None:
    """`decode` for a file without EXIF and XMP data, which may turn it; None for others.

    To open it with Pillow would take a tenth of the time.
    """
    with suppress(OSError, IndexError), open(path, "rb") as file:
        if file.read(2) == START and not _may_be_turned(content := START + file.read()):
            return decode(content, channels, max_pixels, scale_of)
    return None


def _may_be_turned(content: bytes) -> bool:
    """Whether there is EXIF or XMP data before the pixels, or anything odd."""
    place = len(START)
    while content[place : place + 1] == b"\xff" and content[place + 1] not in (SCAN, APP1):
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return content[place : place + 2] != bytes([0xFF, SCAN])


def decode(
    content: bytes, channels: int, max_pixels: int, scale_of: ScaleOf, turn: int = 1
) -> Decoded | None:
    """The pixels of a JPEG at 1 / `scale_of(height, width)`, turned as EXIF's `turn` says.

    None leaves it to Pillow, which says what is wrong with a damaged file, or takes what is there.
    """
    with suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > max_pixels or (channels, colours) not in COLOURS:
            return None
        row, column, swap = TURNS.get(turn, TURNS[1])
        scale = scale_of(width, height) if swap else scale_of(height, width)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        pixels = simplejpeg.decode_jpeg(content, COLOURS[channels, colours], **least)  # (h, w, C)
        # A last row or column that is a part of a pixel is the first where the order is reversed.
        top = (pixels.shape[0] - height / scale) * (row < 0)
        left = (pixels.shape[1] - width / scale) * (column < 0)
        pixels = pixels[::row, ::column]
        if swap:
            return Decoded(pixels.swapaxes(0, 1), (width, height), scale, (left, top))
        return Decoded(pixels, (height, width), scale, (top, left))
    return None
