"""The data sets: CIFAR, digits, those of torchvision and Hugging Face, and the user's own images.

Images of one small size are decoded once and held in memory as uint8; others stay files, which
the workers of a stream read. n images, C channels, h w size in pixels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from utils.cifar import archive_of, read_cifar
from utils.class_names import match_classes
from utils.dataset import Data, EvaluationData, Options
from utils.image_index import ImageReader
from utils.images import Decoding
from utils.own_images import (
    find_evaluation,
    find_splits,
    image_root,
    make_data,
    read_folder,
    read_folder_evaluation,
    read_table_data,
    read_table_evaluation,
)
from utils.public_sets import PUBLIC, read_public
from utils.seeds import named_seed
from utils.stream import ImageSet


def load_data(name: str, data_dir: str | Path, **options) -> Data:
    """The data set `name`, a key of DATASETS or hf:NAME. Raises UserError.

    `options` are the fields of Options.
    """
    options = Options(**options)
    read = DATASETS.get(name) or partial(_read_public, name=name)
    data = read(Path(data_dir), options)
    counts = data.train.labels.bincount(minlength=len(data.classes)).tolist()
    if 0 in counts:
        name = data.classes[counts.index(0)]
        raise UserError(f"{data.source}: the class {name!r} has no training images")
    if options.val_fraction:
        if data.test is not None:
            where = data.places.get(data.val_split, "")
            options.log(f"note: --val_fraction: the own validation images{where} are not used")
        test = data.val if data.test is None else data.test
        places = data.places | {"val": data.places.get("train", "")}
        indices = split(data.train.labels, options.val_fraction, options.seed, data.classes)
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
            find_splits(image_root(name, data_dir), val_fraction)
        else:
            find_evaluation(image_root(name, data_dir))


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
        read = read_table_evaluation if name == "csv" else read_folder_evaluation
        images, split_name, source, found = read(image_root(name, Path(data_dir)), how)
    order, classes = match_classes(source, found, classes, named, how.log)
    images = replace(images.readable(), labels=order[images.readable().labels])
    return EvaluationData(images, split_name, source, classes)


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


def _read_public(data_dir: Path, options: Options, *, name: str) -> Data:
    found = read_public(name, data_dir, options.log, options.offline)
    reader = ImageReader(data_dir, options)
    splits = {part: reader.read(f"{name}/{part}", *split) for part, split in found.splits.items()}
    return make_data(splits, found.classes, found.source)


DATASETS: dict[str, Callable[..., Data]] = {
    "cifar10": partial(_read_cifar, name="cifar10"),
    "cifar100": partial(_read_cifar, name="cifar100"),
    "digits": _read_digits,
    "folder": read_folder,
    "imagenet": partial(read_folder, name="imagenet"),
    "csv": read_table_data,
    **{name: partial(_read_public, name=name) for name in (*PUBLIC, "parquet")},
}
