"""A set of images with their labels: in memory, or files to be read. n images, C channels."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from utils.images import Decoding, Item


@dataclass(frozen=True)
class ImageSet:
    """Labels int64 (n,), and `pixels` uint8 (n, C, h, w) in memory, or else `paths` of files.

    `unreadable` (n,) are files that cannot be decoded. They keep their place, so that the order of
    the others does not depend on them: training takes the next image of the same class instead.
    """

    labels: Tensor
    pixels: Tensor | None = None
    paths: tuple[Path | Item, ...] | None = None
    decoding: Decoding = field(default_factory=Decoding)
    unreadable: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        parts = {"labels": self.labels, "pixels": self.pixels, "unreadable": self.unreadable}
        parts = {name: part if part is None else part[indices] for name, part in parts.items()}
        paths = None if self.paths is None else tuple(self.paths[i] for i in indices.tolist())
        return replace(self, **parts, paths=paths)

    def without(self, indices: Sequence[int]) -> "ImageSet":
        """The images with more of them marked as unreadable."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[torch.tensor(indices, dtype=torch.int64)] = True
        mask = mask if self.unreadable is None else mask | self.unreadable
        return replace(self, unreadable=mask if mask.any() else None)

    def readable(self) -> "ImageSet":
        """The images that can be decoded."""
        if self.unreadable is None:
            return self
        return self.subset((~self.unreadable).nonzero().flatten())

    @cached_property
    def replacements(self) -> Tensor:
        """(n,) indices: of each image itself, or of the one that training takes instead.

        Raises UserError for a class without a single readable image.
        """
        indices = torch.arange(len(self))
        for i in [] if self.unreadable is None else self.unreadable.nonzero().flatten().tolist():
            same = ((self.labels == self.labels[i]) & ~self.unreadable).nonzero().flatten()
            if not len(same):
                raise UserError(f"the class of {self.name_of(i)} has no readable image")
            later = same[same > i]
            indices[i] = (later if len(later) else same)[0]
        return indices

    @cached_property
    def checksum(self) -> str:
        """Tells image sets apart: a CRC of the images, in their order, and of their labels.

        Files count by their names without the folders, which may move, else pixels count.
        """
        if self.paths is None:
            content = np.ascontiguousarray(self.pixels)
        else:
            content = b"\0".join(os.fsencode(path.name) for path in self.paths)
        return f"{zlib.crc32(np.ascontiguousarray(self.labels), zlib.crc32(content)):08x}"

    def name_of(self, index: int) -> str:
        """The file of an image, or its number where there is no file."""
        return str(index if self.paths is None else self.paths[index])

    def to(self, device: torch.device) -> "ImageSet":
        """Pixels that are in memory are moved to `device`."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.to(device))
