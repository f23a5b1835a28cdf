"""Images that store more than 8 bits in a channel: their values, and the 8 bits that are taken.

C channels, h w size in pixels.
"""

import io
import sys

import numpy as np
from PIL import Image, ImageOps

BIT_DEPTHS = (8, 10, 12, 14, 16)  # to which the bits of the largest value are rounded up
# A second reading of 16-bit channels, of which Pillow keeps the upper byte: each raw mode -> one
# of the same size that keeps the lower byte. "RGBA" takes the four bytes of grey and alpha.
_SWAPPED = ";16B" if sys.byteorder == "little" else ";16L"
LOWER_BYTES = {"LA;16B": "RGBA"}
for _mode in ("RGB", "RGBA", "RGBX"):
    LOWER_BYTES |= {f"{_mode};16B": f"{_mode};16L", f"{_mode};16L": f"{_mode};16B"}
    LOWER_BYTES[f"{_mode};16N"] = f"{_mode}{_SWAPPED}"


def bit_depth_of(values: np.ndarray) -> int:
    """The bits of the largest value, rounded up to BIT_DEPTHS; 0 for floats from 0 to 1."""
    largest = values.max()
    if values.dtype.kind == "f" and largest < 2:  # interpolation overshoots 1 a little
        return 0
    bits = int(largest).bit_length()
    return next((depth for depth in BIT_DEPTHS if depth >= bits), bits)


def to_8_bits(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """The upper 8 of `bit_depth` bits; larger values become 255."""
    floats = values.dtype.kind == "f"
    if values.min() < (-values.max() / 4 if floats else 0):  # interpolation undershoots 0 a little
        raise ValueError("it has pixels below 0")
    values = np.ldexp(values, 8 - bit_depth) if floats else values >> max(bit_depth - 8, 0)
    return values.clip(0, 255).astype(np.uint8)


def wide_values(image: Image.Image) -> np.ndarray | None:
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


def is_wide(image: Image.Image) -> bool:
    """Whether a file that is not decoded yet has more than 8 bits in a channel."""
    return image.mode[0] in "IF" or _raw_mode(image) in LOWER_BYTES


def _raw_mode(image: Image.Image) -> str:
    """How a file that is not decoded yet stores pixels; "" if that is not known."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0] if args else "")


def _with_raw_mode(tile, raw: str):
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
