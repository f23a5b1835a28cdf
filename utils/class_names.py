"""The names of classes: in files of labels, and which class of a model a class of the data is."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from models.errors import UserError
from models.labels import imagenet_labels, synset_names

INDEX, NAME, SEPARATOR = r"(?P<index>\d{1,9})", "(?P<name>.+)", r"\s*[,;\t]\s*"


def match_classes(
    source: str, found: tuple[str, ...], classes: tuple[str, ...], named: bool, log
) -> tuple[Tensor, tuple[str, ...]]:
    """(the model's label of each class `found` in the data, the model's class names).

    Classes are found by name; in a head of ImageNet also by number, WordNet id and word. The
    classes of other files that have no names are taken in the data's order, which the log shows.
    """
    twice = Counter(classes)
    place = {name: label for label, name in enumerate(classes) if twice[name] == 1}
    # Numbers stand for classes without names, and do not mean folders that are called 0, 1, ...
    numbered = not named and classes == tuple(str(i) for i in range(len(classes)))
    for translate in () if numbered else (tuple, synset_names):
        if place.keys() >= set(names := translate(found)):
            return torch.tensor([place[name] for name in names]), classes
    if not named and (labels := imagenet_labels(found, len(classes))):
        return torch.tensor(labels), classes
    unknown = numbered or not place.keys() & set(found)  # no class is found by its name
    if not named and unknown and len(found) == len(classes):
        if sorted(found) != sorted(found, key=natural_key):
            raise UserError(
                f"{source}: its classes sort differently as text ({', '.join(sorted(found)[:3])}) "
                "and by their numbers: give --labels FILE with the model's class names in order"
            )
        pairs = [f"{own} = {name}" for own, name in zip(classes, found, strict=True)]
        listed = ", ".join(pairs[:10]) + ", ..." * (len(pairs) > 10)
        log(f"note: the model's classes are taken to be the data's, in their order: {listed}")
        return torch.arange(len(found)), found if numbered else classes
    if numbered:
        raise UserError(f"{source} has {len(found)} classes, the model {len(classes)}, unnamed")
    missing = next(name for name in found if name not in place)
    first = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
    model = f"the model's {len(classes)} classes ({first})"
    raise UserError(f"{source} has the class {missing!r}, which {model} lack, or have twice")


def natural_key(name: str) -> list:
    """Sorts the numbers in a name by their value."""
    parts = re.split("([0-9]+)", name)  # text and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_labels(path: str | Path, count: int) -> tuple[str, ...]:
    """The names of `count` classes: one a line; or lines of index and name in any order, perhaps
    after a header; or all in one line. Commas, semicolons or tabs separate. Raises UserError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the class names are not UTF-8 text") from error
    lines = list(filter(None, map(str.strip, lines)))
    if lines and lines[0][0] in "[{":
        raise UserError(f"{path} is JSON: write one name a line")
    for mark in ",;\t":
        if len(lines) == 1 < count == len(fields := lines[0].split(mark)):
            return tuple(field.strip(' "') for field in fields)
    wrong = False
    for pattern in (INDEX + SEPARATOR + NAME, NAME + SEPARATOR + INDEX):
        rows = [re.fullmatch(pattern, line) for line in lines]
        rows = rows[1:] if rows and not rows[0] else rows  # without the header
        if rows and all(rows):
            names = {int(row["index"]): row["name"].strip(' "') for row in rows}
            if sorted(names) == list(range(count)) and len(rows) == count:
                return tuple(names[i] for i in range(count))
            wrong |= min(names) < 2  # else the numbers belong to the names
    if wrong:
        raise UserError(f"{path}: the indices must be 0 to {count - 1}, each of them once")
    if len(lines) != count:
        found = f"{len(lines)} class name{'s' * (len(lines) != 1)}, the model {count} classes"
        raise UserError(f"{path} has {found}: write one name a line, or lines like 0,cat")
    return tuple(lines)
