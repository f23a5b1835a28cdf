"""The names of classes: which class of a model a class of the data is."""

import re
from collections import Counter

import torch
from torch import Tensor

from models.errors import UserError
from models.labels import imagenet_labels, synset_names


def match_classes(
    source: str, found: tuple[str, ...], classes: tuple[str, ...], named: bool, log
) -> tuple[Tensor, tuple[str, ...]]:
    """(the model's label of each class `found` in the data, the model's class names).

    Classes are found by name; in a head of ImageNet also by number, WordNet id and word. The
    classes of other files that have no names are taken in sorted order, and the log says so.
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
    if not named and len(found) == len(classes):
        if list(found) != sorted(found, key=natural_key):
            raise UserError(
                f"{source}: its classes sort as {', '.join(found[:3])}, not by their numbers, and "
                "the model does not name its own: give --labels FILE with its class names in order"
            )
        pairs = [f"{own} = {name}" for own, name in zip(classes, found, strict=True)]
        listed = ", ".join(pairs[:10]) + ", ..." * (len(pairs) > 10)
        log(f"note: the model's classes are taken to be the data's in sorted order: {listed}")
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
