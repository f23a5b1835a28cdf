"""Classifier in Python: every kind of image is the same prediction, one or many, and lazily."""

import io
from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from models.errors import UserError
from models.pixels import Pixels
from tests.helpers import random_model, save_bin, write_image, write_images
from tests.test_images import with_exif, write_16_bits
from utils import image_index, images
from utils.classifier import Classifier
from utils.image_index import image_files
from utils.images import Decoding, read_image

CLASSES = ("ant", "bee", "cat")
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def classifier(workdir):
    save_bin("m.bin", random_model(img_size=(32, 24), classes=3, std=0.2), CLASSES)
    return Classifier.open("m.bin", device="cpu")


def pictures(folder):
    """{name: path}: photographs as people have them; each is altered on its way to RGB."""
    photo = Image.fromarray(load_sample_image("flower.jpg"))  # 640x427
    grey = np.asarray(photo.convert("L")).astype(np.uint16)
    glass = photo.copy()
    glass.putalpha(photo.convert("L"))
    wide = np.asarray(photo).astype(np.uint16) * 13
    wide[..., 1] += np.arange(640, dtype=np.uint16) % 13
    paths = {name: folder / name for name in ("turned.jpg", "rgba.png", "turned.tif", "cmyk.jpg")}
    with_exif(photo, 6).save(paths["turned.jpg"], exif=photo.getexif(), quality=90)
    glass.save(paths["rgba.png"])
    turned = with_exif(Image.fromarray(grey.astype(np.uint8)), 7)
    turned.save(paths["turned.tif"], exif=turned.getexif())
    photo.convert("CMYK").save(paths["cmyk.jpg"])
    for name, mode in (("palette.png", "P"), ("frames.gif", "P"), ("lossy.webp", "RGB")):
        paths[name] = folder / name
        more = {"save_all": True, "append_images": [photo.rotate(90)]} if "frames" in name else {}
        more |= {"transparency": 7} if mode == "P" else {}
        photo.convert(mode).save(paths[name], **more)
    Image.fromarray(grey * 13).save(folder / "grey16.png")
    paths |= {"grey16.png": folder / "grey16.png"}
    return paths | {"rgb16.png": write_16_bits(folder / "rgb16.png", wide)}


def same(found, wanted):
    assert found.error is None and torch.equal(found.input, wanted.input)
    assert dict(found.top) == pytest.approx(dict(wanted.top), abs=1e-6)  # batches differ in size


@pytest.mark.parametrize("depth", [None, 12])
def test_files_bytes_and_images_of_pillow_are_the_same_pixels(depth, classifier, workdir):
    """A large JPEG at the same scale, 16 bits with both bytes, TIFFs without Pillow's shear."""
    classifier.decoding = Decoding(bit_depth=depth)
    for name, path in pictures(workdir).items():
        wanted = classifier.predict(path)
        pixels = np.asarray(read_image(path, classifier.decoding))
        assert wanted.path == str(path) and wanted.top[0][1] > wanted.top[-1][1] + 1e-3, name
        shown = Image.fromarray(pixels).resize((24, 32), Image.Resampling.BILINEAR)
        seen = wanted.input.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(seen - np.asarray(shown)).mean() < 1.5, name
        same(classifier.predict(str(path)), wanted)
        opened = Image.open(path)
        for source in (
            path.read_bytes(),
            opened,
            opened,
            Image.open(io.BytesIO(path.read_bytes())),
        ):
            found = classifier.predict(source)
            same(found, wanted)
            assert found.path is None and found.top == wanted.top  # to the last bit
        assert opened.tile or "webp" in name  # it is not decoded: nothing is lost
        for one, other in ((opened, path), (path.read_bytes(), opened)):
            for found in classifier.predict([one, other], batch_size=1):
                same(found, wanted)
        assert np.asarray(opened).shape[:2] in (pixels.shape[:2], pixels.shape[1::-1])


