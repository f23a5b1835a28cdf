"""The images that people have: each kind has one stated treatment, and damaged files are named."""

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from models.errors import UserError
from models.pixels import PLAIN, Pixels, Window
from tests.helpers import random_model, tiny_config, write_image
from utils.augment import DRAWS, crop_box, crop_resize
from utils.bit_depth import bit_depth_of
from utils.images import (
    Decoding,
    Head,
    decode,
    has_transparent_pixels,
    missing_plugin,
    read_head,
    read_image,
    sampled_bit_depth,
    seen_part,
    to_image,
    to_input,
)
from utils.resize import SMALL_SIDE, resize

RED, BLUE = (200, 30, 40), (20, 60, 180)


def pixels(source, channels=3, **options):
    return np.asarray(read_image(source, Decoding(channels, **options)))


def write_16_bits(path, array):
    """Values uint16 (h, w, C) as a PNG, which Pillow cannot write."""
    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def wide_files(folder, bits):
    """{file: the 8 bits of it}: every kind of file with more than 8 bits, values below 2^bits."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (6, 5, 4), dtype=np.uint16)
    values[0, 0] = 2**bits - 1
    upper, first = values >> (bits - 8), values[..., 0]
    files = {}
    for suffix, array in (("png", first), ("tif", first), ("int.tif", first.astype(np.int32))):
        Image.fromarray(array).save(folder / f"grey.{suffix}")
        files[folder / f"grey.{suffix}"] = upper[..., 0]
    for channels in (2, 3, 4):
        path = write_16_bits(folder / f"{channels}.png", values[..., :channels])
        files[path] = upper[..., [0, 0, 0, 1] if channels == 2 else slice(channels)]
    return files


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_upper_8_of_all_bits_that_a_data_set_uses(tmp_path, bits):
    files = wide_files(tmp_path, bits)
    assert sampled_bit_depth(list(files), Decoding()) == bits
    for path, wanted in files.items():
        assert read_head(path).wide, path
        for depth in (bits, None):  # None: by the image itself
            for channels in (1, 3) if wanted.ndim == 2 else (4,) if wanted.shape[2] == 4 else (3,):
                found = pixels(path, channels, bit_depth=depth)
                shown = found if found.ndim == wanted.ndim else found[..., 0]
                assert np.array_equal(shown, wanted), (path, depth)
    dark = np.full((4, 4), 200, np.uint16)
    assert (pixels(dark, bit_depth=12) == 200 >> 4).all() and (pixels(dark) == 200).all()
    assert (pixels(np.full((2, 2), 5000, np.uint16), bit_depth=12) == 255).all()  # too bright


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("turn", range(1, 9))
def test_uncompressed_tiffs_are_turned(turn, kind, tmp_path):
    """Pillow 13 maps such files, and shears them when it turns them."""
    grey = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(grey.astype(kind)).save(tmp_path / "a.tif", exif=exif)
    wanted = ImageOps.exif_transpose(with_exif(Image.fromarray(grey), turn))
    assert np.array_equal(pixels(tmp_path / "a.tif", 1, bit_depth=8), np.asarray(wanted))


def with_exif(image, turn):
    image.getexif()[0x0112] = turn
    return image


def test_16_bit_bytes_in_memory_and_a_transparent_value(tmp_path):
    """As parquet files hold images; and the transparent value of a PNG is one of 16 bits."""
    values = np.arange(60, dtype=np.uint16).reshape(4, 5, 3) * 60
    content = write_16_bits(tmp_path / "a.png", values).read_bytes()
    for source in (io.BytesIO(content), tmp_path / "a.png"):  # Pillow closes the second itself
        assert np.array_equal(pixels(Image.open(source), bit_depth=12), values >> 4)
    key = b"tRNS" + struct.pack(">HHH", *values[2, 3])
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    (tmp_path / "b.png").write_bytes(content[:33] + chunk + content[33:])
    wanted = values >> 4
    wanted[2, 3] = 255
    assert np.array_equal(pixels(tmp_path / "b.png", bit_depth=12), wanted)


def test_mixed_depths_and_planes_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "int.png")
    with pytest.raises(UserError, match="some images are floats from 0 to 1, others have 10 bits"):
        sampled_bit_depth([tmp_path / "float.tif", tmp_path / "int.png"], Decoding())
    rgb = write_image(tmp_path / "planes.tif")
    tags = dict(Image.open(rgb).tag_v2) | {284: 2, 258: (16, 16, 16)}
    image = Image.open(rgb)
    image.tag_v2 = tags
    with pytest.raises(UserError, match="16 bits a channel in separate planes"):
        read_image(image)


def test_floats_from_0_to_1_and_of_bits(tmp_path):
    grey = np.arange(256, dtype=np.float32).reshape(16, 16)
    for scale, depth in ((1 / 255, 0), (1, 8), (16, 12)):
        Image.fromarray(grey * np.float32(scale)).save(tmp_path / "f.tif")
        assert sampled_bit_depth([tmp_path / "f.tif"], Decoding()) == depth
        assert np.array_equal(pixels(tmp_path / "f.tif", 1, bit_depth=depth), grey)
    assert bit_depth_of(np.array([2**20])) == 21  # above 16 bits no rounding
    assert bit_depth_of(np.array([0.5, 1.2])) == 0  # interpolation overshoots
    assert (pixels(np.array([[np.nan, 1.0]], np.float32), 1) == [0, 255]).all()
    undershot = np.array([[-0.1, 0.5, 1.1]], np.float32)
    assert (pixels(undershot, 1) == [0, 128, 255]).all()
    for below in (np.array([[-1000, 3000]], np.int32), np.array([[-1, 1]], np.float32)):
        with pytest.raises(UserError, match="pixels below 0"):
            pixels(below)


def test_transparency_is_composed_on_the_background(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6] = 255
    shape = Image.merge("RGBA", [Image.new("L", (8, 8), 0)] * 3 + [Image.fromarray(alpha)])
    palette = Image.fromarray((alpha // 255).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0] * 256)
    shape.save(tmp_path / "rgba.png")
    shape.convert("LA").save(tmp_path / "la.png")
    shape.save(tmp_path / "rgba.webp", lossless=True)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    key = Image.fromarray(np.where(alpha, 0, 9).astype(np.uint8))
    key.save(tmp_path / "key.png", transparency=9)  # one grey value is transparent
    inside = (slice(2, 6), slice(2, 6))
    for path in tmp_path.iterdir():
        assert read_head(path).transparent and has_transparent_pixels(path, Decoding()), path
        for channels, background in ((1, (255,) * 3), (3, (255,) * 3), (3, (0, 128, 255))):
            wanted = np.broadcast_to(np.array(background), (8, 8, 3)).copy()
            wanted[inside] = 0
            found = pixels(path, channels, background=background)
            assert np.array_equal(found, wanted[..., 0] if channels == 1 else wanted), path
        assert np.array_equal(pixels(path, 4)[..., 3], alpha), path
    assert (pixels(tmp_path / "rgba.png", background=None) == 0).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(pixels(half).astype(int) - 127).max() <= 1
    opaque = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    assert (pixels(opaque) == (1, 2, 3)).all() and not has_transparent_pixels(opaque, Decoding())


def test_large_and_truncated_images_on_request(tmp_path):
    path = write_image(tmp_path / "a.jpg", size=(90, 80))
    with pytest.raises(UserError, match=r"90x80 pixels are more than the 7000 of --max_pixels"):
        pixels(path, max_pixels=7000)
    deep = np.full((80, 90), 900, np.uint16)  # nor are they decoded to find the bit depth
    assert sampled_bit_depth([deep], Decoding()) == 10
    assert sampled_bit_depth([deep], Decoding(max_pixels=7000)) is None
    whole = pixels(path, max_pixels=7200).astype(int)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    cut = pixels(path, truncated=True).astype(int)
    assert np.abs(cut - whole)[:24].max() == 0 and (cut[-8:] == 128).all()
    with pytest.raises(UserError, match="runcated"):
        pixels(path)


def test_heic_and_avif_are_read_or_name_their_plugin(tmp_path):
    plain = Image.new("RGB", (64, 48), RED)
    plain.save(tmp_path / "a.avif")
    plain.save(tmp_path / "a.heic")  # by the plugin
    for name in ("a.avif", "a.heic"):
        assert read_head(tmp_path / name) == Head(64, 48, False, False)
        assert np.abs(pixels(tmp_path / name).astype(int) - RED).max() <= 4
    assert missing_plugin(tmp_path / "a.heic") == "pillow-heif"
    assert missing_plugin(tmp_path / "a.avif") == "a Pillow with AVIF"
    assert missing_plugin(write_image(tmp_path / "a.png")) is None


def test_cmyk_palette_animation_and_grey(tmp_path):
    plain, other = (Image.new("RGB", (8, 8), color) for color in (RED, BLUE))
    plain.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    plain.save(tmp_path / "animated.gif", save_all=True, append_images=[other])
    assert Image.open(tmp_path / "animated.gif").n_frames == 2  # the first is taken
    for name in ("print.jpg", "palette.png", "animated.gif"):
        assert np.abs(pixels(tmp_path / name).astype(int) - RED).max() <= 4, name
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    for channels in (1, 3):
        assert (pixels(tmp_path / "grey.png", channels) == 77).all()


def test_exif_turns_files_and_open_images(tmp_path):
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (0, 0, 4, 4))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        upright = pixels(source)
        assert upright.shape == (8, 4, 3)
        assert (upright[:4] == BLUE).all() and (upright[4:] == RED).all()


def damaged_files(folder):
    """{name: what the error says about it}; good.jpg beside them is a good one."""
    content = write_image(folder / "good.jpg", size=(70, 70)).read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.fromarray(np.full((70, 70), -1, np.float32)).save(folder / "below.tiff")
    (folder / "gone.png").symlink_to("/gone.png")
    return {
        "empty.png": "unknown format",
        "text.jpg": "unknown format",
        "cut.jpg": "[Tt]runcated",
        "bomb.png": "20000x20000 pixels are more than",
        "below.tiff": "pixels below 0",
        "gone.png": "No such file or directory",
    }


def test_damaged_files_are_named_in_one_line(tmp_path):
    for name, reason in damaged_files(tmp_path).items():
        with pytest.raises(UserError, match=rf"{name} is not a readable .*{reason}") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("side", [SMALL_SIDE, SMALL_SIDE + 1])
def test_every_source_of_an_image_gives_the_same_pixels(side, tmp_path):
    """Small images are resized as images in memory are, larger ones nearly as by Pillow."""
    path, size = write_image(tmp_path / "a.png", size=(side, 40)), (24, 32)
    image = Image.open(path)
    sources = (path, str(path), image, np.array(image))
    part = Window((5, 7, 20, 30), (30, 40), (6, 3))
    for window in (PLAIN.window(40, side, size), part):
        found, *others = (resize(decode(each, Decoding()), window, size, PLAIN) for each in sources)
        assert found.dtype == torch.uint8 and all(torch.equal(found, other) for other in others)
        if side <= SMALL_SIDE:
            assert torch.equal(found, crop_resize(to_tensor(image)[None], window, size)[0].byte())
        assert (found.int() - by_pillow(image, window, size).int()).abs().max() <= 1
    assert decode(path, Decoding(1)).pixels.shape == (40, side, 1)


def to_tensor(image):
    """(C, h, w)"""
    return torch.from_numpy(np.array(image)).view(*image.size[::-1], -1).permute(2, 0, 1)


def by_pillow(image, window, size, how=PLAIN):
    """What a model of `size` sees, (C, H, W), if Pillow cuts out the box and resizes it."""
    (top, left, height, width), (y, x) = window.box, window.corner
    part = image.crop((left, top, left + width, top + height))
    whole = part.resize(window.whole[::-1], Image.Resampling[how.interpolation.upper()])
    return to_tensor(whole)[:, y : y + size[0], x : x + size[1]]


# Where Pillow 13 resizes the columns first, the cubic leaves 0..255 at other places.
@pytest.mark.parametrize("interpolation, limit", [("bilinear", 1), ("bicubic", 9)])
def test_photographs_are_resized_nearly_as_by_pillow(interpolation, limit):
    """Of every box and size, in colour and in grey."""
    how, generator = Pixels(interpolation), torch.Generator().manual_seed(0)
    draws = torch.rand(5, DRAWS, generator=generator).tolist()
    for photo, mode in zip(load_sample_images().images, ("RGB", "L"), strict=True):
        image = Image.fromarray(photo).convert(mode)
        decoded = decode(image, Decoding(len(image.getbands())))
        boxes = [(0, 0, *decoded.sides), *(crop_box(each, *decoded.sides) for each in draws)]
        for box, size in product(boxes, [(224, 224), (32, 48), (384, 300)]):
            window = Window(box, size, (0, 0))
            found, wanted = resize(decoded, window, size, how), by_pillow(image, window, size, how)
            difference = (found.int() - wanted.int()).abs()
            assert difference.max() <= limit and difference.float().mean() < 0.25


def test_colours_are_mixed_by_their_alpha(tmp_path):
    """As Pillow does, in images of more than 64 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, size = decode(tmp_path / "a.png", Decoding(4)), (24, 32)
    found = resize(image, PLAIN.window(80, 90, size), size, PLAIN)
    assert torch.equal(found, by_pillow(Image.fromarray(pixels), PLAIN.window(80, 90, size), size))


