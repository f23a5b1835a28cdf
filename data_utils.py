"""The data sets: CIFAR, digits, those of torchvision and Hugging Face, and the user's own images.

Images of one small size are decoded once and held in memory as uint8; others stay files, which
the workers of a stream read. n images, C channels, h w size in pixels.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.labels import synset_names
from utils import folders
from utils.cifar import archive_of, read_cifar
from utils.class_names import match_classes, natural_key
from utils.folders import class_folders, split_folders
from utils.image_index import ImageReader
from utils.images import Decoding
from utils.seeds import named_seed
from utils.stream import ImageSet


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
    places: Mapping[str, str] = field(default_factory=dict)  # split -> its folder

    @property
    def splits(self) -> dict[str, ImageSet]:
        found = [("train", self.train), (self.val_split, self.val), ("test", self.test)]
        return {name: images for name, images in found if images is not None}

    def final(self) -> EvaluationData:
        """The images of the final result."""
        name = self.val_split if self.test is None else "test"
        return EvaluationData(self.splits[name].readable(), name, self.source, self.classes)

    @property
    def counts(self) -> str:
        sizes = f"{len(self.train)} train and {len(self.val)} {self.val_split} images"
        return f"{sizes}, {len(self.classes)} classes"

    def __str__(self) -> str:
        sizes = [f"{len(x)} {name}{self.places.get(name, '')}" for name, x in self.splits.items()]
        counts = self.train.labels.bincount(minlength=len(self.classes))
        each = " to ".join(map(str, dict.fromkeys((int(counts.min()), int(counts.max())))))
        first = ", ".join(self.classes[:4]) + ", ..." * (len(self.classes) > 4)
        classes = f"{len(self.classes)} ({first}), {each} training images each"
        depth = self.train.decoding.bit_depth
        bits = "" if depth in (None, 8) else f"; {depth or 'float'}{'-bit' * bool(depth)} pixels"
        return f"{self.source}; images: {', '.join(sizes)}; classes: {classes}{bits}"

    @property
    def fingerprint(self) -> str:
        """Counts and checksums of images and classes, by which a resumed run knows its data."""
        classes = zlib.crc32("\0".join(self.classes).encode())
        checksums = f"{self.train.checksum} {self.val.checksum} {classes:08x}"
        return f"{self.counts}, checksums {checksums}"

    @property
    def unreadable(self) -> dict[str, list[int]]:
        """The places of the unreadable images in each split."""
        masks = {name: x.unreadable for name, x in self.splits.items() if x.unreadable is not None}
        return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}

    def leave_out(self, places: Mapping[str, list[int]]) -> "Data":
        """The data with more `unreadable` images, of an earlier session. Raises UserError."""
        splits = self.splits
        for name, indices in places.items():
            splits[name] = splits[name].without(indices)
        val, test = splits.get(self.val_split), None if self.test is None else splits["test"]
        return replace(self, train=splits["train"], val=val, test=test)


@dataclass(frozen=True)
class Options:
    """How a data set is read."""

    val_fraction: float = 0.0  # of every class of the training images: the new validation set
    seed: int = 0  # which draws it
    decoding: Decoding = field(default_factory=Decoding)
    skip_unreadable: bool = False  # leave out damaged files instead of refusing them
    offline: bool = False  # download nothing
    progress: bool = False  # show bars
    log: Callable[[str], None] = print


def load_data(name: str, data_dir: str | Path, **options) -> Data:
    """The data set `name`; `options` are the fields of Options. Raises UserError."""
    options = Options(**options)
    data = DATASETS[name](Path(data_dir), options)
    if options.val_fraction:
        if data.test is not None:
            where = data.places.get(data.val_split, "")
            options.log(f"note: --val_fraction: the own validation images{where} are not used")
        test = data.val if data.test is None else data.test
        places = data.places | {"val": data.places.get("train", "")}
        indices = split(data.train.labels, options.val_fraction, options.seed)
        train, val = map(data.train.subset, indices)
        data = replace(data, train=train, val=val, test=test, val_split="val", places=places)
    elif data.val is None:
        advice = "hold out training images, with --val_fraction 0.1 for example"
        raise UserError(f"{data.source} has neither validation nor test images: {advice}")
    _ = data.train.stand_ins  # raises UserError for a class without a readable image
    return data


def check_source(name: str, data_dir: str | Path, val_fraction=0.0, training=True) -> None:
    """Raise UserError for what is wrong with `data_dir`, without reading or downloading images."""
    data_dir = Path(data_dir)
    if name.startswith("cifar"):
        archive_of(name, data_dir)
    elif name == "csv" and not data_dir.is_file():
        raise UserError(f"{data_dir}: no such file: --data_dir names the table")
    elif name in ("folder", "imagenet"):
        if not data_dir.is_dir():
            raise UserError(f"{data_dir}: no such folder")
        if training or val_fraction:
            _find_splits(_image_root(name, data_dir), val_fraction)
        else:
            _find_evaluation(_image_root(name, data_dir))


def load_evaluation(
    name: str, data_dir: str | Path, classes: tuple[str, ...], *, named: bool, **options
) -> EvaluationData:
    """The test images, or the validation images if there are none, for a model of `classes`.

    Of folders and tables only these are read, and they need not have all classes. Labels are the
    model's: `match_classes` finds them. `options` are the fields of Options. Raises UserError.
    """
    how = Options(**options)
    if name not in ("folder", "imagenet", "csv") or how.val_fraction:
        images, split_name, source, found = load_data(name, data_dir, **options).final()
    else:
        read = _read_table_evaluation if name == "csv" else _read_folder_evaluation
        images, split_name, source, found = read(_image_root(name, Path(data_dir)), how)
    order, classes = match_classes(source, found, classes, named, how.log)
    images = replace(images.readable(), labels=order[images.readable().labels])
    return EvaluationData(images, split_name, source, classes)


def split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) indices, both sorted: `fraction` of each class, at least one image.

    Raises UserError if a class would be left without training images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "split"))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(len(members) * fraction))
        if count >= len(members):
            what = f"class {int(label)}, which has {len(members)} images, without training images"
            raise UserError(f"--val_fraction {fraction} leaves {what}")
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _from_arrays(pixels: np.ndarray, labels, decoding: Decoding) -> ImageSet:
    """Pixels uint8 (n, h, w, 3) or (n, h, w) as an ImageSet with `decoding.channels` channels."""
    channels = decoding.channels
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (n, C, h, w)
    if channels == 1 and pixels.shape[1] == 3:  # Pillow's grey
        r, g, b = pixels.int().unbind(1)
        pixels = ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).byte()[:, None]
    elif channels >= 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    if channels == 4:
        pixels = torch.cat([pixels, torch.full_like(pixels[:, :1], 255)], dim=1)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return ImageSet(labels, pixels.contiguous(), decoding=decoding)


def _read_digits(data_dir: Path, options: Options) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = _from_arrays(pixels, digits.target, options.decoding)
    train, test = split(images.labels, 0.2, seed=0)  # the same test images for every --seed
    source, classes = "scikit-learn's handwritten digits", tuple("0123456789")
    return Data(images.subset(train), images.subset(test), None, classes, source)


def _read_cifar(data_dir: Path, options: Options, *, name: str) -> Data:
    cifar = read_cifar(name, data_dir, options.log, options.offline)
    train, test = (_from_arrays(*half, options.decoding) for half in (cifar.train, cifar.test))
    return Data(train, test, None, cifar.classes, cifar.source)


def _read_folder(data_dir: Path, options: Options, name: str = "folder") -> Data:
    """`train/`, and `val/` or `test/` or both, in `data_dir`, with a folder for each class.

    A `data_dir` without `train/` that holds class folders itself is a training set.
    """
    data_dir = _image_root(name, data_dir)
    found, classes = _find_splits(data_dir, options.val_fraction)
    reader = ImageReader(data_dir, options)
    splits = {
        part: reader.read_folder(root, classes, complete=part == "train")
        for part, root in found.items()
    }
    reader.finish()
    _note_unused(data_dir, found, options.log)
    places = {part: f" ({root.name}/)" for part, root in found.items() if root != data_dir}
    names = synset_names(classes) if name == "imagenet" else classes
    return _make_data(splits, names, str(data_dir), places)


def _make_data(splits: Mapping[str, ImageSet], classes, source: str, places=None) -> Data:
    val_split = "val" if "val" in splits else "test"
    test = splits["test"] if len(splits) == 3 else None
    val = splits.get(val_split)
    return Data(splits["train"], val, test, tuple(classes), source, val_split, places or {})


def _image_root(name: str, data_dir: Path) -> Path:
    """The folder of the splits: of ImageNet it may lie deeper, as its archives unpack."""
    deeper = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if name == "imagenet" else ()
    return next((data_dir / path for path in deeper if (data_dir / path).is_dir()), data_dir)


def _find_splits(data_dir: Path, val_fraction: float) -> tuple[dict[str, Path], tuple[str, ...]]:
    """({split: its folder of class folders}, classes) for training. Raises UserError."""
    found = split_folders(data_dir)
    if found and "train" not in found:
        raise UserError(f"{data_dir} has no train/ folder")
    root = found.setdefault("train", data_dir)
    classes = class_folders(root)
    if len(classes) < 2:
        what = f"only {classes[0]!r}" if classes else "none"
        raise UserError(f"{root} needs a folder for each of two or more classes; it has {what}")
    if len(found) == 1 and not val_fraction:
        advice = "hold out training images, with --val_fraction 0.1 for example"
        raise UserError(f"{data_dir} has neither val/ nor test/ with class folders: {advice}")
    for folder in found.values():
        if unknown := set(class_folders(folder)) - set(classes):
            raise UserError(f"{folder / min(unknown)} is a class that the training images lack")
    return found, classes


def _note_unused(data_dir: Path, found: Mapping[str, Path], log: Callable[[str], None]) -> None:
    """Name the folders beside the splits, such as a test/ without labels."""
    unused = [d.name for d in folders.sub_folders(data_dir) if d not in found.values()]
    if unused and data_dir not in found.values():
        names = ", ".join(f"{name}/" for name in unused)
        log(f"note: left out, as no split or without class folders: {names} in {data_dir}")


def _find_evaluation(data_dir: Path) -> tuple[Path, str]:
    """(folder of class folders, its split) to evaluate on: test/, else val/, else `data_dir`."""
    found = split_folders(data_dir)
    for name in ("test", "val"):
        if name in found:
            return found[name], name
    if found:
        advice = "give the training's --val_fraction and --seed, or a folder of class folders"
        raise UserError(f"{data_dir} has train/, but neither val/ nor test/: {advice}")
    if not class_folders(data_dir):
        raise UserError(f"{data_dir} holds no class folders")
    return data_dir, folders.SPLIT_OF.get(data_dir.name.lower(), "test")


def _read_folder_evaluation(data_dir: Path, options: Options) -> EvaluationData:
    root, split_name = _find_evaluation(data_dir)
    classes, reader = class_folders(root), ImageReader(data_dir, options)
    images = reader.read_folder(root, classes, complete=False)
    reader.finish()
    return EvaluationData(images, split_name, str(root), classes)


def _read_table(file: Path, options: Options) -> Data:
    """A table with the columns path, label and, unless `val_fraction` draws one, split."""
    rows = folders.read_table(file, labels=True)
    classes = tuple(
        sorted({row.label for row in rows if row.split in (None, "train")}, key=natural_key)
    )
    if len(classes) < 2:
        raise UserError(f"{file} needs training images of two or more classes")
    reader, splits = ImageReader(file, options), {}
    for name in folders.SPLITS:
        if own := [row for row in rows if (row.split or "train") == name]:
            splits[name] = reader.read_rows(file, own, classes)
    reader.finish()
    if "train" not in splits:
        raise UserError(f"{file} has no training images")
    return _make_data(splits, classes, str(file))


def _read_table_evaluation(file: Path, options: Options) -> EvaluationData:
    """The rows of the test split, else of the validation split, else of a table without splits."""
    rows = folders.read_table(file, labels=True)
    found = {row.split for row in rows}
    name = next((name for name in ("test", "val", None) if name in found), None)
    rows = [row for row in rows if row.split == name]
    classes = tuple(sorted({row.label for row in rows}, key=natural_key))
    reader = ImageReader(file, options)
    images = reader.read_rows(file, rows, classes)
    reader.finish()
    return EvaluationData(images, name or "test", str(file), classes)


DATASETS: dict[str, Callable[..., Data]] = {
    "cifar10": partial(_read_cifar, name="cifar10"),
    "cifar100": partial(_read_cifar, name="cifar100"),
    "digits": _read_digits,
    "folder": _read_folder,
    "imagenet": partial(_read_folder, name="imagenet"),
    "csv": _read_table,
}
