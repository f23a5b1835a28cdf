"""What a data set is to the program: images, splits and classes, and how it is to be read."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from utils.images import Decoding
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
