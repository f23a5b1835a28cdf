"""Data sets: handwritten digits, splits, and folders of images. CIFAR has its own file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_utils import check_source, load_data, load_evaluation, split
from models.errors import UserError
from models.labels import label_names
from tests.helpers import write_image, write_images
from tests.test_images import damaged_files
from utils import image_index
from utils.images import CHANNEL_MODES, Decoding, Item, read_image
from utils.seeds import named_seed
from utils.stream import EvalStream


def load(name, data_dir=".", **options):
    return load_data(name, data_dir, **({"log": lambda line: None} | options))


def refused(name, data_dir, *words, check=load_data, **options):
    """The error is one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        check(name, data_dir, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def as_array(pixels):
    """(n, C, h, w) as Pillow has it: (n, h, w, C), or (n, h, w) for one channel."""
    pixels = pixels.permute(0, 2, 3, 1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def sorted_rows(pixels):
    return sorted(image.numpy().tobytes() for image in pixels)


def test_digits():
    data, everything = load("digits"), load_digits()
    assert data.classes == tuple("0123456789")
    assert data.test is None and data.val_split == "test"
    of_class = np.bincount(everything.target)
    train, val = (images.labels.bincount() for images in (data.train, data.val))
    assert val.tolist() == [round(0.2 * n) for n in of_class]
    assert (train + val).tolist() == of_class.tolist()
    pixels = torch.cat([data.train.pixels, data.val.pixels])
    assert pixels.dtype == torch.uint8 and pixels.shape == (1797, 3, 8, 8)
    wanted = torch.from_numpy(np.round(everything.images * 255 / 16)).byte()
    assert sorted_rows(pixels[:, 0]) == sorted_rows(wanted)
    grey, rgb, rgba = (load("digits", decoding=Decoding(n)).val.pixels for n in (1, 3, 4))
    assert grey.shape == (359, 1, 8, 8) and rgba.shape == (359, 4, 8, 8)
    assert torch.equal(rgb, grey.expand(-1, 3, -1, -1))
    assert torch.equal(rgba[:, :3], rgb) and (rgba[:, 3] == 255).all()


def test_seeds_have_names():
    """The splits, orders and crops of old runs depend on these very numbers."""
    assert named_seed(0, "split") == 1947725093899964015
    names = [(0, "split"), (1, "split"), (0, "order"), (0, "order", 0), (0, "order", 1)]
    seeds = [named_seed(*name) for name in names]
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
    with pytest.raises(UserError, match=r"class 'eel' without training images: it has 1 image$"):
        split(torch.tensor([0] * 9 + [1]), 0.1, 0, ("cat", "eel"))
    with pytest.raises(UserError, match=r"class 0 without training images: it has 4 images$"):
        split(torch.tensor([0] * 4), 0.9, seed=0)
    assert len(split(torch.tensor([0] * 4), 0.7, seed=0)[0]) == 1


def test_val_fraction_is_drawn_by_seed_and_keeps_the_test_images_for_the_end():
    plain = load("digits", seed=3)
    drawn = [load("digits", seed=seed, val_fraction=0.1) for seed in (0, 1)]
    assert not torch.equal(drawn[0].val.labels, drawn[1].val.labels)
    for data in drawn:
        assert data.val_split == "val"
        assert torch.equal(data.test.pixels, plain.val.pixels)
        assert torch.equal(data.test.labels, plain.val.labels)
        wanted = [round(n / 10) for n in plain.train.labels.bincount().tolist()]
        assert data.val.labels.bincount().tolist() == wanted
        both = torch.cat([data.train.pixels, data.val.pixels])
        assert sorted_rows(both) == sorted_rows(plain.train.pixels)
    assert len({data.fingerprint for data in (plain, *drawn)}) == 3


@pytest.mark.parametrize("name", ["val", "test"])
def test_folder_with_one_evaluation_split(name, tmp_path):
    classes, train = ("b", "a10", "C", "a9"), tmp_path / "train"
    write_images(train, (*classes, ".git"), count=3)
    write_images(tmp_path / name, ("b", "a10", ".cache"), count=1)  # need not have every class
    write_image(train / "stray.png")  # in no class folder
    write_image(train / "b" / ".ipynb_checkpoints" / "b0-checkpoint.png")
    deep = write_image(train / "b" / "deep" / "down" / "x.png")
    data = load("folder", tmp_path)
    assert data.classes == ("C", "a10", "a9", "b")  # as Python sorts text
    assert data.test is None and data.val_split == name
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert data.val.labels.tolist() == [1, 3]
    files = [train / name / f"{name}{i}.png" for name in data.classes for i in (0, 1, 2)]
    wanted = np.stack([np.asarray(Image.open(file)) for file in [*files, deep]])
    assert data.train.pixels.dtype == torch.uint8
    assert (as_array(data.train.pixels) == wanted).all()
    assert data.source == str(tmp_path)


def test_folder_with_val_and_test(tmp_path):
    for name, count in (("train", 4), ("val", 2), ("test", 3)):
        write_images(tmp_path / name, count=count)
    data = load("folder", tmp_path)
    assert data.val_split == "val"
    assert [len(images) for images in (data.train, data.val, data.test)] == [8, 4, 6]
    lines = []
    drawn = load("folder", tmp_path, val_fraction=0.25, log=lines.append)
    assert lines == ["note: the data's own validation images (val/) are not used"]
    assert [len(images) for images in (drawn.train, drawn.val, drawn.test)] == [6, 2, 6]
    assert "images: 6 train (train/), 2 val (train/), 6 test (test/)" in str(drawn)
    assert torch.equal(drawn.test.pixels, data.test.pixels)
    assert data.final()[:2] == (data.test, "test") and drawn.final()[:2] == (drawn.test, "test")


def test_folder_without_splits(tmp_path):
    files = write_images(tmp_path, count=10)
    refused("folder", tmp_path, tmp_path, "neither val/ nor test/", "--val_fraction")
    data = load("folder", tmp_path, val_fraction=0.2)
    assert data.classes == ("cat", "dog") and data.test is None
    assert data.val.labels.tolist() == [0, 0, 1, 1]
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8
    assert sorted(data.train.paths + data.val.paths) == sorted(files)
    for images in (data.train, data.val):
        names = [path.parent.name for path in images.paths]
        assert names == [data.classes[label] for label in images.labels.tolist()]
        for path, pixels in zip(images.paths, as_array(images.pixels), strict=True):
            assert (pixels == np.asarray(read_image(path))).all()


MIXED = {"L": "png", "P": "png", "RGBA": "png", "LA": "png", "CMYK": "jpg", "RGB": "png"}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mixed_modes_are_held_in_memory_and_mixed_sizes_stay_files(channels, tmp_path):
    folders = [tmp_path / "train" / name for name in ("cat", "dog")]
    files = [folder / f"{mode}.{MIXED[mode]}" for folder in folders for mode in sorted(MIXED)]
    for file in files:
        write_image(file, (10, 6), mode=file.stem)
    write_images(tmp_path / "val", size=(7, 5))  # each split by itself
    data = load("folder", tmp_path, decoding=Decoding(channels))
    assert data.train.pixels.shape == (12, channels, 6, 10)
    assert data.val.pixels.shape == (4, channels, 5, 7)
    for file, pixels in zip(files, as_array(data.train.pixels), strict=True):
        image = Image.open(file)
        if channels < 4 and "A" in image.mode:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            )
        wanted = np.asarray(image.convert(CHANNEL_MODES[channels]))
        assert (pixels == wanted).all(), file

    write_image(files[0], size=(6, 10), mode="CMYK")
    data = load("folder", tmp_path, decoding=Decoding(channels))
    assert data.train.pixels is None and data.train.paths == tuple(files)
    assert data.val.pixels is not None
    stream = EvalStream(data.train, (6, 6), batch_size=12, device=torch.device("cpu"))
    images, labels = next(iter(stream))
    assert images.shape == (12, channels, 6, 6) and labels.tolist() == [0] * 6 + [1] * 6


def test_large_and_turned_images_stay_files(tmp_path):
    write_images(tmp_path / "train", size=(64, 63))
    write_images(tmp_path / "val", size=(65, 64))
    data, turned = load("folder", tmp_path), Image.Exif()
    assert data.train.pixels is not None and data.val.pixels is None
    turned[0x0112] = 6  # a quarter turn: 63 x 64 as seen
    for name in ("turned.jpg", "turned.png", "turned.tiff"):
        path = write_image(tmp_path / "train" / "cat" / name, size=(64, 63), exif=turned)
        assert load("folder", tmp_path).train.pixels is None
        path.unlink()


def test_wrong_folders_are_refused_before_they_are_read(tmp_path):
    """By load_data and, before weights are downloaded, by check_source."""
    write_images(tmp_path / "no_train" / "val")
    write_images(tmp_path / "one" / "train", ("cat",))
    write_images(tmp_path / "odd" / "train")
    write_images(tmp_path / "odd" / "val", ("cat", "dog", "eel"))
    write_images(tmp_path / "name" / "train")
    (tmp_path / "name" / "train" / os.fsdecode(b"d\xff")).mkdir()
    write_images(tmp_path / "alone" / "train")
    (tmp_path / "nothing").mkdir()
    for name in ("Train", "val", "Valid"):
        write_images(tmp_path / "two" / name)
    write_images(tmp_path / "nested" / "train")
    write_images(tmp_path / "nested" / "train" / "dev")
    messages = {
        "nothing": "nothing needs a folder for each of two or more classes; it has none",
        "no_train": "no_train has no train/ folder",
        "one": "train needs a folder for each of two or more classes; it has only 'cat'",
        "odd": "val/eel is a class that the training images lack",
        "name": r"d\udcff: a class needs a name in UTF-8",
        "alone": "alone has neither val/ nor test/ with class folders",
        "two": "two/Valid and ",
        "nested": "train/dev is called like a split and holds only folders",
    }
    for name, message in messages.items():
        for check in (load_data, check_source):
            refused("folder", tmp_path / name, message, check=check)
    check_source("folder", tmp_path / "alone", val_fraction=0.1)
    check_source("folder", tmp_path / "no_train", training=False)
    evaluation = {"check": check_source, "training": False}
    refused("folder", tmp_path / "nothing", "holds no class folders", **evaluation)
    refused("folder", tmp_path / "gone", "no such folder", **evaluation)
    refused("folder", tmp_path / "gone", "no such folder", check=check_source)
    refused("cifar10", tmp_path / "cifar-10-python.tar.gz", "no such file", check=check_source)


def test_empty_folders_are_named(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    refused("folder", tmp_path, tmp_path / "val", "holds no images")
    (tmp_path / "train" / "eel").mkdir()
    write_image(tmp_path / "val" / "cat" / "1.png")
    refused("folder", tmp_path, "the class 'eel' has no training images")


def test_skip_unreadable_names_the_files_and_goes_on(tmp_path):
    bad = damaged_files(tmp_path / "train" / "cat")
    write_images(tmp_path / "train", count=4, size=(80, 90))
    refused("folder", tmp_path, "is not a readable image", val_fraction=0.25)
    lines, options = [], {"val_fraction": 0.25, "skip_unreadable": True}
    data = load("folder", tmp_path, log=lines.append, **options)
    assert len(data.train.readable()) + len(data.val.readable()) == 9  # 8 and good.jpg
    assert len(data.train) + len(data.val) == 9 + len(bad)  # their places are kept
    assert sorted(line.split("/")[-1].split(" ")[0] for line in lines) == sorted(bad)
    for path in (tmp_path / "train" / "dog").iterdir():
        path.write_bytes(b"")
    refused("folder", tmp_path, "the class of", "dog", "has no readable image", **options)


def test_skipping_is_not_remembered_by_the_index(tmp_path, monkeypatch):
    """A load without the flag names the file again, and takes no zeros for it."""
    monkeypatch.setattr(image_index, "INDEXED_FILES", 10)
    monkeypatch.chdir(tmp_path)
    files = write_images(tmp_path / "d" / "train", count=10)
    write_images(tmp_path / "d" / "val", count=1)
    files[3].write_bytes(files[3].read_bytes()[:150])
    for _ in range(2):
        refused("folder", tmp_path / "d", files[3].name, "is not a readable image")
        data = load("folder", tmp_path / "d", skip_unreadable=True)
        assert data.unreadable == {"train": [3]} and len(data.train.readable()) == 19
    for path in (tmp_path / "d" / "val").rglob("*.png"):
        path.write_bytes(b"")
    refused("folder", tmp_path / "d", "val has no readable image", skip_unreadable=True)


def test_places_of_a_run_on_other_data_are_passed_over(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part)
    unreadable = {"train": [1, 99], "test": [0]}  # restore_run refuses the data by its fingerprint
    assert load("folder", tmp_path, unreadable=unreadable).unreadable == {"train": [1]}


def test_evaluation_labels_are_the_model_s(tmp_path):
    write_images(tmp_path / "train", ("ant",))
    write_images(tmp_path / "val", ("cat", "dog"))
    own = ("dog", "eel", "cat")
    images, name, source, classes = load_evaluation("folder", tmp_path, own, named=True)
    assert images.labels.tolist() == [2, 2, 0, 0] and classes == own
    assert name == "val" and source == str(tmp_path / "val")


@pytest.mark.parametrize(
    "names",
    ["Train valid TEST", "training Validation testing", "train dev test", "TRAINING Val Test"],
)
def test_splits_of_other_names(names, tmp_path):
    for name, count in zip(names.split(), (4, 2, 3), strict=True):
        write_images(tmp_path / name, count=count)
    data = load("folder", tmp_path)
    assert [len(images) for images in (data.train, data.val, data.test)] == [8, 4, 6]
    train, val, test = names.split()
    assert str(data) == (
        f"{tmp_path}; images: 8 train ({train}/), 4 val ({val}/), 6 test ({test}/); "
        "classes: 2 (cat, dog), 4 training images each"
    )
    found = load_evaluation("folder", tmp_path, ("cat", "dog"), named=True)
    assert (found.split, found.source) == ("test", str(tmp_path / test))


def test_classes_that_are_called_like_splits(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, ("test", "train", "cat"))
    assert load("folder", tmp_path).classes == ("cat", "test", "train")
    data = load("folder", tmp_path / "train", val_fraction=0.5)
    assert data.classes == ("cat", "test", "train") and len(data.train) == 3
    found = load_evaluation("folder", tmp_path / "val", ("train", "cat", "test"), named=True)
    assert found.images.labels.tolist() == [1, 1, 2, 2, 0, 0] and found.split == "val"


def test_an_unlabelled_split_is_left_out_with_a_note(tmp_path):
    write_images(tmp_path / "train", count=4)
    write_image(tmp_path / "test" / "1.png")
    (tmp_path / "masks").mkdir()
    refused("folder", tmp_path, "neither val/ nor test/ with class folders")
    lines = []
    data = load("folder", tmp_path, val_fraction=0.25, log=lines.append)
    assert len(data.train) == 6 and len(data.val) == 2 and data.test is None
    assert lines == ["note: masks/, test/ left out: no split, or without class folders"]


def test_one_bit_depth_and_background_for_all_splits(tmp_path):
    """The largest value is in train/; the darker images of val/ stay dark."""
    for part, top in (("train", 4000), ("val", 900)):
        for name in ("cat", "dog"):
            values = np.linspace(0, top, 48, dtype=np.uint16).reshape(6, 8)
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / part / name / "a.png")
    data = load("folder", tmp_path)
    assert str(data).endswith("; 12-bit pixels")
    assert data.train.decoding.bit_depth == data.val.decoding.bit_depth == 12
    assert data.train.pixels.max() == 4000 >> 4 and data.val.pixels.max() == 900 >> 4
    lines = []
    fixed = load("folder", tmp_path, decoding=Decoding(bit_depth=10), log=lines.append)
    wrong = "images have 12 bits, and are read as 10 bits: their brightness is wrong"
    assert lines == [f"note: {wrong}"]
    assert fixed.val.pixels.max() == 900 >> 2 and fixed.train.pixels.max() == 255
    glass, lines = np.zeros((6, 8, 4), np.uint8), []
    Image.fromarray(glass).save(tmp_path / "train" / "cat" / "b.png")
    blue = Decoding(background=(0, 0, 255))
    data = load("folder", tmp_path, decoding=blue, log=lines.append)
    assert lines == ["note: images have transparent pixels, and (0, 0, 255) is put behind them"]
    assert data.train.pixels[1].amax((1, 2)).tolist() == [0, 0, 255]


def test_wide_images_of_a_later_split_have_one_depth(tmp_path):
    write_images(tmp_path / "train", size=(8, 6))
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "val" / name).mkdir(parents=True)
        values = np.full((6, 8), 1000 * (i + 1), np.uint16)
        Image.fromarray(values).save(tmp_path / "val" / name / "a.png")
    assert load("folder", tmp_path).val.pixels[:, 0, 0, 0].tolist() == [1000 >> 4, 2000 >> 4]


