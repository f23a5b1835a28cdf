"""Decoded images in memory: every process finds them, and no pixel depends on them."""

import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from subprocess import PIPE

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader

import train
from models.checkpoints import load_torch
from models.pixels import Pixels
from tests.helpers import ROOT, run_command, words, write_image
from utils import image_cache, loading
from utils.augment import DRAWS, Augmentation
from utils.cli import cache_size
from utils.image_cache import ImageCache, new_cache
from utils.image_set import ImageSet
from utils.images import Decoding, decode
from utils.loading import Files
from utils.stream import EvalStream, Shard, TrainStream

CPU, SIZE = torch.device("cpu"), (24, 20)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_images_are_kept_until_the_room_is_full():
    cache = ImageCache(100)
    first, second = cache.for_images(3), cache.for_images(4)
    kept, other, large = noise(0, 4, 5, 3), noise(1, 6, 5, 1), noise(2, 11, 1, 1)
    turned = np.flip(other, 0)  # not contiguous
    first.put(2, kept)
    assert second.get(2) is None and first.get(0) is None
    second.put(2, turned)
    second.put(0, large)  # 101 bytes
    second.put(1, large[:10])  # the last ones
    first.put(0, large[:1])
    assert np.array_equal(first.get(2), kept) and np.array_equal(second.get(2), turned)
    assert np.array_equal(second.get(1), large[:10])
    assert first.get(0) is first.get(1) is second.get(0) is second.get(3) is None
    assert cache.used.value == 100