def test_model_input_and_back(tmp_path):
    model = random_model(tiny_config(), (32, 24)).double()
    path = write_image(tmp_path / "a.png", size=(24, 32))
    images = to_input(path, model)
    assert images.shape == (1, 3, 32, 24) and images.dtype == torch.float64
    assert (np.asarray(to_image(images[0])) == np.asarray(Image.open(path))).all()
    assert to_input(path, random_model(tiny_config(), in_channels=1)).shape == (1, 1, 32, 32)
    assert to_image(images[0, :1]).mode == "L" and to_image(images[0, :2]).mode == "L"


def test_the_part_that_a_model_sees():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200), dtype=np.uint8))
    part = seen_part(image, (50, 50), Pixels(resize="smaller_side", crop_fraction=0.5))
    assert list(part.getdata()) == list(image.crop((75, 25, 125, 75)).getdata())
    assert seen_part(image, (50, 50), PLAIN).size == (200, 100)
    part = seen_part(image, (25, 100), Pixels(crop_fraction=0.5))  # of 50x200
    assert list(part.getdata()) == list(image.crop((50, 24, 150, 74)).getdata())
    part = seen_part(image, (50, 40), Pixels(crop_fraction=0.5))  # of 100x80
    assert list(part.getdata()) == list(image.crop((50, 25, 150, 75)).getdata())
    for sides in ((1, 200), (200, 1), (1, 1), (8, 8)):  # at least a pixel, however small it is
        for how in (Pixels(resize="smaller_side", crop_fraction=0.1), Pixels(crop_fraction=0.1)):
            assert min(seen_part(Image.new("L", sides), (32, 32), how).size) >= 1
