"""torchvision's sets from tiny files in their own layouts; `datasets` from files on this disk."""

import hashlib
import io
import json
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as vision

from models.errors import UserError
from tests.bucket import Bucket
from tests.helpers import write_image
from utils import public_sets
from utils.public_sets import PUBLIC, public_source

read = partial(public_source, log=print)


def refused(name, data_dir, *expected, **options):
    with pytest.raises(UserError) as caught:
        read(name, data_dir, **options)
    line = str(caught.value)
    assert "\n" not in line and all(str(each) in line for each in expected), line


def numbered(found, split):
    """(images, number of each one's class)"""
    return split.files, [found.classes.index(label) for label in split.labels]


def content(found):
    """{split: [(name, label, pixels) of every image]}"""
    return {
        name: [
            (item.name.rpartition(" ")[2], label, np.array(item.open()).tolist())
            for item, label in zip(*numbered(found, split), strict=True)
        ]
        for name, split in found.splits.items()
    }


# --------------------------------------------------------------------------------- torchvision


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def png(path):
    """The pixels of a new file, lossless whatever it is called."""
    return np.array(Image.open(write_image(path, format="PNG")))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def flowers102(root, patch):
    folder, labels = root / "flowers-102", [1, 2, 3, 1, 102, 2]
    pixels = [png(folder / f"jpg/image_{i:05d}.jpg") for i in range(1, 7)]
    ids = {"trnid": [5, 2], "valid": [3, 1], "tstid": [6, 4]}
    savemat(folder / "imagelabels.mat", {"labels": labels})
    savemat(folder / "setid.mat", ids)
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    files = {key: (file, md5(folder / file)) for key, file in files.items()}
    patch(vision.Flowers102, "_file_dict", vision.Flowers102._file_dict | files)
    splits = zip(("train", "val", "test"), ids.values(), strict=True)
    expected = {split: [(labels[i - 1] - 1, pixels[i - 1]) for i in own] for split, own in splits}
    return expected, tuple(vision.Flowers102.classes)


def oxford_iiit_pet(root, patch):
    folder, expected = root / "oxford-iiit-pet", {}
    for split, file in (("train", "trainval"), ("test", "test")):
        names = [f"{cat}_{split}{i}" for i in range(2) for cat in ("Abyssinian", "scottish_fold")]
        lines = [f"{name} {i % 2 + 1} 1 1" for i, name in enumerate(names)]
        write(folder / f"annotations/{file}.txt", lines)
        expected[split] = [(i % 2, png(folder / f"images/{n}.jpg")) for i, n in enumerate(names)]
    return expected, ("Abyssinian", "Scottish Fold")


def food101(root, patch):
    folder, expected = root / "food-101", {}
    for split in ("train", "test"):
        files = {dish: [f"{dish}/{split}{i}" for i in range(2)] for dish in ("sushi", "apple_pie")}
        write(folder / f"meta/{split}.json", [json.dumps(files)])
        order = ((dish, file) for dish in files for file in files[dish])
        expected[split] = [(dish == "sushi", png(folder / f"images/{f}.jpg")) for dish, f in order]
    return expected, ("apple_pie", "sushi")


def dtd(root, patch):
    folder, expected = root / "dtd/dtd", {}
    for split in ("train", "val", "test"):
        files = [f"{kind}/{kind}_{split}.jpg" for kind in ("zigzagged", "banded")]
        write(folder / f"labels/{split}1.txt", files)
        write(folder / f"labels/{split}2.txt", files[:1])
        expected[split] = [(1 - i, png(folder / "images" / file)) for i, file in enumerate(files)]
    return expected, ("banded", "zigzagged")


