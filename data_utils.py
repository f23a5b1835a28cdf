"""The data sets: CIFAR, handwritten digits, and the user's own folders of images.

Images of one small size are decoded once and held in memory as uint8; others stay files, which
the workers of a stream read. n images, C channels, h w size in pixels.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.errors import UserError
from utils.cifar import archive_of, read_cifar
from utils.cli import printable
from utils.images import SMALL_SIDE, image_files, read_image, read_size, to_tensor
from utils.seeds import named_seed
from utils.stream import ImageSet

MEMORY_LIMIT = 2**31  # bytes of decoded images that may be held in memory


class EvaluationData(NamedTuple):
    """Images, the name of their split, where they come from, and the class names."""

    images: ImageSet
    split: str
    source: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """The splits of a data set."""

    train: ImageSet
    val: ImageSet | None  # selects the best weights; None only while `load_data` has to draw it
    test: ImageSet | None  # is used once, at the end; without it `val` gives the final result, too
    classes: tuple[str, ...]
    source: str
    val_split: str = "test"  # what `val` is called in results: "val" or "test"

    def final(self) -> EvaluationData:
        """The images of the final result."""
        images, split = (self.val, self.val_split) if self.test is None else (self.test, "test")
        return EvaluationData(images, split, self.source, self.classes)

    @property
    def counts(self) -> str:
        sizes = f"{len(self.train)} train and {len(self.val)} {self.val_split} images"
        return f"{sizes}, {len(self.classes)} classes"

    @property
    def fingerprint(self) -> str:
        """Counts and checksums of images and classes, by which a resumed run knows its data."""
        classes = zlib.crc32("\0".join(self.classes).encode())
        checksums = f"{self.train.checksum} {self.val.checksum} {classes:08x}"
        return f"{self.counts}, checksums {checksums}"


@dataclass(frozen=True)
class Options:
    """How a data set is read."""

    val_fraction: float = 0.0  # of every class of the training images: the new validation set
    seed: int = 0  # which draws it
    channels: int = 3  # of the images: 1, 3 or 4
    skip_unreadable: bool = False  # leave out damaged files instead of refusing them
    offline: bool = False  # download nothing
    progress: bool = False  # show bars
    log: Callable[[str], None] = print


def load_data(name: str, data_dir: str | Path, **options) -> Data:
    """The data set `name` of DATASETS; `options` are the fields of Options. Raises UserError."""
    options = Options(**options)
    data = DATASETS[name](Path(data_dir), options)
    if not options.val_fraction:
        return data
    if data.test is not None:
        options.log(f"note: --val_fraction takes the place of {data_dir}/val, which is not used")
    indices = split(data.train.labels, options.val_fraction, options.seed, data.classes)
    train, val = map(data.train.subset, indices)
    return replace(data, train=train, val=val, test=data.final().images, val_split="val")


def check_source(name: str, data_dir: str | Path, val_fraction=0.0, training=True) -> None:
    """Raise UserError for what is wrong with `data_dir`, without reading or downloading images."""
    data_dir = Path(data_dir)
    if name.startswith("cifar"):
        archive_of(name, data_dir)
    elif name == "folder":
        if not data_dir.is_dir():
            raise UserError(f"{data_dir}: no such folder")
        if training or val_fraction:
            _find_splits(data_dir, val_fraction)
        else:
            _find_evaluation(data_dir)


def load_evaluation(
    name: str, data_dir: str | Path, classes: tuple[str, ...], *, named: bool, **options
) -> EvaluationData:
    """The test images, or the validation images if there are none, for a model of `classes`.

    Of folders only these are read, and they need not have all classes. Labels are the model's: its
    `classes` are found by name, or by the sorted order of names unless they are `named` after the
    training folders. `options` are the fields of Options. Raises UserError.
    """
    how = Options(**options)
    if name != "folder" or how.val_fraction:
        images, split_name, source, found = load_data(name, data_dir, **options).final()
    else:
        root, found = _find_evaluation(Path(data_dir))
        if root == Path(data_dir) and (root / "train").is_dir() and "train" not in classes:
            advice = "give the training's --val_fraction and --seed, or a folder of class folders"
            raise UserError(f"{root} has train/, but neither val/ nor test/: {advice}")
        images, source = _read_class_folders(root, found, how), str(root)
        split_name = "val" if root.name == "val" else "test"
    order, classes = _match_classes(source, found, classes, named, how.log)
    images = replace(images, labels=order[images.labels])
    return EvaluationData(images, split_name, source, classes)


def _match_classes(source: str, found: tuple[str, ...], classes: tuple[str, ...], named: bool, log):
    """(the model's label of each class `found` in the data, the model's class names)"""
    place = {name: label for label, name in enumerate(classes)}
    # Numbers stand for classes without names, and do not mean folders that are called 0, 1, ...
    numbered = not named and classes == tuple(str(i) for i in range(len(classes)))
    if not numbered and place.keys() >= set(found):
        return torch.tensor([place[name] for name in found]), classes
    if not named and len(found) == len(classes):
        log("note: the model's classes are taken to be the data's in sorted order")
        return torch.arange(len(found)), found if numbered else classes
    if numbered:
        raise UserError(f"{source} has {len(found)} classes, the model {len(classes)}, unnamed")
    missing = next(name for name in found if name not in place)
    some = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
    model = f"the model's {len(classes)} classes ({some})"
    raise UserError(f"{source} has the class {missing!r}, which {model} lack")


def split(labels: Tensor, fraction: float, seed: int, classes=()) -> tuple[Tensor, Tensor]:
    """(training, validation) indices, both sorted: `fraction` of each class, at least one image.

    Raises UserError, by the name in `classes`, if a class would be left without training images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "split"))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(len(members) * fraction))
        if count >= len(members):
            name = repr(classes[label]) if classes else int(label)
            what = f"{name} without training images: it has {len(members)} image"
            what += "s" * (len(members) > 1)
            raise UserError(f"--val_fraction {fraction} leaves class {what}")
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _from_arrays(pixels: np.ndarray, labels, channels: int) -> ImageSet:
    """Pixels uint8 (n, h, w, 3) or (n, h, w) as an ImageSet with `channels` channels."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (n, C, h, w)
    if channels == 1 and pixels.shape[1] == 3:  # Pillow's grey
        r, g, b = pixels.int().unbind(1)
        pixels = ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).byte()[:, None]
    elif channels >= 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    if channels == 4:
        pixels = torch.cat([pixels, torch.full_like(pixels[:, :1], 255)], dim=1)
    return ImageSet(torch.as_tensor(labels, dtype=torch.int64), pixels.contiguous())


def _read_digits(data_dir: Path, options: Options) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = _from_arrays(pixels, digits.target, options.channels)
    train, test = split(images.labels, 0.2, seed=0)  # the same test images for every --seed
    source, classes = "scikit-learn's handwritten digits", tuple("0123456789")
    return Data(images.subset(train), images.subset(test), None, classes, source)


def _read_cifar(data_dir: Path, options: Options, *, name: str) -> Data:
    cifar = read_cifar(name, data_dir, options.log, options.offline)
    train, test = (_from_arrays(*half, options.channels) for half in (cifar.train, cifar.test))
    return Data(train, test, None, cifar.classes, cifar.source)


def _read_folder(data_dir: Path, options: Options) -> Data:
    """`train/`, and `val/` or `test/` or both, in `data_dir`, with a folder for each class.

    A `data_dir` without `train/` that holds class folders itself is a training set.
    """
    folders, classes = _find_splits(data_dir, options.val_fraction)
    splits = {name: _read_class_folders(root, classes, options) for name, root in folders.items()}
    val_split = "val" if "val" in splits else "test"
    test = splits["test"] if len(splits) == 3 else None
    return Data(splits["train"], splits.get(val_split), test, classes, str(data_dir), val_split)


def _find_splits(data_dir: Path, val_fraction: float) -> tuple[dict[str, Path], tuple[str, ...]]:
    """({split: its folder of class folders}, classes) for training. Raises UserError."""
    names = [name for name in ("train", "val", "test") if (data_dir / name).is_dir()]
    if names and "train" not in names:
        raise UserError(f"{data_dir} has no train/ folder")
    folders = {"train": data_dir} | {name: data_dir / name for name in names}
    root, classes = folders["train"], class_folders(folders["train"])
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise UserError(f"{root} needs a folder for each of two or more classes; it has {found}")
    if len(folders) == 1 and not val_fraction:
        advice = "hold out training images, with --val_fraction 0.1 for example"
        raise UserError(f"{data_dir} has neither val/ nor test/: {advice}")
    for folder in folders.values():
        if unknown := set(class_folders(folder)) - set(classes):
            raise UserError(f"{folder / min(unknown)} is a class that the training images lack")
    return folders, classes


def _find_evaluation(data_dir: Path) -> tuple[Path, tuple[str, ...]]:
    """(folder, its class folders) to evaluate on: test/, else val/, else `data_dir` itself."""
    for root in (data_dir / "test", data_dir / "val", data_dir):
        if classes := class_folders(root):  # ImageNet's own test/ has no labels, hence none
            return root, classes
    raise UserError(f"{data_dir} holds no class folders")


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders in `root`, sorted, without hidden ones; () if there is no `root`."""
    names = sorted(d.name for d in root.glob("*") if d.is_dir() and not d.name.startswith("."))
    if odd := [name for name in names if name != printable(name)]:  # can't be drawn or saved
        raise UserError(f"{printable(str(root / odd[0]))}: a class needs a name in UTF-8")
    return tuple(names)


