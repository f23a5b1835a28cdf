"""The table `photographs` of throughput.py: JPEG files to pixels, ours beside timm and others.

Per core: one thread, CPU seconds of the process. For all cores: `--workers` processes, by the
clock. Every way takes its turn in every round; a ratio is the median of its rounds.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from utils.augment import DRAWS, Augmentation
from utils.images import Decoding
from utils.loading import Files

SIZES = {"500x375": 24, "4000x3000": 4}  # size of the files: how many of them
# Kind -> (width, height) as stored, Pillow's mode, options of its JPEG writer.
OTHERS = {
    "100 px": ((100, 75), "RGB", {}),
    "portrait by EXIF": ((4000, 3000), "RGB", {"exif": 6}),
    "panorama": ((8000, 1500), "RGB", {}),
    "progressive": ((2000, 1500), "RGB", {"progressive": True}),
    "without subsampling": ((2000, 1500), "RGB", {"subsampling": 0}),
    "grey": ((2000, 1500), "L", {}),
    "CMYK": ((2000, 1500), "CMYK", {}),
    "50 megapixels": ((8660, 5774), "RGB", {}),
}
REFERENCE = "Pillow RandomResizedCrop"
AREA, HALF = (0.05, 1.0), [0.5] * 3


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """JPEG files of `size` (width, height), made from parts of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    paths = [folder / f"{size[0]}-{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        part = photos[i % 2].crop((i, i, i + 560, i + 400))
        part.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def write_others(folder: Path) -> dict[str, Path]:
    """A file of each kind of OTHERS."""
    from sklearn.datasets import load_sample_image

    photo, paths = Image.fromarray(load_sample_image("china.jpg")), {}
    for kind, (size, mode, options) in OTHERS.items():
        if turn := options.get("exif"):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = turn
            options = {"exif": exif}
        paths[kind] = folder / f"{kind}.jpg"
        picture = photo.resize(size, Image.Resampling.BICUBIC).convert(mode)
        picture.save(paths[kind], quality=90, **options)
    return paths


class Ours:
    """What a worker of ours does with a file; pixels are normalised on the device."""

    def __init__(self, side: int, training: bool):
        self.crops, self.training = (
            Augmentation("crop" if training else "none", (side, side)),
            training,
        )

    def __call__(self, path: Path):
        draws = torch.rand(DRAWS).tolist() if self.training else None
        return Files([path], self.crops, Decoding())[0, draws]


class WithPillow:
    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, path: Path):
        with Image.open(path) as image:
            return self.transform(image.convert("RGB"))


class WithTorchvision:
    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, path: Path):
        return self.transform(decode_image(str(path), ImageReadMode.RGB))


def ways(side: int) -> dict[str, Callable]:
    """Name -> from a path to what a model or its device takes, of `side` pixels."""
    crop = transforms.RandomResizedCrop(side, AREA)
    v1 = [crop, transforms.ToTensor(), transforms.Normalize(HALF, HALF)]
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)]
    found = {
        "ours, training": Ours(side, True),
        "ours, evaluation": Ours(side, False),
        REFERENCE: WithPillow(transforms.Compose([crop, transforms.PILToTensor()])),
        "torchvision v1": WithPillow(transforms.Compose(v1)),
        "torchvision v2": WithTorchvision(v2.Compose([v2.RandomResizedCrop(side, AREA), *scaled])),
    }
    try:
        from timm.data import create_transform
    except ImportError:
        return found
    plain = {"scale": AREA, "hflip": 0.0, "color_jitter": None, "interpolation": "bilinear"}
    found["timm, training"] = WithPillow(create_transform(side, is_training=True, **plain))
    found["timm, evaluation"] = WithPillow(create_transform(side, interpolation="bilinear"))
    return found


class Photographs:
    """A data set of files, for a DataLoader."""

    def __init__(self, paths: list[Path], way: Callable):
        self.paths, self.way = paths, way

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.way(self.paths[index])


def seconds_per_core(paths: list[Path], way: Callable) -> float:
    """CPU seconds of one image."""
    start = time.process_time()
    for path in paths:
        way(path)
    return (time.process_time() - start) / len(paths)


def seconds_of_all(paths: list[Path], way: Callable, workers: int) -> float:
    """Seconds of one image with `workers` processes; their start and first batches not counted."""
    images = Photographs(paths * 4 * workers, way)
    batches = iter(DataLoader(images, len(paths), num_workers=workers))
    for _ in range(workers):
        next(batches)
    start = time.perf_counter()
    count = sum(map(len, batches))
    return (time.perf_counter() - start) / count


def measure_others(options: Namespace, log: Callable[[str], None]) -> dict[str, dict]:
    """A table of OTHERS: evaluation, and how far its pixels are from those of Pillow's resize."""
    size, ours, table = (options.img_size,) * 2, Ours(options.img_size, False), {}
    log("\n| other photographs, one core | images/s | of Pillow | mean, largest difference |")
    log("|---|---|---|---|")

    def pillow(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(image.resize(size, Image.Resampling.BILINEAR))

    with tempfile.TemporaryDirectory() as folder:
        for kind, path in write_others(Path(folder)).items():
            difference = np.abs(ours(path).transpose(1, 2, 0) - pillow(path).astype(float))
            record = {"mean": difference.mean(), "largest": difference.max()}
            turns = range(options.rounds)
            pairs = [[seconds_per_core([path], way) for way in (ours, pillow)] for _ in turns]
            record["ratio"] = statistics.median(theirs / own for own, theirs in pairs)
            record["images_per_second"] = 1 / statistics.median(own for own, _ in pairs)
            table[kind] = record
            line = "| {} | {images_per_second:.1f} | {ratio:.2f} x | {mean:.2f}, {largest:.0f} |"
            log(line.format(kind, **record))
    return {"other photographs": table}


def measure(options: Namespace, log: Callable[[str], None]) -> dict[str, dict]:
    """Measure and print a table of each of SIZES; returns title -> name -> its record."""
    torch.set_num_threads(1)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, count in SIZES.items():
            paths = write_photographs(Path(folder), tuple(map(int, size.split("x"))), count)
            for title, measured in (
                (f"photographs {size}, one core", seconds_per_core),
                (f"photographs {size}, {options.workers} workers", seconds_of_all),
            ):
                more = (options.workers,) if measured is seconds_of_all else ()
                if more == (0,):
                    continue
                seconds = {name: [] for name in ways(options.img_size)}
                for turn in range(1 + options.rounds):  # the first warms up
                    for name, way in ways(options.img_size).items():
                        found = measured(paths, way, *more)
                        seconds[name] += [found] * (turn > 0)
                tables[title] = {}
                log(f"\n| {title} | images/s | of {REFERENCE} |\n|---|---|---|")
                for name, own in seconds.items():
                    pairs = zip(seconds[REFERENCE], own, strict=True)
                    ratio = statistics.median(reference / each for reference, each in pairs)
                    speed = 1 / statistics.median(own)
                    tables[title][name] = {"images_per_second": speed, "ratio": ratio}
                    log(f"| {name} | {speed:.1f} | {ratio:.2f} x |")
    return tables | measure_others(options, log)
