"""Public data sets by name: torchvision's, Hugging Face's, and parquet files, all as Items.

Labels are read without decoding an image. Nothing is unpickled: torchvision reads text, raw bytes
and .mat files of a known MD5 for these sets; `datasets` refuses pickles and runs no scripts.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from PIL import Image

from models.errors import UserError


class Item(NamedTuple):
    """One image of a map-style data set of (image, label), read when it is asked for."""

    dataset: Sequence  # dataset[index] is (PIL image, label)
    index: int
    name: str  # SPLIT/INDEX
    set_name: str  # of the data set

    def open(self) -> Image.Image:
        return self.dataset[self.index][0]

    def __str__(self) -> str:
        return f"{self.set_name} {self.name}"


class PublicSplit(NamedTuple):
    items: tuple[Item, ...]
    labels: list[int]


class PublicSet(NamedTuple):
    splits: dict[str, PublicSplit]  # "train", and the official "val" and "test" that there are
    classes: tuple[str, ...]
    source: str


def read_public(
    name: str, data_dir: Path, log: Callable[[str], None], offline: bool = False
) -> PublicSet:
    """Read a set of PUBLIC, "hf:NAME", "hf:NAME:CONFIG" or "parquet". Raises UserError.

    Sets of PUBLIC are downloaded into `data_dir` unless `offline`, those of the hub into its own
    cache. "parquet" reads `data_dir`: a file, or a folder of files whose names say the split.
    """
    read = _read_torchvision if name in PUBLIC else _read_hugging_face
    return read(name, data_dir, log, offline)


def _split(set_name: str, split: str, dataset: Sequence, labels: Sequence) -> PublicSplit:
    """The images whose label is not None."""
    labels = {i: int(label) for i, label in enumerate(labels) if label is not None}
    items = (Item(dataset, i, f"{split}/{i}", set_name) for i in labels)
    return PublicSplit(tuple(items), list(labels.values()))


# --------------------------------------------------------------------------------- torchvision


class Row(NamedTuple):
    dataset: str  # torchvision's class
    folder: str  # of its files, in `data_dir`
    splits: str  # the class's names of training, validation and test images
    classes: Sequence[str] = ()  # else the attribute `classes`


OBJECTS = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
PUBLIC = {  # torchvision's defaults are DTD's partition 1, and variants as classes of aircraft
    "flowers102": Row("Flowers102", "flowers-102", "train val test"),
    "oxford_iiit_pet": Row("OxfordIIITPet", "oxford-iiit-pet", "trainval test"),
    "food101": Row("Food101", "food-101", "train test"),
    "dtd": Row("DTD", "dtd", "train val test"),
    "eurosat": Row("EuroSAT", "eurosat", ""),  # one set of images
    "svhn": Row("SVHN", "", "train test", "0123456789"),
    "stl10": Row("STL10", "stl10_binary", "train test", OBJECTS),
    "fgvc_aircraft": Row("FGVCAircraft", "fgvc-aircraft-2013b", "train val test"),
}
AIRCRAFT_MD5 = "d4acdd33327262359767eeaa97a4f732"  # torchvision checks all others


def _read_torchvision(name: str, data_dir: Path, log: Callable, offline: bool) -> PublicSet:
    folder = data_dir / PUBLIC[name].folder
    part = data_dir / f".{name}.part"  # is there while files arrive
    try:
        if not part.exists() and (found := _load(name, data_dir)):
            return found
        if offline:
            raise UserError(f"{folder} does not hold all of {name}, and downloads are off")
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{name}.lock"):  # other processes find what arrives here
            found = _load(name, data_dir)
            if found and part.exists() and folder != data_dir:  # SVHN's files have an MD5 each
                raise UserError(f"{folder} is half unpacked: delete it, and try again")
            if not found:
                log(f"downloading {name} to {folder}")
                part.touch()
                found = _load(name, data_dir, download=True)
            part.unlink(missing_ok=True)
            return found
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(f"{name} in {folder}: {' '.join(str(error).split())}") from error


def _load(name: str, data_dir: Path, download=False) -> PublicSet | None:
    """The set, or None if it has to be downloaded."""
    from torchvision import datasets

    row, splits = PUBLIC[name], {}
    dataset = getattr(datasets, row.dataset)
    if download and name == "fgvc_aircraft":
        datasets.utils.download_url(dataset._URL, data_dir, md5=AIRCRAFT_MD5)
    for official in row.splits.split() or [None]:
        how = {"split": official} if official else {}
        try:
            found = dataset(data_dir, download=download, **how)
        except RuntimeError:  # torchvision's: a file is missing or has another MD5
            if download:
                raise
            return None
        split = official if official in ("val", "test") else "train"
        labels = next(k for k in ("_labels", "labels", "targets") if hasattr(found, k))
        splits[split] = _split(name, split, found, getattr(found, labels))
    source = f"{name} in {data_dir / row.folder}"
    return PublicSet(splits, tuple(row.classes or found.classes), source)


# ------------------------------------------------------------------- Hugging Face's `datasets`

SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
SPLITS |= {"test": "test"}
IMAGES = ("image", "img", "jpg", "png")  # names of columns: the first of several is taken
LABELS = ("label", "labels", "fine_label", "fine_labels", "class", "cls", "target")
UNLABELLED = {None, -1}


@dataclass(frozen=True)
class _Table:
    """Rows as a map-style data set of (image, label); labels are those of the file."""

    rows: Sequence[dict]  # rows[index][image] is {"bytes": ..., "path": ...}, one of them empty
    image: str
    label: str

    def __getitem__(self, index: int) -> tuple[Image.Image, int | str | None]:
        row = self.rows[index]
        file = row[self.image]  # `datasets` would also fetch a path that is an address
        source = io.BytesIO(file["bytes"]) if file["bytes"] else file["path"]
        return Image.open(source), row[self.label]


def _read_hugging_face(name: str, data_dir: Path, log: Callable, offline: bool) -> PublicSet:
    tables = _load_tables(name, data_dir, log, offline)
    name = str(data_dir) if name == "parquet" else name
    from datasets import Image

    train, splits = tables.get("train", next(iter(tables.values()))), {}
    image, label = _columns(name, train.features)
    classes = getattr(train.features[label], "names", None)
    values = range(len(classes)) if classes else sorted(set(train[label][:]) - UNLABELLED)
    place = {value: index for index, value in enumerate(values)}
    for official, table in tables.items():
        split, found = SPLITS.get(official), table[label][:]
        if split is None or split in splits or not set(found) - UNLABELLED:
            log(f"note: {name}'s split {official} is left out: it has no labels or no use")
            continue
        if unknown := set(found) - place.keys() - UNLABELLED:
            raise UserError(f"{name}: {official} has the class {unknown.pop()!r}, train has not")
        labels = [place.get(value) for value in found]
        rows = table.select_columns([image, label]).cast_column(image, Image(decode=False))
        splits[split] = _split(name, split, _Table(rows, image, label), labels)
    if "train" not in splits:
        raise UserError(f"{name} has no labelled split called train, but {', '.join(tables)}")
    config = train.info.config_name
    source = name if config in (None, "default") else f"{name} ({config})"
    return PublicSet(splits, tuple(classes or map(str, values)), source)


def _load_tables(name: str, data_dir: Path, log: Callable, offline: bool) -> dict:
    """{split: datasets.Dataset}"""
    try:
        from datasets import config, load_dataset
        from huggingface_hub import constants
    except ImportError as error:
        advice = "pip install -r requirements-datasets.txt"
        raise UserError(f"{name} needs the package datasets: {advice}") from error
    if offline:  # as HF_HUB_OFFLINE=1 would, which is read on import
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    path, _, subset = name.removeprefix("hf:").partition(":")
    files = str(data_dir) if name == "parquet" and data_dir.is_file() else None
    if name == "parquet" and not files:
        path = str(data_dir.absolute())  # of a folder's files it takes those of one kind
    elif not (files or offline or Path(path).is_dir()):
        log(f"downloading {path} from huggingface.co, unless it is in the cache")
    try:
        return load_dataset(path, subset or None, data_files=files)
    except Exception as error:  # of the many libraries below it
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{data_dir if files else path}: {reason}") from error


def _columns(name: str, features: dict) -> tuple[str, str]:
    """The column of images and that of labels. Raises UserError."""
    from datasets import ClassLabel, Image

    def pick(kind: type, names: tuple[str, ...], plain: str) -> str | None:
        found = [each for each in features if isinstance(features[each], kind)]
        found = found or [e for e in names if re.search(plain, str(features.get(e)))]
        return next(
            (each for each in names if each in found), found[0] if len(found) == 1 else None
        )

    image = pick(Image, IMAGES, r"^(\{.*)?Value\('binary'\)")  # files as other programs write them
    label = pick(ClassLabel, LABELS, r"^Value\('(u?int|string|large_string)")
    if image and label:
        return image, label
    need = "a column called image, and one of classes called label"
    raise UserError(f"{name} needs {need}; its columns are {', '.join(features)}")