def test_items_are_sampled_over_the_whole_set():
    """Of 600 images the last third has more bits; the first is damaged."""
    deep = [Image.fromarray(np.full((70, 70), value, np.uint16)) for value in (1000, 4000)]
    images = [None, *[Image.new("L", (70, 70), 9)] * 399, *deep * 100]
    items = [Item([(image, 0) for image in images], i, f"x/{i}") for i in range(600)]
    reader = image_index.ImageReader(Path("x"), Decoding(), True, print, False)
    found = reader.read("x", items, [0] * 600, listed=False)
    assert found.decoding.bit_depth == 12 and found.unreadable.nonzero().tolist() == [[0]]


def table(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_tables(tmp_path):
    for i in range(6):
        write_image(tmp_path / "photos" / f"{i}.png")
    rows = [f"photos/{i}.png;{10 - 9 * (i % 2)};{'Valid' if i > 3 else 'train'}" for i in range(6)]
    file = table(tmp_path / "labels.csv", "\n".join(["Path;label;split", *rows, ""]))
    data = load("csv", file)
    assert data.classes == ("1", "10")  # by number
    assert data.train.labels.tolist() == [1, 0, 1, 0] and data.val.labels.tolist() == [1, 0]
    assert data.val_split == "val" and data.val.paths[1] == tmp_path / "photos" / "5.png"
    found = load_evaluation("csv", file, ("10", "1"), named=True)
    assert found.split == "val" and found.images.labels.tolist() == [0, 1]

    plain = table(tmp_path / "plain.csv", 'label,path\n"a, b",photos/0.png\nc,photos/1.png\n')
    refused("csv", plain, "has neither validation nor test images", "--val_fraction")
    found = load_evaluation("csv", plain, ("c", "a, b"), named=True)
    assert found.split == "test" and found.images.labels.tolist() == [1, 0]
    wrong = {
        "photos/1.png,cat\n": "its first line must name the columns label, path",
        "path\na.png\n": "its first line must name the columns label, path",
        "path,label\n": "has no rows",
        "path,label\na,b,c\n": "line 2: 2 fields are needed, and no empty label or path",
        "path,label\na,b\nb,\n": "line 3: 2 fields are needed, and no empty label or path",
        "path,label,split\na,b,extra\n": "the split 'extra' is none of train",
        "path,label,Label\na,b,c\n": "the columns label, path, each once",
        "path,label,split\nphotos,b,train\nphotos/1.png,c,train\nphotos/2.png,c,val\n": (
            "photos is in the table, but such files are no images"
        ),
        "path,label,split\ngone,b,train\nphotos/1.png,c,train\nphotos/2.png,c,val\n": (
            "gone is not a readable image (No such file or directory)"
        ),
        "path,label\na,b\nb,b\n": "wrong.csv has one class only",
        "path,label,split\na.png,b,train\nb.png,c,train\nd,c,val\n": "a.png is not a readable",
        "path,label,split\nphotos/0.png,b,train\nphotos/1.png,c,train\nphotos/2.png,e,val\n": (
            "the training images lack the class 'e'"
        ),
    }
    for text, message in wrong.items():
        refused("csv", table(tmp_path / "wrong.csv", text), message)
    refused("csv", tmp_path / "none.csv", "no such file", check=check_source)


def test_imagenet_folders(tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    cranes = ("n02012849", "n03126707")  # a bird and a machine of the same name
    for part in ("train", "val"):
        write_images(root / part, ("n01440764", *cranes))
    data = load("imagenet", tmp_path)
    assert data.classes == ("tench, Tinca tinca", *(f"crane ({name})" for name in cranes))
    for classes, named in ((data.classes, True), (label_names(1000), False)):
        found = load_evaluation("imagenet", tmp_path, classes, named=named)
        wanted = [0, 1, 2] if named else [0, 134, 517]
        assert found.images.labels.tolist() == [i for label in wanted for i in (label, label)]


def test_evaluation_on_test_then_val_then_the_folder_itself(tmp_path):
    classes = {"classes": ("cat", "dog"), "named": True}
    write_images(tmp_path / "train")
    with pytest.raises(UserError, match="has train/, but neither val/ nor test/"):
        load_evaluation("folder", tmp_path, **classes)
    (tmp_path / "test").mkdir()
    write_image(tmp_path / "test" / "unlabelled.png")  # as ImageNet's
    for name, count in (("val", 1), ("test", 3)):
        write_images(tmp_path / name, count=count)
        images, found, _, _ = load_evaluation("folder", tmp_path, **classes)
        assert found == name and len(images) == 2 * count
    images, found, _, _ = load_evaluation("folder", tmp_path / "train", **classes)
    assert found == "train" and len(images) == 4
