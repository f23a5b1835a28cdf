"""JPEG files: Pillow's very pixels, and nearly the same where the decoder leaves pixels out."""

import io
from itertools import product

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from models.errors import UserError
from models.pixels import ALIASED, INTERPOLATIONS, PLAIN, Pixels, Window
from tests.helpers import write_image
from utils import jpeg, loading
from utils.augment import DRAWS, Augmentation, crop_box
from utils.images import Decoding, decode, read_image
from utils.loading import Files
from utils.resize import SMALL_SIDE, Decoded, resize

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
SMALL = PHOTOS[0].resize((61, 42))
BOTH, OPENED, PILLOW = "plain or opened", "opened by Pillow", "Pillow"
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><a tiff:Orientation="1"/></x:xmpmeta>'


def whole(height, width):
    return 1


def decoded_by(path, channels=3, **options):
    """Who decodes a file apart from Pillow. All who can must give Pillow's very pixels."""
    how = Decoding(channels, **options)
    wanted = np.asarray(read_image(path, how))
    wanted_too = (channels, how.max_pixels, whole)
    plain = jpeg.decode_plain_file(path, *wanted_too)
    with Image.open(path) as image:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        opened = jpeg.decode(path.read_bytes(), *wanted_too, turn)
        images = (decode(image, how), decode(path, how), plain, opened)
    for found in filter(None, images):
        assert (found.sides, found.scale, found.start) == (wanted.shape[:2], 1, (0, 0))
        assert np.array_equal(found.pixels, wanted.reshape(*found.sides, channels))
    assert opened or not plain
    return BOTH if plain else OPENED if opened else PILLOW


def with_turn(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(97, 66), (33, 16), (7, 5), (1, 40), (40, 1), (1, 1)])
def test_every_kind_of_photograph_has_pillows_very_pixels(size, mode, tmp_path):
    path, photo = tmp_path / "a.jpg", PHOTOS[1].resize(size).convert(mode)
    for quality, subsampling, progressive in product((30, 75, 100), (0, 1, 2), (False, True)):
        options = {"subsampling": subsampling, "progressive": progressive}
        options["restart_marker_blocks"] = 2 * (quality == 75)
        photo.save(path, quality=quality, **options)
        for channels in (1, 3, 4):  # the decoder's grey of a photograph in colour is not Pillow's
            fast = channels == 3 or (channels == 1 and mode == "L")
            assert decoded_by(path, channels) == (BOTH if fast else PILLOW)


def with_segment(content, place, data):
    """A JPEG file with one more APP1 segment, at the first place that begins with `place`."""
    before, after = content.split(place, 1)
    return before + b"\xff\xe1" + (len(data) + 2).to_bytes(2) + data + place + after