def _read_class_folders(root: Path, classes: tuple[str, ...], options: Options) -> ImageSet:
    """The images of all class folders in `root`, in memory if they are small."""
    found = [image_files(root / name) for name in classes]
    paths = tuple(path for files in found for path in files)
    empty = [root / name for name, files in zip(classes, found, strict=True) if not files]
    if not paths or (empty and root.name not in ("val", "test")):
        raise UserError(f"{empty[0] if paths else root} holds no images")
    labels = torch.repeat_interleave(torch.tensor([len(files) for files in found]))
    images = ImageSet(labels, None, paths, options.channels)
    if options.skip_unreadable:
        images = _leave_out_unreadable(images, root, options)
    # Reading headers finds most damaged files, in seconds; only decoding finds all of them.
    sizes = _in_threads(read_size, images.paths, f"check {root}", options)
    sizes = {tuple(sorted(size)) for size in sizes}  # EXIF may swap the sides of any
    side = max(max(size) for size in sizes)
    memory = len(images) * side**2 * images.channels
    if len(sizes) == 1 and side <= SMALL_SIDE and memory < MEMORY_LIMIT:
        decode = partial(read_image, channels=images.channels)
        decoded = _in_threads(decode, images.paths, f"decode {root}", options)
        if len({image.size for image in decoded}) == 1:
            return replace(images, pixels=torch.stack([to_tensor(image) for image in decoded]))
    return images


