"""The data sets: CIFAR, digits, those of torchvision and Hugging Face, and the user's own images.

Images of one small size are decoded once and held in memory as uint8; others stay files, which
the workers of a stream read. n images, C channels, h w size in pixels.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.labels import synset_names
from utils.cifar import archive_of, read_cifar
from utils.class_names import match_classes, natural_key
from utils.image_index import ImageReader
from utils.image_set import ImageSet
from utils.images import Decoding
from utils.public_sets import PUBLIC, public_source
from utils.seeds import named_seed
from utils.sources import Source, folder_roots, folder_source, table_source

OWN = ("folder", "imagenet", "csv")  # the names of data sets that are never downloaded
NAMES = ("cifar10", "cifar100", "digits", *OWN, *PUBLIC, "parquet")  # and hf:NAME


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
    folders: Mapping[str, str] = field(default_factory=dict)  # split -> its folder

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
        sizes = [f"{len(x)} {name}{self.folders.get(name, '')}" for name, x in self.splits.items()]
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
    def about(self) -> dict:
        """What a saved run keeps of its data."""
        pixels = asdict(self.train.decoding.pixels)
        return {"data": self.fingerprint, "unreadable": self.unreadable, "pixels": pixels}

    @property
    def unreadable(self) -> dict[str, list[int]]:
        """The positions of the unreadable images in each split."""
        masks = {name: x.unreadable for name, x in self.splits.items() if x.unreadable is not None}
        return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}

    def leave_out(self, positions: Mapping[str, list[int]]) -> "Data":
        """The data with more `unreadable` images, of an earlier session. Raises UserError."""
        splits = self.splits
        for name in positions.keys() & splits.keys():  # else it is other data, which is refused
            images = splits[name]
            splits[name] = images.without([i for i in positions[name] if i < len(images)])
        val, test = splits.get(self.val_split), None if self.test is None else splits["test"]
        return replace(self, train=splits["train"], val=val, test=test)


@dataclass(frozen=True)
class Options:
    """How a data set is read."""

    val_fraction: float = 0.0  # of every class of the training images: the new validation set
    seed: int = 0  # which draws it
    decoding: Decoding = field(default_factory=Decoding)
    skip_unreadable: bool = False  # leave out damaged files instead of refusing them
    unreadable: Mapping[str, list[int]] = field(default_factory=dict)  # as Data has it
    offline: bool = False  # download nothing
    progress: bool = False  # show bars
    log: Callable[[str], None] = print


def load_data(name: str, data_dir: str | Path, **options) -> Data:
    """The data set `name`, one of NAMES or hf:NAME. Raises UserError.

    `options` are the fields of Options.
    """
    options, data_dir = Options(**options), Path(data_dir)
    if name in ARRAYS:
        data = ARRAYS[name](data_dir, options)
    else:
        source = find_source(name, data_dir, options)
        data = make_data(source, read_source(source, data_dir, options))
    if options.val_fraction:
        if data.test is not None:
            where = data.folders.get(data.val_split, "")
            options.log(f"note: the data's own validation images{where} are not used")
        test = data.val if data.test is None else data.test
        held = data.val_split if data.test is None else "test"
        own = {"train": "train", "val": "train", "test": held}
        folders = {part: data.folders.get(name, "") for part, name in own.items()}
        indices = split(data.train.labels, options.val_fraction, options.seed, data.classes)
        train, val = map(data.train.subset, indices)
        data = replace(data, train=train, val=val, test=test, val_split="val", folders=folders)
    elif data.val is None:
        advice = "hold out training images, with --val_fraction 0.1 for example"
        raise UserError(f"{data.source} has neither validation nor test images: {advice}")
    data = data.leave_out(options.unreadable)
    _ = data.train.replacements  # raises UserError for a class without a readable image
    return data


def check_source(name: str, data_dir: str | Path, val_fraction=0.0, training=True) -> None:
    """Raise UserError for what is wrong with `data_dir`, without listing or downloading images."""
    data_dir = Path(data_dir)
    if name.startswith("cifar"):
        archive_of(name, data_dir)
    elif name == "csv":
        find_source(name, data_dir, Options(val_fraction), training)
    elif name in OWN:
        training = training or val_fraction > 0
        folder_roots(image_root(name, data_dir), training, not val_fraction)


def image_root(name: str, data_dir: Path) -> Path:
    """The folder of the splits. ImageNet's archives unpack it into deeper ones."""
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder")
    deeper = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if name == "imagenet" else ()
    return next(filter(Path.is_dir, (data_dir / path for path in deeper)), data_dir)