class Kept:
    """What workers find: of image i that another process has put, or None."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if (found := self.cache.get(i)) is not None:
            return i, found.copy(), os.getpid()
        self.cache.put(i, noise(i, 3 + i, 5, 1 + i % 3))
        return i, None, os.getpid()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
def test_forked_processes_fill_and_read_one_room():
    cache = ImageCache(10**5).for_images(64)
    loader = DataLoader(Kept(cache), None, num_workers=4)
    first, second = list(loader), list(loader)
    assert len({process for _, _, process in first + second}) == 8
    assert [i for i, _, _ in first] == list(range(64))
    assert {found is None for _, found, _ in first} == {True}
    for i, found, _ in second:
        assert np.array_equal(found, noise(i, 3 + i, 5, 1 + i % 3))
        assert np.array_equal(found, cache.get(i))


@pytest.fixture
def files(tmp_path):
    """JPEG and PNG files, small and turned ones; the last is decoded at a fraction."""
    photo, exif = Image.fromarray(load_sample_image("china.jpg")), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sizes = ((90, 70), (60, 44), (70, 50), (50, 60), (88, 90), (79, 80), (61, 70), (301, 200))
    paths = [tmp_path / f"{i}.{'png' if i % 3 == 0 else 'jpg'}" for i in range(8)]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        photo.resize(size).save(path, exif=exif if i in (0, 1, 2, 7) else Image.Exif())
    return ImageSet(torch.arange(8), paths=tuple(paths))


def epochs(images, cache, kind, num_workers):
    """The batches of two epochs, and after each of them those of an evaluation."""
    options = {"batch_size": 4, "device": CPU, "num_workers": num_workers, "cache": cache}
    augmentation = Augmentation(kind, SIZE, 0.2, flip=True)
    source = TrainStream(images, augmentation, seed=3, shard=Shard(), **options)
    evaluation, batches = EvalStream(images, SIZE, **options), []
    steps = source.steps(0, 4)
    for _ in range(2):
        batches += [source.prepare(*micro) for micro in islice(steps, 2)]
        batches += list(evaluation)
    kept = [i for i in range(8) if cache and source.files.cache.get(i) is not None]
    return batches, kept


@pytest.mark.parametrize("kind", ["crop", "resize_crop"])
def test_batches_are_the_same_bits_with_and_without_kept_images(kind, files, monkeypatch):
    """For any number of workers, in a room for all or some; what is kept is decoded once."""
    decoded = []
    spy = lambda path, *args: decoded.append(path) or decode(path, *args)  # noqa: E731
    monkeypatch.setattr(loading, "decode", spy)
    recipe = Pixels(resize="smaller_side", crop_fraction=0.8) if kind == "resize_crop" else Pixels()
    images = replace(files, decoding=Decoding(pixels=recipe))
    plain, _ = epochs(images, None, kind, 0)
    assert all(decoded.count(path) == 4 for path in images.paths)
    for size, num_workers in ((10**6, 0), (10**6, 3), (40000, 0), (40000, 3)):
        decoded.clear()
        cache = ImageCache(size)
        found, kept = epochs(images, cache, kind, num_workers)
        for batch, wanted in zip(found, plain, strict=True):
            assert all(map(torch.equal, batch, wanted))
        assert 7 not in kept and (kept == list(range(7)) if size == 10**6 else 0 < len(kept) < 7)
        if num_workers == 0 and size == 10**6:  # by training and by evaluation
            assert [decoded.count(path) for path in images.paths] == [2] * 7 + [4]


def test_a_single_epoch_keeps_nothing(files):
    """To fill the memory takes time, which only a second epoch gains back."""
    cache = ImageCache(10**6)
    options = {"seed": 3, "shard": Shard(), "device": CPU, "cache": cache, "batch_size": 4}
    source = TrainStream(files, Augmentation("crop", SIZE), **options)
    assert len(list(source.steps(0, 2))) == 2 and cache.used.value == 0
    assert len(list(source.steps(0, 3))) == 3 and cache.used.value > 0


def test_a_large_photograph_is_not_kept_after_a_small_crop(files):
    """Which is decoded whole, while the whole image is decoded at a fraction."""
    crops = Augmentation("crop", SIZE, min_area=0.0)
    small, whole = ([area] + [0.5] * (DRAWS - 1) for area in (0.01, 0.999))
    plain = Files(files.paths, crops, Decoding())
    cached = replace(plain, cache=ImageCache(10**6).for_images(8))
    for draws in (small, whole):
        assert np.array_equal(cached[7, draws], plain[7, draws])
    assert cached.cache.get(7) is None


def test_exact_decoding_keeps_large_images_too(files):
    images = replace(files, decoding=Decoding(exact=True))
    found, kept = epochs(images, ImageCache(10**6), "crop", 0)
    assert kept == list(range(8))
    plain, _ = epochs(images, None, "crop", 0)
    for batch, wanted in zip(found, plain, strict=True):
        assert all(map(torch.equal, batch, wanted))


def test_the_size_of_the_room(monkeypatch):
    monkeypatch.setattr(image_cache, "free_memory", lambda: 8 * 10**6)  # bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert len(new_cache(cache_size("auto")).room) == 10**6
    assert len(new_cache(cache_size("0.001")).room) == 2**30 // 2000
    for size in ("0.5", "1e300"):  # at most what is free
        assert len(new_cache(cache_size(size)).room) == 4 * 10**6
    assert new_cache(cache_size("off")) is new_cache(cache_size("0")) is None
    monkeypatch.setattr(image_cache, "free_memory", lambda: 2**60)  # which mmap refuses
    assert new_cache("auto") is None
    monkeypatch.setattr(image_cache, "free_memory", lambda: 0)
    assert new_cache("auto") is None
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    assert new_cache(1.0) is None


FLAGS = words(
    "--dataset folder --data_dir d --model_type ViT-Ti_16 --img_size 32 --pretrained_dir none "
    "--num_steps 4 --warmup_steps 2 --train_batch_size 8 --learning_rate 0.1 --eval_every 4"
)


@pytest.fixture
def folder(workdir):
    for i in range(8):
        write_image(workdir / f"d/train/{'ab'[i % 2]}/{i}.{'png' if i < 4 else 'jpg'}", (90, 70))
        write_image(workdir / f"d/val/{'ab'[i % 2]}/{i}.jpg", (90, 70))


def ends_equal(names):
    """Whether the runs have learned, and the same to the last bit."""
    first, *others = (load_torch(f"output/{name}_checkpoint.bin")["model"] for name in names)
    assert first["head.bias"].abs().max() > 1e-3
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_run_ends_in_the_same_bits(folder, monkeypatch):
    made = []
    spy = lambda size: made.append(new_cache(size)) or made[-1]  # noqa: E731
    monkeypatch.setattr(train, "new_cache", spy)
    for cache in ("off", "1", "auto"):
        argv = ["--name", cache, "--cache", cache, "--num_workers", 2]
        assert run_command(train, *FLAGS, *argv) == 0
    assert ends_equal(["off", "1", "auto"])
    assert made[0] is None and all(each.used.value >= 16 * 90 * 70 * 3 for each in made[1:])


TWO_RUNS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from utils import dist_util
for cache, os.environ["MASTER_PORT"] in zip(("off", "1"), sys.argv[1:]):
    train.main([*{FLAGS!r}, "--name", cache, "--cache", cache, "--num_workers", "0"])
    dist_util.shutdown()
"""


def test_two_processes_end_in_the_same_bits(folder):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    command = [sys.executable, "-c", TWO_RUNS, *(str(each.getsockname()[1]) for each in sockets)]
    for each in sockets:
        each.close()
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [os.environ | together | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [subprocess.Popen(command, env=env, stderr=PIPE, text=True) for env in ranks]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert ends_equal(["off", "1"])
