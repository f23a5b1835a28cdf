"""The images that people have: each kind has one stated treatment, and damaged files are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UserError
from tests.helpers import random_model, tiny_config, write_image
from utils.augment import crop_resize, resize
from utils.images import SMALL_SIDE, image_files, read_image, to_image, to_input, to_pixels

RED, BLUE = (200, 30, 40), (20, 60, 180)


def pixels(source, channels=3):
    return np.asarray(read_image(source, channels))


@pytest.mark.parametrize("value", [0, 1000, 40000, 65535])
def test_the_upper_8_of_16_bits(tmp_path, value):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)
    assert (pixels(path) == value >> 8).all() and pixels(path).shape == (4, 4, 3)


def test_cmyk_palette_animation_grey_and_transparency(tmp_path):
    plain, other = (Image.new("RGB", (8, 8), color) for color in (RED, BLUE))
    plain.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    plain.save(tmp_path / "animated.gif", save_all=True, append_images=[other])
    assert Image.open(tmp_path / "animated.gif").n_frames == 2  # the first is taken
    Image.new("RGBA", (8, 8), (*RED, 128)).save(tmp_path / "glass.png")
    for name in ("print.jpg", "palette.png", "animated.gif", "glass.png"):
        assert np.abs(pixels(tmp_path / name).astype(int) - RED).max() <= 4, name
    assert (pixels(tmp_path / "glass.png", 4)[..., 3] == 128).all()
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
    Image.fromarray(np.ones((70, 70), np.float32)).save(folder / "float.tiff")
    (folder / "gone.png").symlink_to("/gone.png")
    return {
        "empty.png": "unknown format",
        "text.jpg": "unknown format",
        "cut.jpg": "[Tt]runcated",
        "bomb.png": "decompression bomb",
        "float.tiff": "32-bit float pixels",
        "gone.png": "No such file or directory",
    }


def test_damaged_files_are_named_in_one_line(tmp_path):
    for name, reason in damaged_files(tmp_path).items():
        with pytest.raises(UserError, match=rf"{name} is not a readable .*{reason}") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("side", [SMALL_SIDE, SMALL_SIDE + 1])
def test_every_source_of_an_image_gives_the_same_pixels(side, tmp_path):
    """Small images are resized as images in memory are, larger ones by Pillow."""
    path = write_image(tmp_path / "a.png", size=(side, 40))
    image = Image.open(path)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]  # (1, C, h, w)
    if side <= SMALL_SIDE:
        wanted = resize(tensor, (24, 32))
        cut = crop_resize(tensor, torch.tensor([[5, 7, 20, 30]]), (24, 32))
    else:
        both, bilinear = (image, image.crop((7, 5, 37, 25))), Image.Resampling.BILINEAR
        arrays = [np.array(each.resize((32, 24), bilinear)) for each in both]
        wanted, cut = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in arrays)
    for source in (path, str(path), image, array):
        assert torch.equal(to_pixels(read_image(source), (24, 32)), wanted[0].byte())
        assert torch.equal(to_pixels(read_image(source), (24, 32), (5, 7, 20, 30)), cut[0].byte())
    assert to_pixels(read_image(path, 1), (24, 32)).shape == (1, 24, 32)


def test_model_input_and_back(tmp_path):
    model = random_model(tiny_config(), (32, 24)).double()
    path = write_image(tmp_path / "a.png", size=(24, 32))
    images = to_input(path, model)
    assert images.shape == (1, 3, 32, 24) and images.dtype == torch.float64
    assert (np.asarray(to_image(images[0])) == np.asarray(Image.open(path))).all()
    assert to_image(images[0, :1]).mode == "L" and to_image(images[0, :2]).mode == "L"


def test_only_visible_image_files_and_links_once(tmp_path):
    paths = [write_image(tmp_path / name) for name in ("b/1.png", "a/2.JPG", "3.png")]
    write_image(tmp_path / ".cache" / "1.png")
    (tmp_path / "._3.png").write_bytes(b"hidden")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "lost.png").symlink_to("/gone/lost.png")
    assert image_files(tmp_path) == sorted([*paths, tmp_path / "lost.png"])