def eurosat(root, patch):
    files = [f"{kind}/{kind}_{i}.jpg" for kind in ("Forest", "River") for i in range(2)]
    train = [(i // 2, png(root / "eurosat/2750" / file)) for i, file in enumerate(files)]
    return {"train": train}, ("Forest", "River")


def svhn(root, patch):
    noise, expected, listed = np.random.default_rng(0), {}, {}
    for split, digits in (("train", [1, 10, 9]), ("test", [10, 2])):
        pixels = noise.integers(0, 256, (32, 32, 3, len(digits)), np.uint8)
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": pixels, "y": np.array(digits, np.uint8)[:, None]})
        listed[split] = ["http://127.0.0.1:1/closed", path.name, md5(path)]
        expected[split] = [(digit % 10, pixels[..., i]) for i, digit in enumerate(digits)]
    patch(vision.SVHN, "split_list", listed)
    return expected, tuple("0123456789")


def stl10(root, patch):
    folder, noise, expected = root / "stl10_binary", np.random.default_rng(0), {}
    folder.mkdir()
    (folder / "unlabeled_X.bin").write_bytes(b"")
    files = [folder / f"{split}_{kind}.bin" for split in ("train", "test") for kind in "Xy"]
    for split, labels in (("train", [10, 1]), ("test", [3, 4, 5])):
        pixels = noise.integers(0, 256, (len(labels), 3, 96, 96), np.uint8)  # columns before rows
        (folder / f"{split}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(labels))
        turned = pixels.transpose(0, 3, 2, 1)
        expected[split] = [(label - 1, turned[i]) for i, label in enumerate(labels)]
    sums = [[path.name, md5(path)] for path in (*files, folder / "unlabeled_X.bin")]
    patch(vision.STL10, "train_list", [*sums[:2], sums[4]])
    patch(vision.STL10, "test_list", sums[2:4])
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    return expected, names


def fgvc_aircraft(root, patch):
    folder, expected, variants = root / "fgvc-aircraft-2013b/data", {}, ("DC-3", "Falcon 900")
    write(folder / "variants.txt", variants)
    write(folder / "families.txt", ["a family"])
    for split in ("train", "val", "test"):
        files = [f"{split}{i}" for i in range(3)]
        lines = [f"{file} {variants[i % 2]}" for i, file in enumerate(files)]
        write(folder / f"images_variant_{split}.txt", lines)
        expected[split] = [(i % 2, png(folder / f"images/{f}.jpg")) for i, f in enumerate(files)]
    return expected, variants


WRITERS = (flowers102, oxford_iiit_pet, food101, dtd, eurosat, svhn, stl10, fgvc_aircraft)


def test_every_set_has_a_layout_here():
    assert [writer.__name__ for writer in WRITERS] == list(PUBLIC)


@pytest.mark.parametrize("writer", WRITERS)
def test_files_that_are_here_are_read_offline(writer, tmp_path, monkeypatch):
    name = writer.__name__
    expected, classes = writer(tmp_path, monkeypatch.setattr)
    files = set(tmp_path.rglob("*"))
    found = pickle.loads(pickle.dumps(read(name, tmp_path, offline=True)))  # as workers get it
    assert content(found) == {
        split: [(f"{split}/{i}", int(own[i][0]), own[i][1].tolist()) for i in range(len(own))]
        for split, own in expected.items()
    }
    assert found.classes == classes
    assert found.name == f"{name} in {tmp_path / PUBLIC[name].folder}"
    assert str(found.splits["train"][0][1]) == f"{name} train/1"
    assert set(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_missing_is_not_downloaded_offline(name, tmp_path):
    folder = tmp_path / "data" / PUBLIC[name].folder
    refused(name, tmp_path / "data", f"{folder} does not hold all of {name}", offline=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def site():
    with Bucket() as server:
        yield server


def place_svhn(site, source, monkeypatch):
    """Files in the folder `source`, and on the site from which torchvision now downloads."""
    source.mkdir()
    expected, _ = svhn(source, monkeypatch.setattr)
    for entry in vision.SVHN.split_list.values():
        site.files[entry[1]] = (source / entry[1]).read_bytes()
        entry[0] = f"{site.url}/{entry[1]}"
    return expected


def test_several_at_once_download_once(site, tmp_path, monkeypatch):
    expected, lines = place_svhn(site, tmp_path / "source", monkeypatch), []
    folder = tmp_path / "new" / "data"
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: read("svhn", folder, log=lines.append), range(4)))
    for found in sets:
        labels = {name: numbered(found, split)[1] for name, split in found.splits.items()}
        assert labels == {name: [label for label, _ in own] for name, own in expected.items()}
    assert lines == [f"downloading svhn to {folder}"]


def test_a_failed_download_is_one_line_and_can_be_repeated(site, tmp_path, monkeypatch):
    place_svhn(site, tmp_path / "source", monkeypatch)
    whole, folder = site.files.pop("test_32x32.mat"), tmp_path / "data"
    refused("svhn", folder, "svhn in", folder, "404")
    site.files["test_32x32.mat"] = whole[:-9]
    refused("svhn", folder, "svhn in", folder, "corrupted")
    site.files["test_32x32.mat"] = whole
    assert read("svhn", folder).splits["test"].labels == ["0", "2"]
    vision.SVHN.split_list["train"][2] = "0" * 32  # another MD5
    refused("svhn", folder, "does not hold all", offline=True)
    (tmp_path / "file").write_text("")
    refused("svhn", tmp_path / "file", "svhn in", tmp_path / "file", "exists")


def test_aircraft_are_unpacked_only_from_the_published_archive(site, tmp_path, monkeypatch):
    _, classes = fgvc_aircraft(tmp_path / "source", monkeypatch.setattr)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "source/fgvc-aircraft-2013b", "fgvc-aircraft-2013b")
    file = "fgvc-aircraft-2013b.tar.gz"
    site.files[file] = buffer.getvalue()
    monkeypatch.setattr(vision.FGVCAircraft, "_URL", f"{site.url}/{file}")
    refused("fgvc_aircraft", tmp_path / "data", tmp_path / "data", "corrupted")
    assert not (tmp_path / "data/fgvc-aircraft-2013b").exists()
    monkeypatch.setattr(public_sets, "AIRCRAFT_MD5", hashlib.md5(buffer.getvalue()).hexdigest())
    found = read("fgvc_aircraft", tmp_path / "data")
    assert found.classes == classes and found.splits["test"].labels == [
        "DC-3",
        "Falcon 900",
        "DC-3",
    ]


# ------------------------------------------------------------------- Hugging Face's `datasets`


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The package `datasets`, offline and with a cache of its own."""
    hub = pytest.importorskip("datasets", reason="requirements-datasets.txt is not installed")
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for module in (hub.config, sys.modules["huggingface_hub.constants"]):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)  # and so again after the test
    return hub


def png_bytes(grey):
    buffer = io.BytesIO()
    Image.new("L", (3, 2), grey).save(buffer, "PNG")
    return buffer.getvalue()


def greys(found):
    """{split: [(name, label, grey) of every image]}"""
    plain = content(found)
    return {split: [(n, label, p[0][0]) for n, label, p in own] for split, own in plain.items()}


def save_parquet(path, labels, first=0, **columns):
    """One image a label, of grey `first` and up, as a program without `datasets` writes it."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [{"bytes": png_bytes(first + i), "path": None} for i in range(len(labels))]
    rows = {"image": files, "label": labels} | columns
    parquet.write_table(pa.table({name: rows[name] for name in rows if rows[name]}), path)
    return path


@pytest.mark.parametrize("labels, classes", [("ba-", ("a", "b")), ([7, 5, None], ("5", "7"))])
def test_a_parquet_file(labels, classes, hub, tmp_path):
    labels = [None if label == "-" else label for label in labels]
    path = save_parquet(tmp_path / "some.parquet", labels, caption=["x", "y", "z"])
    found = pickle.loads(pickle.dumps(read("parquet", path, offline=True)))
    assert greys(found) == {"train": [("train/0", 1, 0), ("train/1", 0, 1)]}
    assert found.classes == classes and found.name == str(path)


def test_a_folder_of_parquet_files(hub, tmp_path):
    folder = tmp_path / "photos"
    save_parquet(folder / "train-00000-of-00002.parquet", [3, 1, -1])
    save_parquet(folder / "train-00001-of-00002.parquet", [2], first=10)
    save_parquet(folder / "validation.parquet", [2], first=20)
    save_parquet(folder / "test.parquet", [-1, 3], first=30)
    (folder / "train_notes.txt").write_text("not parquet")
    found = read("parquet", folder, offline=True)
    assert greys(found) == {
        "train": [("train/0", 2, 0), ("train/1", 0, 1), ("train/3", 1, 10)],
        "val": [("val/0", 1, 20)],
        "test": [("test/1", 2, 31)],
    }
    assert found.classes == ("1", "2", "3")
    save_parquet(folder / "test.parquet", [4])
    refused("parquet", folder, folder, "test has the class 4", offline=True)


def test_columns_of_datasets_itself(hub, tmp_path):
    """ClassLabel keeps its names, even those without images; a test split may lack labels."""
    names = hub.ClassLabel(names=["cat", "dog", "emu"])
    columns = {"png": hub.Image(), "coarse_label": names, "fine_label": names}
    for split, labels in (("train", [2, 0]), ("dev", [-1, 2]), ("test", [-1, -1]), ("extra", [1])):
        images = [Image.new("RGB", (2, 2), (9, 9, 40 + label)) for label in labels]
        rows = {"png": images, "coarse_label": [1] * len(labels), "fine_label": labels}
        table = hub.Dataset.from_dict(rows, hub.Features(columns))
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"set/{split}.parquet")
    lines = []
    files = [{"split": s, "path": f"{s}.parquet"} for s in ("extra", "test", "dev", "train")]
    card = {"configs": [{"config_name": "plain", "data_files": files}]}
    card = f"---\n{json.dumps(card)}\n---\n"  # JSON is YAML
    (tmp_path / "set/README.md").write_text(card)
    found = read(f"hf:{tmp_path / 'set'}:plain", tmp_path, log=lines.append, offline=True)
    assert found.classes == ("cat", "dog", "emu")
    assert content(found) == {
        "train": [("train/0", 2, [[[9, 9, 42]] * 2] * 2), ("train/1", 0, [[[9, 9, 40]] * 2] * 2)],
        "val": [("val/1", 2, [[[9, 9, 42]] * 2] * 2)],
    }
    assert found.name == f"hf:{tmp_path / 'set'}:plain"
    assert sorted(line.split("split ")[1].split()[0] for line in lines) == ["extra", "test"]


def test_a_folder_that_datasets_reads_by_itself(hub, tmp_path):
    paths = [write_image(tmp_path / f"set/{s}/{c}/1.png") for s in ("train", "test") for c in "ab"]
    found = read(f"hf:{tmp_path / 'set'}", tmp_path, log=pytest.fail)  # it says nothing
    pixels = np.array(Image.open(paths[0])).tolist()
    assert found.classes == ("a", "b")
    for split in ("train", "test"):
        assert content(found)[split] == [(f"{split}/0", 0, pixels), (f"{split}/1", 1, pixels)]


def test_names_of_the_hub(hub, tmp_path, monkeypatch):
    seen, lines = [], []
    features = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=["x"])})
    table = hub.Dataset.from_dict({"img": [{"bytes": png_bytes(3)}], "label": [0]}, features)
    fake = lambda *given, **options: seen.append(given) or {"train": table}  # noqa: E731
    monkeypatch.setattr(hub, "load_dataset", fake)
    for name in ("hf:cifar10", "hf:someone/photos:large"):
        assert greys(read(name, tmp_path, log=lines.append)) == {"train": [("train/0", 0, 3)]}
    assert seen == [("cifar10", None), ("someone/photos", "large")]
    assert [line.split()[1] for line in lines] == ["cifar10", "someone/photos"]
    assert str(read("hf:a/b", tmp_path).splits["train"][0][0]) == "hf:a/b train/0"