def test_arrays_tensors_and_decoded_images(classifier, workdir):
    for size in ((24, 32), (90, 70)):
        with Image.open(write_image(workdir / "a.png", size=size)) as image:
            grey, array = image.convert("L"), np.asarray(image)
            wanted = classifier.predict("a.png")
        grey.save("grey.png")
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        batch = torch.stack([tensor, 255 - tensor])
        for source in (array, image, tensor, tensor.contiguous(), np.asfortranarray(array)):
            same(classifier.predict(source), wanted)
        first, second = classifier.predict(batch)
        same(first, wanted)
        same(second, classifier.predict(255 - array))
        assert not torch.equal(first.input, second.input)
        dark = classifier.predict("grey.png")
        for source in (np.asarray(grey), torch.from_numpy(np.array(grey))[None], grey):
            same(classifier.predict(source), dark)
        mixed = [array, "a.png", tensor, grey, (workdir / "a.png").read_bytes()]
        found = list(classifier.predict(iter(mixed), batch_size=2))
        assert [p.path for p in found] == [None, "a.png", None, None, None]
        for prediction, expected in zip(found, [wanted] * 3 + [dark, wanted], strict=True):
            assert torch.equal(prediction.input, expected.input)
    frames = [Image.new("L", (24, 32), value) for value in (0, 250)]
    frames[0].save("f.gif", save_all=True, append_images=frames[1:])
    with Image.open("f.gif") as image:
        image.seek(1)  # of an animation that frame which the caller chose
        assert (classifier.predict(image).input == 250).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_generator_is_drawn_a_batch_at_a_time(num_workers, classifier, workdir):
    paths = write_images(workdir / "d", CLASSES, count=8, size=(70, 90))
    paths[5].write_bytes(b"no image")
    drawn, kinds = [], (str, Image.open, lambda path: path.read_bytes(), lambda path: path)

    def endless():
        for i in count():
            drawn.append(i)
            kind = kinds[i % 4] if i % len(paths) != 5 else str
            yield kind(paths[i % len(paths)])

    found = classifier.predict(endless(), batch_size=4, num_workers=num_workers)
    assert drawn == []
    first = next(found)
    assert len(drawn) == (4 * 2 * num_workers or 4) + 4 * (num_workers > 0)
    rows = [first, *islice(found, 59)]
    assert len(drawn) <= 60 + 4 * (1 + 2 * num_workers)
    wanted = list(classifier.predict(paths))
    assert len({row.top for row in wanted}) == 24
    for i, row in enumerate(rows):
        expected = wanted[i % 24]
        assert row.path == (str(paths[i % 24]) if i % 4 in (0, 3) or i % 24 == 5 else None)
        assert torch.equal(row.input, expected.input) if expected.error is None else row.error


def test_an_image_that_the_caller_changes_later_stays_as_it_was(classifier):
    buffer, image = np.zeros((32, 24, 3), np.uint8), Image.new("L", (24, 32))

    def camera():
        for value in (10, 200):
            buffer[:] = value
            image.paste(value, (0, 0, 24, 32))
            yield from (buffer, torch.from_numpy(buffer).permute(2, 0, 1), image)

    means = [found.input.float().mean().item() for found in classifier.predict(camera())]
    assert means == [10.0] * 3 + [200.0] * 3


def test_a_generator_has_the_bit_depth_of_its_first_batch(classifier):
    values = [np.full((32, 24), value, np.uint16) for value in (4000, 160, 60000)]
    wide = [Image.fromarray(value) for value in values]
    means = [found.input.float().mean().item() for found in classifier.predict(wide)]
    assert means == [4000 >> 8, 0, 60000 >> 8]  # of a list all
    found = classifier.predict(iter(wide), batch_size=2)
    assert [p.input.float().mean().item() for p in found] == [4000 >> 4, 160 >> 4, 255]
    assert classifier.predict(wide[1]).input.float().mean() == 160


