"""Where images lie: folders of splits and classes, and tables of files."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

from models.errors import UserError
from utils.cli import printable

# What folders of a split may be called, in lower case.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev")}
SPLITS["test"] = ("test", "testing")
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


def sub_folders(root: Path) -> list[Path]:
    """The folders in `root`, sorted, without hidden ones; none if there is no `root`."""
    return sorted(d for d in root.glob("*") if d.is_dir() and not d.name.startswith("."))


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
    return dict(sorted(found.items(), key=lambda item: list(SPLITS).index(item[0])))


def class_folders(root: Path) -> tuple[str, ...]:
    """The names of the class folders in `root`, sorted. Raises UserError for an odd one."""
    folders = sub_folders(root)
    for folder in folders:
        if folder.name != printable(folder.name):  # it can't be drawn or saved
            raise UserError(f"{printable(str(folder))}: a class needs a name in UTF-8")
        if folder.name.lower() in SPLIT_OF and not loose_files(folder) and sub_folders(folder):
            advice = "give the folder above it, or another name"
            raise UserError(f"{folder} is called like a split and holds only folders: {advice}")
    return tuple(folder.name for folder in folders)


def loose_files(folder: Path) -> list[Path]:
    """The visible files directly in `folder`."""
    return [path for path in folder.glob("[!.]*") if not path.is_dir()]


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; no hidden ones.

    Links are followed, to each folder once. A link that leads nowhere is in the list, so that
    reading it names it.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if not name.startswith(".")]
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


class Row(NamedTuple):
    """A line of a table of images."""

    path: Path
    label: str | None
    split: str | None  # a key of SPLITS


def read_table(file: Path, labels: bool = False) -> list[Row]:
    """The rows of a text file with the columns path, label and split; the last two may be missing.

    Paths are relative to the file. Raises UserError, which names the line, and if `labels` are
    needed and missing.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a table in UTF-8") from error
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    lines = csv.reader(text.splitlines(), delimiter=delimiter)
    header = [name.strip().lower() for name in next(lines, [])]
    if not {"path", *["label"] * labels} <= set(header):
        columns = "path,label or path,label,split" if labels else "path, or more of them"
        raise UserError(f"{file}: its first line must name the columns: {columns}")
    rows = []
    for fields in filter(None, lines):
        where = f"{file}, line {lines.line_num}"
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} fields, the header has {len(header)}")
        values = {name: field.strip() for name, field in zip(header, fields, strict=True)}
        if not values["path"] or values.get("label") == "":
            raise UserError(f"{where}: an empty path or label")
        split = values.get("split")
        if split is not None and split.lower() not in SPLIT_OF:
            raise UserError(f"{where}: the split {split!r} is none of {', '.join(SPLIT_OF)}")
        split = split and SPLIT_OF[split.lower()]
        rows.append(Row(file.parent / values["path"], values.get("label"), split))
    if not rows:
        raise UserError(f"{file} has no rows below its header")
    return rows