def find_source(name: str, data_dir: Path, options: Options, training: bool = True) -> Source:
    """The files of a data set that is not an array; for an evaluation those of one split."""
    if name not in OWN:
        return public_source(name, data_dir, options.log, options.offline)
    training = training or options.val_fraction > 0
    if name == "csv":
        if not data_dir.is_file():
            raise UserError(f"{data_dir}: no such file: --data_dir is the table")
        return table_source(data_dir, training, natural_key)
    source = folder_source(image_root(name, data_dir), training, not options.val_fraction)
    if name == "folder" or not training:  # an evaluation finds classes by their WordNet ids
        return source
    names = dict(zip(source.classes, synset_names(source.classes), strict=True))
    splits = {
        part: each._replace(labels=[names[label] for label in each.labels])
        for part, each in source.splits.items()
    }
    return source._replace(splits=splits, classes=tuple(names.values()))


def read_source(source: Source, data_dir: Path, options: Options) -> dict[str, ImageSet]:
    """The images of each split."""
    how = (options.decoding, options.skip_unreadable, options.log, options.progress)
    reader = ImageReader(data_dir, *how, left_out=source.left_out)
    place = {name: label for label, name in enumerate(source.classes)}
    splits = {}
    if "train" in source.splits and len(place) < 2:
        raise UserError(f"{source.name} has one class only: training needs two or more")
    for name, (files, labels, _) in source.splits.items():
        if unknown := set(labels) - place.keys():
            lacks = f"the training images lack the class {min(unknown)!r} of the {name} images"
            raise UserError(f"{source.name}: {lacks}")
        images = reader.read(
            f"{source.name} {name}", files, [place[x] for x in labels], source.listed
        )
        if name == "train" and (lost := set(range(len(place))) - set(images.labels.tolist())):
            lost = source.classes[min(lost)]
            raise UserError(f"{source.name}: the class {lost!r} has no training images")
        splits[name] = images
    reader.finish()
    if source.unused:
        names = ", ".join(f"{name}/" for name in source.unused)
        options.log(f"note: {names} left out: no split, or without class folders")
    return splits


def make_data(source: Source, splits: Mapping[str, ImageSet]) -> Data:
    val_split = "val" if "val" in splits else "test"
    test = splits["test"] if len(splits) == 3 else None
    folders = {name: f" ({each.folder})" for name, each in source.splits.items() if each.folder}
    val = splits.get(val_split)
    return Data(splits["train"], val, test, source.classes, source.name, val_split, folders)


def load_evaluation(
    name: str, data_dir: str | Path, classes: tuple[str, ...], *, named: bool, **options
) -> EvaluationData:
    """The test images, or the validation images if there are none, for a model of `classes`.

    Of folders and tables only these are read, and they need not have all classes. Labels are the
    model's: `match_classes` finds them. `options` are the fields of Options. Raises UserError.
    """
    how, data_dir = Options(**options), Path(data_dir)
    if name not in OWN or how.val_fraction:
        images, part, origin, found = load_data(name, data_dir, **options).final()
    else:
        source = find_source(name, data_dir, how, training=False)
        [(part, images)] = read_source(source, data_dir, how).items()
        images, origin, found = images.readable(), source.name, source.classes
    order, classes = match_classes(origin, found, classes, named, how.log)
    return EvaluationData(replace(images, labels=order[images.labels]), part, origin, classes)


def split(
    labels: Tensor, fraction: float, seed: int, classes: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
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


ARRAYS: dict[str, Callable[[Path, Options], Data]] = {
    "cifar10": partial(_read_cifar, name="cifar10"),
    "cifar100": partial(_read_cifar, name="cifar100"),
    "digits": _read_digits,
}
