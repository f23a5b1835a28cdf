"""Data sets by name: torchvision's, Hugging Face's, and parquet files, each as Items.

Labels are read without decoding an image. Nothing is unpickled: torchvision reads text, raw bytes
and .mat files of a known MD5 for these sets; `datasets` refuses pickles and runs no scripts.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from PIL import Image

from models.errors import UserError
from utils.images import Item
from utils.sources import SPLIT_OF, Source, Split


class Row(NamedTuple):
    dataset: str  # torchvision's class
    folder: str  # of its files, in `data_dir`
    splits: str  # the class's names of training, validation and test images
    classes: Sequence[str] = ()  # else the attribute `classes`


# torchvision's defaults are DTD's partition 1, and variants as classes of aircraft.
OBJECTS = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
PUBLIC = {
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


def public_source(
    name: str, data_dir: Path, log: Callable[[str], None], offline: bool = False
) -> Source:
    """A set of PUBLIC, "hf:NAME", "hf:NAME:CONFIG" or "parquet". Raises UserError.

    Sets of PUBLIC are downloaded into `data_dir` unless `offline`, those of the hub into its own
    cache. "parquet" reads `data_dir`: a file, or a folder of files whose names say the split.
    """
    read = _read_torchvision if name in PUBLIC else _read_hugging_face
    return read(name, data_dir, log, offline)


def _labelled(name: str, split: str, dataset: Sequence, labels: Sequence, classes) -> Split:
    """The images of a map-style data set whose label is not None."""
    labels = {i: classes[label] for i, label in enumerate(labels) if label is not None}
    items = [Item(dataset, i, f"{name} {split}/{i}") for i in labels]
    return Split(items, list(labels.values()))


def _read_torchvision(name: str, data_dir: Path, log: Callable, offline: bool) -> Source:
    folder = data_dir / PUBLIC[name].folder
    try:
        if found := _load(name, data_dir):
            return found
        if offline:
            raise UserError(f"{folder} does not hold all of {name}, and downloads are off")
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{name}.lock"):  # other processes find what arrives here
            if not (found := _load(name, data_dir)):
                log(f"downloading {name} to {folder}")
                found = _load(name, data_dir, download=True)
            return found
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(f"{name} in {folder}: {' '.join(str(error).split())}") from error


def _load(name: str, data_dir: Path, download=False) -> Source | None:
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
        classes = tuple(row.classes or found.classes)
        splits[split] = _labelled(name, split, found, getattr(found, labels), classes)
    return Source(f"{name} in {data_dir / row.folder}", splits, classes)


# ------------------------------------------------------------------- Hugging Face's `datasets`


@dataclass(frozen=True)
class _Table:
    """Rows as a map-style data set of (image, label); labels are those of the file."""

    rows: Sequence[Mapping]  # rows[index][image] is {"bytes": ..., "path": ...}, one of them empty
    image: str
    label: str

    def __getitem__(self, index: int) -> tuple[Image.Image, int | str | None]:
        row = self.rows[index]
        file = row[self.image]  # `datasets` would also fetch a path that is an address
        content = file["bytes"] or Path(file["path"]).read_bytes()
        return Image.open(io.BytesIO(content)), row[self.label]


def _read_hugging_face(name: str, data_dir: Path, log: Callable, offline: bool) -> Source:
    tables = _load_tables(name, data_dir, log, offline)
    from datasets import Image as ImageFeature

    source = str(data_dir) if name == "parquet" else name
    named = {SPLIT_OF.get(official, official): table for official, table in tables.items()}
    if len(named) < len(tables):
        raise UserError(f"{source} has two splits of one kind: {', '.join(tables)}")
    if "train" not in named:
        raise UserError(f"{source} has no split called train, but {', '.join(tables)}")
    image, label = _columns(source, named["train"].features)
    classes = getattr(named["train"].features[label], "names", None)
    values = range(len(classes)) if classes else sorted(set(named["train"][label][:]) - {None, -1})
    classes = tuple(classes or map(str, values))
    undecoded = ImageFeature(decode=False)
    place, splits = {value: index for index, value in enumerate(values)}, {}
    for split, table in named.items():
        found = table[label][:]
        known = set(found) - {None, -1}  # as test splits without labels have it
        if split not in ("train", "val", "test") or not known:
            why = "it is not train, val or test" if known else "it has no labels"
            log(f"note: the split {split} of {source} is left out: {why}")
        elif known - place.keys():
            unknown = min(known - place.keys())
            raise UserError(f"{source}: {split} has the class {unknown!r}, which train lacks")
        else:
            rows = table.select_columns([image, label]).cast_column(image, undecoded)
            labels = [place.get(value) for value in found]
            splits[split] = _labelled(source, split, _Table(rows, image, label), labels, classes)
    if "train" not in splits:
        raise UserError(f"{source}: its split train has no labels")
    return Source(source, splits, classes)


def _load_tables(name: str, data_dir: Path, log: Callable, offline: bool) -> dict:
    """{split: datasets.Dataset}"""
    try:
        from datasets import config, disable_progress_bars, load_dataset
        from huggingface_hub import constants
    except ImportError as error:
        advice = "pip install -r requirements-datasets.txt"
        raise UserError(f"{name} needs the package datasets: {advice}") from error
    if offline:  # as HF_HUB_OFFLINE=1 would, which is read on import
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    if not sys.stderr.isatty():
        disable_progress_bars()
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


def _columns(source: str, features: Mapping) -> tuple[str, str]:
    """The columns of images and of labels: the only ones of their type, or by name."""
    from datasets import ClassLabel, Image, List

    found = []
    for kind, names in ((Image, ("image",)), (ClassLabel, ("label", "labels", "fine_label"))):
        typed = [name for name in features if isinstance(features[name], kind)]
        plain = [name for name in features if not isinstance(features[name], List)]
        named = [name for name in names if name in (typed or plain)]
        found += (named or typed if len(typed) < 2 else named)[:1]
    if len(found) < 2:
        need = "a column of images called image, and one of classes called label"
        raise UserError(f"{source} needs {need}; its columns are {', '.join(features)}")
    return tuple(found)