@pytest.mark.parametrize("orientation", range(10))
def test_turned_photographs(orientation, tmp_path):
    """By EXIF or XMP data, anywhere before the pixels; and what can be seen of them."""
    path, size = tmp_path / "a.jpg", (24, 20)
    exif, xmp = with_turn(orientation)["exif"], XMP.replace(b'"1"', b'"%d"' % orientation)
    for sides in ((71, 42), (1, 40), (40, 1)):
        photo = SMALL.resize(sides)
        photo.save(path, icc_profile=b"colours")
        places = (b"\xff\xe2", b"\xff\xda", b"\xff\xff\xda")  # the profile and the pixels
        content = path.read_bytes().replace(b"\xff\xda", b"\xff\xff\xda", 1)  # may be filled up
        data = product(places, (exif.tobytes(), xmp))
        photo.save(path, "MPO", save_all=True, append_images=[SMALL], exif=exif)
        for turned in (path.read_bytes(), *(with_segment(content, *each) for each in data)):
            path.write_bytes(turned)
            assert decoded_by(path) == OPENED
            image = decode(path, Decoding())
            assert image.sides == (sides if 5 <= orientation <= 8 else sides[::-1])
            same = Decoded(image.pixels.copy(), image.sides)
            for box in ((0, 0, *image.sides), (0, 0, 1, 1)):
                window = Window(box, size, (0, 0))
                assert torch.equal(*(resize(each, window, size, PLAIN) for each in (image, same)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_strip_of_one_pixel(orientation, mode, tmp_path):
    """Its rows lie in memory as PyTorch's resize does not expect them."""
    for sides in ((1, 90), (90, 1)):
        strip = SMALL.resize(sides).convert(mode)
        strip.save(path := tmp_path / "a.jpg", **with_turn(orientation))
        image = decode(path, Decoding(len(strip.getbands())))
        same = Decoded(np.array(image.pixels.tolist(), np.uint8), image.sides)
        for how in map(Pixels, INTERPOLATIONS):
            window = how.window(*image.sides, (24, 20))
            assert torch.equal(*(resize(each, window, (24, 20), how) for each in (image, same)))


def test_other_files_of_the_format(tmp_path):
    path = tmp_path / "a.png"  # the ending does not count
    SMALL.save(path, "JPEG", comment=b"none")
    content = path.read_bytes()
    assert decoded_by(path) == BOTH
    path.write_bytes(content + b"x" * 100)
    assert decoded_by(path) == BOTH
    SMALL.save(path, "JPEG", keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(path.read_bytes())[2] == "RGB"
    assert decoded_by(path) == BOTH
    SMALL.save(path, "MPO", save_all=True, append_images=[PHOTOS[1]])
    assert decoded_by(path) == BOTH  # the first image
    SMALL.convert("CMYK").save(path, "JPEG")
    assert decoded_by(path) == decoded_by(path, 1) == PILLOW
    assert decoded_by(write_image(tmp_path / "b.jpg", format="PNG")) == PILLOW
    path.write_bytes(b"\xff\xd8\xff")
    assert jpeg.decode_plain_file(path, 3, 100, whole) is None
    assert jpeg.decode(content, 3, SMALL.width * SMALL.height, whole) is not None
    image = Image.open(io.BytesIO(content))
    wanted = np.asarray(read_image(image))  # which decodes it
    for source in (image, Image.open(io.BytesIO(content)), str(path.with_name("c"))):
        path.with_name("c").write_bytes(content)
        assert np.array_equal(decode(source, Decoding()).pixels, wanted)
        assert np.array_equal(decode(source, Decoding()).pixels, wanted)  # again


def outcome(read, *args):
    try:
        return read(*args)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_files_are_what_they_are_for_pillow(progressive, tmp_path):
    path, refused, grey = tmp_path / "a.jpg", set(), 0
    PHOTOS[0].save(path, quality=90, progressive=progressive)
    content = path.read_bytes()
    third = len(content) // 3
    damaged = [b"", content[:2], content[:2] + b"garbage", content[:700], content[:third]]
    for missing in (1, 2, 3, 7, 100, 5000, third):
        hole = content[:third] + b"\0\x55\xaa" * 30 + content[third + missing :]
        damaged += [content[:-missing], hole]
    for each, truncated in product(damaged, (False, True)):
        path.write_bytes(each)
        how = Decoding(truncated=truncated)
        wanted, found = outcome(read_image, path, how), outcome(decode, path, how)
        if isinstance(wanted, str):
            refused.add(wanted)
            assert found == wanted and wanted.startswith(f"{path} is not a readable image (")
        else:
            assert np.array_equal(found.pixels, wanted)
            grey += (found.pixels[-8:] == 128).all()
    assert any("unknown format" in line for line in refused) and grey
    assert any("runcated" in line for line in refused)
    path.write_bytes(content)
    assert decode(path, Decoding(max_pixels=640 * 427)).sides == (427, 640)
    with pytest.raises(UserError, match=r"640x427 pixels are more than the 273279 of --max_pixels"):
        decode(path, Decoding(max_pixels=640 * 427 - 1))


def seen(path, size, monkeypatch, **options):
    """(scale, pixels): how a worker decodes a file for an evaluation at `size`, and what comes."""
    decoded = []
    spy = lambda *args: decoded.append(decode(*args)) or decoded[-1]  # noqa: E731
    monkeypatch.setattr(loading, "decode", spy)
    _, pixels, _ = Files([path], Augmentation("none", size), Decoding(**options))[0, None]
    return decoded[0].scale, pixels.astype(int)


def test_only_what_has_more_than_twice_the_wanted_sides_is_left_out(tmp_path, monkeypatch):
    path, cases = tmp_path / "a.jpg", {(64, 96): 1, (65, 96): 1, (64, 97): 1, (65, 97): 2}
    cases |= {(128, 198): 2, (129, 193): 4, (256, 386): 4, (257, 385): 8, (999, 999): 8}
    for (height, width), scale in cases.items():
        PHOTOS[0].resize((width, height)).save(path, quality=95)
        found, pixels = seen(path, (16, 24), monkeypatch)
        same, exact = seen(path, (16, 24), monkeypatch, exact=True)
        assert (found, same) == (scale, 1)
        assert (scale > 1) == (pixels != exact).any() and np.abs(pixels - exact).mean() < 3
        assert seen(path, (16, 24), monkeypatch, pixels=Pixels(ALIASED))[0] == 1
    PHOTOS[0].resize((129, 193)).save(path, **with_turn(6))
    assert seen(path, (16, 24), monkeypatch)[0] == 4
    assert seen(path, (16, 24), monkeypatch, pixels=Pixels(crop_fraction=0.5))[0] == 2
    for side, scale in ((SMALL_SIDE, 1), (SMALL_SIDE + 1, 4)):  # as images in memory
        PHOTOS[0].resize((side, side)).save(path)
        assert seen(path, (8, 8), monkeypatch)[0] == scale


@pytest.mark.parametrize("size", [(2400, 1600), (2401, 1607)])
def test_large_photographs_are_nearly_the_same_at_a_fraction(size, tmp_path):
    """The mean difference is below 1 of 255, of the whole image and of every box."""
    path, how, scales = tmp_path / "a.jpg", Decoding(), set()
    draws = torch.rand(8, 3, DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    for orientation in range(1, 9):
        photo, fine = PHOTOS[:: 1 if orientation % 2 else -1]
        photo = photo.resize(size, Image.Resampling.BICUBIC)
        photo.paste(fine, (900, 500))  # at its own size, with all its details
        photo.save(path, quality=90, **with_turn(orientation))
        exact = decode(path, how)
        boxes = [crop_box(each, *exact.sides, 0.5) for each in draws[orientation - 1]]
        sizes = ((96, 90), (64, 70), (150, 140), (224, 224))
        for box, wanted in zip([(0, 0, *exact.sides), *boxes], sizes, strict=True):
            window = Window(box, wanted, (0, 0))
            found = decode(path, how, lambda *sides, window=window: window)
            assert found.sides == exact.sides and found.pixels.size < exact.pixels.size
            pixels = [resize(each, window, wanted, PLAIN).int() for each in (found, exact)]
            assert (pixels[0] - pixels[1]).abs().float().mean() < 1
            scales.add(found.scale)
    assert scales == {2, 4, 8}