def _leave_out_unreadable(images: ImageSet, root: Path, options: Options) -> ImageSet:
    """The images that can be decoded; the errors of the others are logged."""

    def error_of(path: Path) -> UserError | None:
        try:
            read_image(path, images.channels)
        except UserError as error:
            return error

    errors = _in_threads(error_of, images.paths, f"decode {root}", options)
    for error in filter(None, errors):
        options.log(f"left out: {error}")
    readable = images.subset(torch.tensor([error is None for error in errors]).nonzero().flatten())
    if len(readable.labels.unique()) < len(images.labels.unique()):
        raise UserError(f"{root} has a class without a single readable image")
    return readable


def _in_threads(work: Callable, paths: list[Path], title: str, options: Options) -> list:
    """[work(path) for path in paths]; Pillow decodes in threads, without the interpreter's lock."""
    with ThreadPoolExecutor() as pool:
        hidden = not options.progress or None  # None: hidden if stderr is no terminal
        results = pool.map(work, paths)
        return list(tqdm(results, desc=title, total=len(paths), unit="file", disable=hidden))


DATASETS: dict[str, Callable[..., Data]] = {
    "cifar10": partial(_read_cifar, name="cifar10"),
    "cifar100": partial(_read_cifar, name="cifar100"),
    "digits": _read_digits,
    "folder": _read_folder,
}