def test_offline_sets_what_datasets_obeys(hub, tmp_path, monkeypatch):
    constants = sys.modules["huggingface_hub.constants"]
    for module in (hub.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    refused("hf:someone/photos", tmp_path, "someone/photos", "Offline", offline=True)
    assert hub.config.HF_HUB_OFFLINE and constants.HF_HUB_OFFLINE


def test_an_address_in_a_file_is_not_fetched(hub, site, tmp_path):
    files = [{"bytes": None, "path": f"{site.url}/1.png"}, {"bytes": png_bytes(1), "path": ""}]
    save_parquet(tmp_path / "a.parquet", ["a", "b"], image=files)
    site.files["1.png"] = png_bytes(1)
    item = read("parquet", tmp_path / "a.parquet", offline=True).splits["train"][0][0]
    with pytest.raises(OSError):
        item.open()
    assert not site.seen


def test_refusals_of_tables(hub, tmp_path):
    path = tmp_path / "a.parquet"
    for columns in ({"image": 0, "photo": ["a"]}, {"label": 0, "kind": [1]}):
        save_parquet(path, [1], **columns)
        listed = [name for name in columns if columns[name]]
        refused("parquet", path, path, "its columns are", *listed, offline=True)
    two = {"front": hub.Image(), "back": hub.Image(), "label": hub.Value("int64")}
    rows = {"front": [png_bytes(1)], "back": [png_bytes(2)], "label": [1]}
    hub.Dataset.from_dict(rows, hub.Features(two)).to_parquet(path)
    refused("parquet", path, "its columns are front, back, label", offline=True)
    save_parquet(tmp_path / "b/test.parquet", [1])
    refused("parquet", tmp_path / "b", "has no split called train, but test", offline=True)
    refused("parquet", tmp_path / "nothing", tmp_path / "nothing", offline=True)
    (tmp_path / "d.parquet").write_text("text")
    refused("parquet", tmp_path / "d.parquet", tmp_path / "d.parquet", offline=True)


@pytest.mark.parametrize("name", ["hf:cifar10", "parquet"])
def test_without_datasets(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(name, tmp_path, f"{name} needs", "pip install -r requirements-datasets.txt")
