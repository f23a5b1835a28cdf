"""Where images lie, before any is opened: folders of splits and classes, and tables."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from models.errors import UserError
from utils.cli import printable
from utils.images import Item

# What folders of a split may be called, in lower case.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev")}
SPLITS["test"] = ("test", "testing")
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


csv.field_size_limit(2**31 - 1)  # so that an open quote is a wrong line, and not a csv.Error


class Split(NamedTuple):
    files: Sequence[Path | Item]
    labels: Sequence[str]  # the class of each
    folder: str = ""  # its name, for the log


class Source(NamedTuple):
    """The files of a data set; for an evaluation one split of them."""

    name: str
    splits: dict[str, Split]  # by keys of SPLITS
    classes: tuple[str, ...]
    left_out: Sequence[tuple[str, str]] = ()  # (reason, ending) of each file
    unused: Sequence[str] = ()  # folders
    listed: bool = False  # each file is meant: another than an image is a mistake


def folder_roots(
    data_dir: Path, training: bool, need_val: bool = True
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """({split: its folder of class folders}, classes), without listing a file.

    The splits are train/, val/ and test/ in `data_dir`, or `data_dir` itself. An evaluation takes
    test/, else val/, else `data_dir`. Raises UserError.
    """
    roots = split_folders(data_dir)
    if not training:
        own = SPLIT_OF.get(data_dir.name.lower(), "test")
        chosen = next((split for split in ("test", "val") if split in roots), None)
        if roots and not chosen:
            advice = "give the training's --val_fraction and --seed, or a folder of class folders"
            raise UserError(f"{data_dir} has train/, but neither val/ nor test/: {advice}")
        roots = {chosen: roots[chosen]} if chosen else {own: data_dir}
    elif not roots:
        roots = {"train": data_dir}
    elif "train" not in roots:
        raise UserError(f"{data_dir} has no train/ folder")
    root = next(iter(roots.values()))
    classes = class_folders(root)
    if training and len(classes) < 2:
        what = f"only {classes[0]!r}" if classes else "none"
        raise UserError(f"{root} needs a folder for each of two or more classes; it has {what}")
    if not classes:
        raise UserError(f"{data_dir} holds no class folders")
    if training and need_val and len(roots) == 1:
        advice = "hold out training images, with --val_fraction 0.1 for example"
        raise UserError(f"{data_dir} has neither val/ nor test/ with class folders: {advice}")
    for root in roots.values():
        if unknown := set(class_folders(root)) - set(classes):
            raise UserError(f"{root / min(unknown)} is a class that the training images lack")
    return roots, classes


def folder_source(data_dir: Path, training: bool, need_val: bool = True) -> Source:
    """The files of `folder_roots`. Raises UserError."""
    roots, classes = folder_roots(data_dir, training, need_val)
    splits, left_out = {}, []
    for split, root in roots.items():
        pairs = [(file, name) for name in classes for file in visible_files(root / name)]
        if not pairs:
            raise UserError(f"{root} holds no images")
        splits[split] = Split(*zip(*pairs, strict=True), f"{root.name}/" * (root != data_dir))
        left_out += [("lie beside the class folders", ending(p)) for p in loose_files(root)]
    unused = [d.name for d in sub_folders(data_dir) if d not in roots.values()]
    unused = unused if training and data_dir not in roots.values() else ()
    return Source(str(data_dir if training else root), splits, classes, left_out, unused)


def split_folders(data_dir: Path) -> dict[str, Path]:
    """{"train", "val" or "test": its folder}: folders that are called so and hold folders.

    A folder of that name that holds images only may be a class. Raises UserError if two folders
    are one split.
    """
    found = {}
    for folder in sub_folders(data_dir):
        split = SPLIT_OF.get(folder.name.lower())
        if split and sub_folders(folder):
            if split in found:
                raise UserError(f"{found[split]} and {folder} are both the {split} split: keep one")
            found[split] = folder
    return {split: found[split] for split in SPLITS if split in found}


def class_folders(root: Path) -> tuple[str, ...]:
    """The names of the class folders in `root`, sorted. Raises UserError for an odd one."""
    folders = sub_folders(root)
    for folder in folders:
        if folder.name != printable(folder.name):  # it can't be drawn or saved
            raise UserError(f"{printable(str(folder))}: a class needs a name in UTF-8")
        if folder.name.lower() in SPLIT_OF and sub_folders(folder) and not loose_files(folder):
            advice = "give the folder above it, or another name"
            raise UserError(f"{folder} is called like a split and holds only folders: {advice}")
    return tuple(folder.name for folder in folders)


def sub_folders(root: Path) -> list[Path]:
    """The folders in `root`, sorted, without hidden ones; none if there is no `root`."""
    return sorted(d for d in root.glob("[!.]*") if d.is_dir())


def loose_files(folder: Path) -> list[Path]:
    """The visible files directly in `folder`."""
    return [path for path in folder.glob("[!.]*") if not path.is_dir()]


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; no hidden ones.

    Links are followed, to each folder once. A link that leads nowhere is in the list, so that
    reading it names it.
    """
    found, seen = [], {os.path.realpath(folder.parent)}
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if not name.startswith(".")]
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def ending(path: Path) -> str:
    return path.suffix.lower() or "without ending"


def table_source(file: Path, training: bool, sort_key: Callable[[str], list]) -> Source:
    """The images of a table; without a column split all are training or evaluation images.

    An evaluation takes the test rows, else the validation rows. Raises UserError.
    """
    rows = read_table(file, {"path", "label"})
    split = "train" if training else "test"
    found = [SPLIT_OF.get(row.get("split", split).lower()) for row in rows]
    if None in found:
        names = ", ".join(SPLIT_OF)
        raise UserError(
            f"{file}: the split {rows[found.index(None)]['split']!r} is none of {names}"
        )
    chosen = list(SPLITS) if training else [max(found, key=list(SPLITS).index)]
    if chosen == ["train"]:
        advice = "give the training's --val_fraction and --seed"
        raise UserError(f"{file} has neither validation nor test images: {advice}")
    splits = {}
    for name in chosen:
        if own := [row for row, split in zip(rows, found, strict=True) if split == name]:
            labels = [row["label"] for row in own]
            splits[name] = Split([file.parent / row["path"] for row in own], labels)
    if training and "train" not in splits:
        raise UserError(f"{file} has no training images")
    classes = sorted(set(next(iter(splits.values())).labels), key=sort_key)
    return Source(str(file), splits, tuple(classes), listed=True)


def read_table(file: Path, needed: set[str]) -> list[dict[str, str]]:
    """The rows of a text file whose first line names the columns, in lower case.

    Commas, semicolons, tabs or | separate. Raises UserError, which names the line, if a column that
    is `needed` lacks or is empty somewhere.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a table in UTF-8") from error
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip().lower() for name in next(lines, [])]
    if not needed <= set(header) or len(set(header)) < len(header):
        columns = ", ".join(sorted(needed))
        raise UserError(f"{file}: its first line must name the columns {columns}, each once")
    rows = []
    for fields in filter(None, lines):
        row = dict(zip(header, map(str.strip, fields), strict=False))
        if len(fields) != len(header) or not all(row[name] for name in needed):
            reason = f"{len(header)} fields are needed, and no empty {' or '.join(sorted(needed))}"
            raise UserError(f"{file}, line {lines.line_num}: {reason}")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no rows below its header")
    return rows
