"""The user's own images: folders of class folders, and tables."""

from collections.abc import Callable, Mapping
from pathlib import Path

from models.errors import UserError
from models.labels import synset_names
from utils.class_names import natural_key
from utils.dataset import Data, EvaluationData, Options
from utils.folders import SPLIT_OF, SPLITS, class_folders, read_table, split_folders, sub_folders
from utils.image_index import ImageReader
from utils.stream import ImageSet


def read_folder(data_dir: Path, options: Options, name: str = "folder") -> Data:
    """`train/`, and `val/` or `test/` or both, in `data_dir`, with a folder for each class.

    A `data_dir` without `train/` that holds class folders itself is a training set.
    """
    data_dir = image_root(name, data_dir)
    found, classes = find_splits(data_dir, options.val_fraction)
    reader = ImageReader(data_dir, options)
    splits = {part: reader.read_folder(root, classes) for part, root in found.items()}
    reader.finish()
    _note_unused(data_dir, found, options.log)
    places = {part: f" ({root.name}/)" for part, root in found.items() if root != data_dir}
    names = synset_names(classes) if name == "imagenet" else classes
    return make_data(splits, names, str(data_dir), places)


def make_data(splits: Mapping[str, ImageSet], classes, source: str, places=None) -> Data:
    val_split = "val" if "val" in splits else "test"
    test = splits["test"] if len(splits) == 3 else None
    val = splits.get(val_split)
    return Data(splits["train"], val, test, tuple(classes), source, val_split, places or {})


def image_root(name: str, data_dir: Path) -> Path:
    """The folder of the splits: of ImageNet it may lie deeper, as its archives unpack."""
    deeper = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if name == "imagenet" else ()
    return next((data_dir / path for path in deeper if (data_dir / path).is_dir()), data_dir)


def find_splits(data_dir: Path, val_fraction: float) -> tuple[dict[str, Path], tuple[str, ...]]:
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
    unused = [d.name for d in sub_folders(data_dir) if d not in found.values()]
    if unused and data_dir not in found.values():
        names = ", ".join(f"{name}/" for name in unused)
        log(f"note: left out, as no split or without class folders: {names} in {data_dir}")


def find_evaluation(data_dir: Path) -> tuple[Path, str]:
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
    return data_dir, SPLIT_OF.get(data_dir.name.lower(), "test")


def read_folder_evaluation(data_dir: Path, options: Options) -> EvaluationData:
    root, split_name = find_evaluation(data_dir)
    classes, reader = class_folders(root), ImageReader(data_dir, options)
    images = reader.read_folder(root, classes)
    reader.finish()
    return EvaluationData(images, split_name, str(root), classes)


def read_table_data(file: Path, options: Options) -> Data:
    """A table with the columns path, label and, unless `val_fraction` draws one, split."""
    rows = read_table(file, labels=True)
    classes = tuple(
        sorted({row.label for row in rows if row.split in (None, "train")}, key=natural_key)
    )
    if len(classes) < 2:
        raise UserError(f"{file} needs training images of two or more classes")
    reader, splits = ImageReader(file, options), {}
    for name in SPLITS:
        if own := [row for row in rows if (row.split or "train") == name]:
            splits[name] = reader.read_rows(file, own, classes)
    reader.finish()
    if "train" not in splits:
        raise UserError(f"{file} has no training images")
    return make_data(splits, classes, str(file))


def read_table_evaluation(file: Path, options: Options) -> EvaluationData:
    """The rows of the test split, else of the validation split, else of a table without splits."""
    rows = read_table(file, labels=True)
    found = {row.split for row in rows}
    name = next((name for name in ("test", "val", None) if name in found), None)
    rows = [row for row in rows if row.split == name]
    classes = tuple(sorted({row.label for row in rows}, key=natural_key))
    reader = ImageReader(file, options)
    images = reader.read_rows(file, rows, classes)
    reader.finish()
    return EvaluationData(images, name or "test", str(file), classes)
