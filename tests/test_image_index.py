"""The index: which files are images, what is left out, and what the next start does not repeat."""

import os

import numpy as np
import pytest
from PIL import Image

from data_utils import load_data
from tests.helpers import write_image, write_images
from utils import image_index, images
from utils.image_index import Index

pytestmark = pytest.mark.usefixtures("workdir")


def load(root, **options):
    lines = []
    return load_data("folder", root, val_fraction=0.25, log=lines.append, **options), lines


def pixels_of(data):
    return np.concatenate([data.train.pixels, data.val.pixels])


def test_content_counts_and_not_the_ending(workdir):
    paths = write_images(workdir / "d", count=8)
    for path, ending in zip(paths, ("", ".heic", ".dcm", ".jpg_large"), strict=False):
        path.rename(path.with_suffix(ending))
    cat = workdir / "d" / "cat"
    (cat / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (cat / "clip.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(100))
    (cat / "old.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (cat / "notes.txt").write_text("x")
    (cat / "LICENSE").write_text("x")
    os.mkfifo(cat / "pipe.png")
    (workdir / "d" / "labels.csv").write_text("x")
    write_image(workdir / "d" / "loose.png")
    data, lines = load(workdir / "d")
    assert len(data.train) + len(data.val) == 16
    none = "6 are no images (1 .eps, 1 .h5, 1 .mpg, 1 .png, 1 .txt, 1 without ending)"
    beside = "2 lie beside the class folders (1 .csv, 1 .png)"
    assert lines == [f"note: files are left out: {beside}; {none}"]


def test_a_missing_plugin_is_named(workdir, monkeypatch):
    write_images(workdir / "d", count=4)
    for name in ("a.heic", "b.jpg"):  # telephones send HEIC under both endings
        Image.new("RGB", (64, 64)).save(workdir / "d" / "cat" / name, format="HEIF")
    known = tuple(name for name in images.formats() if name != "HEIF")
    monkeypatch.setattr(images, "formats", lambda: known)
    data, lines = load(workdir / "d")
    assert len(data.train) + len(data.val) == 8
    assert lines == ["note: files are left out: 2 need pillow-heif (1 .heic, 1 .jpg)"]


def test_the_next_start_opens_what_changed(workdir, monkeypatch):
    monkeypatch.setattr(image_index, "INDEXED_FILES", 10)
    paths = write_images(workdir / "d", count=8)
    (workdir / "d" / "cat" / "notes.txt").write_text("x")
    first, lines = load(workdir / "d")
    assert len(list((workdir / "logs" / ".index").iterdir())) == 2
    opened, decode = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **how: opened.append(path.name) or decode(path, **how)
    )
    second, again = load(workdir / "d")
    assert opened == [] and again == lines and second.fingerprint == first.fingerprint
    for name in ("train", "val"):
        assert np.array_equal(getattr(first, name).pixels, getattr(second, name).pixels)
    write_image(paths[3], mode="L")
    third, _ = load(workdir / "d")
    assert opened[0] == str(paths[3])
    assert not np.array_equal(pixels_of(third), pixels_of(second))
    assert len(list((workdir / "logs" / ".index").iterdir())) == 2  # the old pixels are gone
    for a, b in ((0, "x"), (1, 0), ("x", 1)):  # two files change places, and keep their times
        names = [paths[n] if n != "x" else workdir / "x" for n in (a, b)]
        names[0].rename(names[1])
    assert not np.array_equal(pixels_of(load(workdir / "d")[0]), pixels_of(third))
    for file in (workdir / "logs" / ".index").iterdir():  # damaged: all is read again
        file.write_bytes(b"[1")
    assert load(workdir / "d")[0].fingerprint == third.fingerprint


def test_an_evaluation_does_not_forget_the_training_images(workdir, monkeypatch):
    monkeypatch.setattr(image_index, "INDEXED_FILES", 2)
    files = write_images(workdir / "d")
    for part in (files[:2], files[2:]):
        index = Index(workdir / "d")
        index.heads(part, "check")
        index.save()
    assert len(Index(workdir / "d").known) == 4


def test_small_sets_leave_no_index(workdir):
    write_images(workdir / "d", count=8)
    load(workdir / "d")
    assert not (workdir / "logs").exists()