WRONG = {
    "not int": 3,
    "not NoneType": None,
    "not dict": {"a.png": 1},
    "not BufferedReader": "file",
    "not BytesIO": io.BytesIO(b""),
    "not float32 (8, 8, 3)": np.zeros((8, 8, 3), np.float32),
    "not uint16 (8, 8)": np.zeros((8, 8), np.uint16),
    "not uint8 (8, 8, 4)": np.zeros((8, 8, 4), np.uint8),
    "not uint8 (3, 8, 8, 3)": np.zeros((3, 8, 8, 3), np.uint8),
    "not uint8 (0, 8)": np.zeros((0, 8), np.uint8),
    "not torch.float32 (3, 8, 8)": torch.zeros(3, 8, 8),
    "not torch.uint8 (8, 8, 3)": torch.zeros(8, 8, 3, dtype=torch.uint8),
    "not torch.uint8 (8, 8)": torch.zeros(8, 8, dtype=torch.uint8),
    "not torch.uint8 (2, 8, 8)": torch.zeros(5, 2, 8, 8, dtype=torch.uint8),
    "not list": [["a.png"]],
    "not tuple": ["a.png", ("a.png",)],
    "; not float": ("a.png", 1.5),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("method", ["predict", "features"])
def test_anything_else_is_a_type_error_at_once(method, message, classifier, workdir):
    write_image(workdir / "a.png")
    wrong = WRONG[message]
    with open("a.png", "rb") as file, pytest.raises(TypeError) as caught:
        getattr(classifier, method)(file if isinstance(wrong, str) else wrong)
    text = str(caught.value)
    assert text.startswith("an image is a path, a PIL image, the bytes of an image file, a uint8 ")
    assert text.endswith(message)


def test_mistakes_that_are_no_image(classifier, workdir):
    write_image(workdir / "a.png")
    found = classifier.predict(iter(["a.png", 3]), batch_size=1)
    assert next(found).error is None  # what is drawn later is refused later
    with pytest.raises(TypeError, match=r"tensor .*; not int"):
        next(found)
    with pytest.raises(ValueError, match="batch_size is 1 or more, not 0"):
        classifier.predict(["a.png"], batch_size=0)
    with pytest.raises(TypeError, match="workers"):
        classifier.predict(["a.png"], workers=2)


def test_what_cannot_be_decoded_has_an_error_in_its_place(classifier, workdir, monkeypatch):
    good = write_image(workdir / "a.png", size=(70, 90))
    content = good.read_bytes()[:3000]
    (workdir / "cut.png").write_bytes(content)
    cut, closed = Image.open("cut.png"), Image.open(good)
    closed.close()
    with open(good, "rb") as file:
        gone = Image.open(file)
    frame = io.BytesIO()
    Image.open(good).save(frame, "WEBP", lossless=True)
    content_of = bytearray(frame.getvalue())
    content_of[40:] = bytes(len(content_of) - 40)
    webp = Image.open(io.BytesIO(content_of))  # Pillow has read it, and decodes it later
    damaged = ["cut.png", content, cut, closed, gone, b"no image", b"", "gone.png", "d", webp]
    (workdir / "d").mkdir()
    for num_workers in (0, 2):
        given = [image for pair in zip(damaged, [good] * 10, strict=True) for image in pair] * 2
        found = list(classifier.predict(given, num_workers=num_workers))
        assert len(found) == 40 and all(row.error is None for row in found[1::2])
        errors = [row.error for row in found[::2]]
        for error, image in zip(errors, damaged * 2, strict=True):
            name = image if isinstance(image, str) else "the image"
            assert error.startswith(f"{name} is not a readable image ("), (image, error)
        assert all(row.top == () and row.input is None for row in found[::2])
    large = Image.open(io.BytesIO(frame.getvalue()))
    classifier.decoding = Decoding(max_pixels=6000)  # 70x90 is more: it is not decoded
    calls = []
    monkeypatch.setattr(ImageOps, "exif_transpose", calls.append)
    assert "70x90 pixels are more than the 6000" in classifier.predict(large).error and not calls
    monkeypatch.setattr(images, "formats", lambda: ())
    heic = b"\0\0\0\x18ftypheic" + bytes(20)
    assert classifier.predict(heic).error.endswith("a readable image (it needs pillow-heif)")


def test_features_are_those_of_the_model(classifier, workdir):
    with Image.open(write_image(workdir / "a.png", size=(24, 32))) as image:
        array = np.asarray(image)
    inputs = torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    wanted = random_model(img_size=(32, 24), classes=3, std=0.2).features(inputs)[0]
    for source in ("a.png", array, image):
        path, row = classifier.features(source)
        assert path == ("a.png" if isinstance(source, str) else None) and row.dtype == np.float32
        assert row.shape == (32,) and np.abs(row - wanted.detach().numpy()).max() < 1e-5
    (_, first), (name, error) = classifier.features(iter([array, "gone.png"]))
    assert np.array_equal(first, row) and name == "gone.png" and isinstance(error, UserError)


def test_all_classes_and_another_device(classifier, workdir):
    write_image(workdir / "a.png")
    assert len(classifier.predict("a.png").top) == 3
    assert len(classifier.predict("a.png", top_k=1).top) == 1
    save_bin("many.bin", random_model(classes=9, std=0.2), "abcdefghi")
    many = Classifier.open("many.bin", device="cpu")
    assert len(many.predict("a.png").top) == 5
    top = many.predict("a.png", top_k=None).top
    assert {name for name, _ in top} == set("abcdefghi")
    assert sum(share for _, share in top) == pytest.approx(1, abs=1e-6)
    assert many.to("meta") is many and many.device.type == "meta"
    with pytest.raises(TypeError):
        many.to(torch.float16)


def test_the_images_of_a_folder_one_after_the_other(classifier, workdir, monkeypatch):
    write_images(workdir / "d", CLASSES, size=(20, 20))
    (workdir / "d" / "bee" / "notes.txt").write_text("x")
    (workdir / "d" / "bee" / "damaged.png").write_bytes(b"no image")
    (workdir / "d" / ".hidden.png").write_bytes((workdir / "d/ant/ant0.png").read_bytes())
    (workdir / "d" / "ant" / "ant1.png").rename(workdir / "d" / "ant" / "z")
    look, looked = image_index._look, []
    monkeypatch.setattr(image_index, "_look", lambda path: looked.append(path) or look(path))
    names = ["ant/ant0.png", "ant/z", "bee/bee0.png", "bee/bee1.png", "bee/damaged.png"]
    names += ["cat/cat0.png", "cat/cat1.png"]
    found = classifier.predict(image_files("d"), batch_size=2)
    assert looked == []
    rows = [next(found)]
    assert len(looked) == 2
    rows += found
    assert [row.path for row in rows] == [f"d/{name}" for name in names]
    assert [row.error is not None for row in rows] == [name == "bee/damaged.png" for name in names]
    for wrong in ("gone", "m.bin"):
        with pytest.raises(UserError, match=f"{wrong}: no such folder"):
            image_files(wrong)


def test_the_recipe_of_a_checkpoint_is_that_of_every_kind(classifier, workdir):
    classifier.decoding = Decoding(pixels=Pixels("bicubic", "smaller_side", 0.5))
    image = Image.open(write_image(workdir / "a.png", size=(200, 90)))
    wanted, squashed = classifier.predict("a.png"), Classifier.open("m.bin").predict("a.png")
    assert not torch.equal(wanted.input, squashed.input)
    for source in (image, np.asarray(image), (workdir / "a.png").read_bytes()):
        same(classifier.predict(source), wanted)
