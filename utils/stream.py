"""The stream of batches: a pure function of (seed, step).

Which images, crops and flips make up the global batch of an update depends on the seed and the
update alone: not on processes, micro-batches or workers, nor on where a run began. Images in
memory live on the device, where whole batches are cropped and resized; files are decoded, cropped
and resized by workers. B batch, C channels, h w source size, H W target size in pixels.
"""

import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from utils.augment import (
    DRAWS,
    crop_boxes,
    crop_resize,
    flips,
    mix_pairs,
    normalize,
    resize,
    send,
)
from utils.seeds import named_seed
from utils.signals import leave_to_main

AUGMENTATIONS = ("crop", "crop+flip", "none")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels
SMALL_SIDE = 64  # images of one size up to this are held in memory, decoded

# Remarks on odd metadata and transparency would bury the progress bar; errors still come.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class DataError(ValueError):
    """Data that cannot be used; the message says what and where."""


@dataclass(frozen=True)
class ImageSet:
    """Labels int64 (n,), and `pixels` uint8 (n, C, h, w) in memory, or else `paths` of files.

    Files are decoded in Pillow's `mode`.
    """

    labels: Tensor
    pixels: Tensor | None = None
    paths: tuple[Path, ...] | None = None
    mode: str = "RGB"

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        return replace(
            self,
            labels=self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            paths=None if self.paths is None else tuple(self.paths[i] for i in indices.tolist()),
        )

    @cached_property
    def checksum(self) -> str:
        """Which images these are, in which order: by their files' names (not of the folders, which
        may move), else by their pixels; and by their labels."""
        if self.paths is None:
            content = np.ascontiguousarray(self.pixels)
        else:
            content = b"\0".join(os.fsencode(path.name) for path in self.paths)
        return f"{zlib.crc32(np.ascontiguousarray(self.labels), zlib.crc32(content)):08x}"

    def called(self, index: int) -> str:
        """How people find an image: its file, or its number."""
        return str(index if self.paths is None else self.paths[index])

    def to(self, device: torch.device) -> "ImageSet":
        """The pixels, where they are in memory, on `device`."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.to(device))


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decode one file in Pillow's `mode`, turned as its EXIF data says.

    Of an animation the first frame is taken, of 16-bit pixels the upper 8 bits; palettes and CMYK
    are converted, transparency is dropped (kept in mode RGBA). Raises DataError, naming the file,
    if it is not a whole image, has 32-bit float pixels, or more pixels than Pillow deems safe.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow would clip at 255: all white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("32-bit float pixels, whose range is not known")
            return image.convert(mode)
    except Exception as error:  # decoders raise whatever they like
        raise DataError(f"{path} is not a readable image ({one_line(error)})") from None


def image_files(folder: Path) -> list[Path]:
    """Every file of a known image format below `folder`, sorted; nothing that is hidden. Links are
    followed, once to each folder; one that leads nowhere is named, and cannot be read."""
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        new = (real := os.path.realpath(where)) not in seen
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        found += [Path(where, name) for name in names if new and name[0] != "."
                  and Path(name).suffix.lower() in readable]  # fmt: skip
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return " ".join(str(error).split())


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))  # (h, w) or (h, w, C)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(named_seed(seed, "order", epoch))
    return torch.randperm(n, generator=generator)


def global_batch(n: int, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """What update `step` sees of `n` images: indices (batch,), uniform draws (batch, DRAWS).

    Every pass over the images has its own order; a batch may end one pass and begin the next.
    """
    position = torch.arange(step * batch, (step + 1) * batch)
    epochs = position // n
    indices = torch.cat([_order(n, seed, epoch)[position[epochs == epoch] % n]
                         for epoch in epochs.unique().tolist()])  # fmt: skip
    generator = torch.Generator().manual_seed(named_seed(seed, "augment", step))
    return indices, torch.rand(batch, DRAWS, generator=generator)


@dataclass(frozen=True)
class Slice:
    """Which part of every global batch this process works on, and in how many micro-batches."""

    rank: int = 0
    world: int = 1
    micro_batches: int = 1


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images: `kind` of AUGMENTATIONS, `size` (H, W) in pixels, and
    `min_area`, the smallest part of an image that a crop keeps. `mixup` and `cutmix` are the
    alphas of `mix_pairs`, 0 for off."""

    kind: str
    size: tuple[int, int]
    min_area: float = 0.05
    mixup: float = 0.0
    cutmix: float = 0.0

    def boxes(self, draws: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Boxes (B, 4) for images of (height, width) pixels: random, or the whole image."""
        if self.kind == "none":
            zeros = torch.zeros_like(height)
            return torch.stack([zeros, zeros, height, width], dim=1)
        return crop_boxes(draws, height, width, self.min_area)

    def flips(self, draws: Tensor) -> Tensor:
        return flips(draws) & (self.kind == "crop+flip")

    def mix(self, images: Tensor, labels: Tensor, draws: Tensor, classes: int):
        """(images, labels); mixed in pairs where that is asked for, labels are (B, classes)."""
        if not (self.mixup or self.cutmix):
            return images, labels
        return mix_pairs(images, labels, draws, mixup=self.mixup, cutmix=self.cutmix,
                         classes=classes)  # fmt: skip


class TrainStream:
    """This process's micro-batches of every update, as `part` says.

    `updates` yields, update by update, lists of raw micro-batches; `prepare` turns one into
    (images float32 (B, C, H, W) in [-1, 1], labels (B,)) on `device`; mixed labels are
    (B, classes). An update may be prepared again: a skipped one is tried on the same images.
    """

    def __init__(
        self,
        images: ImageSet,
        augmentation: Augmentation,
        *,
        seed: int,
        batch: int,
        part: Slice,
        device: torch.device,
        workers: int = 0,
    ):
        self.images, self.augmentation, self.device = images.to(device), augmentation, device
        self.seed, self.batch, self.part, self.workers = seed, batch, part, workers
        self.classes = int(images.labels.max()) + 1

    def _micro_batches(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, draws) of this process, in order."""
        share = self.batch // self.part.world
        mine = slice(self.part.rank * share, (self.part.rank + 1) * share)
        for step in steps:
            indices, draws = global_batch(len(self.images), self.seed, step, self.batch)
            count = self.part.micro_batches
            yield from zip(indices[mine].chunk(count), draws[mine].chunk(count), strict=True)

    def updates(self, start: int, stop: int) -> Iterator[list]:
        micro_batches = self._micro_batches(range(start, stop))
        if self.images.pixels is None:
            files = _Files(self.images, self.augmentation)
            micro_batches = iter(_loader(files, map(_samples, micro_batches), self))
        while update := list(islice(micro_batches, self.part.micro_batches)):
            yield update

    def prepare(self, micro: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.images.pixels is None:
            pixels, labels, draws = _checked(micro)
            pixels, labels = send(pixels, self.device), send(labels, self.device)
            flip = send(self.augmentation.flips(draws), self.device)[:, None, None, None]
            pixels = torch.where(flip, pixels.flip(3), pixels)
        else:
            indices, draws = micro
            pixels = self.images.pixels[send(indices, self.device)]  # (B, C, h, w)
            height, width = (torch.full((len(indices),), side) for side in pixels.shape[2:])
            boxes = self.augmentation.boxes(draws, height, width)
            flip = self.augmentation.flips(draws)
            pixels = crop_resize(pixels, boxes, self.augmentation.size, flip)
            labels = send(self.images.labels[indices], self.device)
        return self.augmentation.mix(normalize(pixels), labels, draws, self.classes)


class EvalStream:
    """Every image of a set once, over all processes together, plainly resized to (H, W).

    Iterating gives (images, labels) as TrainStream.prepare does; `len` is the batches of this
    process.
    """

    def __init__(
        self,
        images: ImageSet,
        size: tuple[int, int],
        *,
        batch: int,
        part: Slice,
        device: torch.device,
        workers: int = 0,
    ):
        self.images, self.size, self.device = images.to(device), size, device
        self.workers = workers
        mine = torch.arange(len(images))[part.rank :: part.world]
        self.indices = mine.split(batch) if len(mine) else ()  # more processes than images

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images.pixels is None:
            files = _Files(self.images, Augmentation("none", self.size))
            batches = [_samples((i, torch.zeros(len(i), DRAWS))) for i in self.indices]
            for micro in _loader(files, batches, self):
                pixels, labels, _ = _checked(micro)
                yield normalize(send(pixels, self.device)), send(labels, self.device)
            return
        for indices in self.indices:
            pixels = self.images.pixels[send(indices, self.device)]
            labels = send(self.images.labels[indices], self.device)
            yield normalize(resize(pixels, self.size)), labels


class _Files:
    """What workers do: decode one file, cut its box, resize. (index, draws) -> uint8 pixels."""

    def __init__(self, images: ImageSet, augmentation: Augmentation):
        self.images, self.augmentation = images, augmentation

    def __getitem__(self, sample: tuple[int, list[float]]):
        index, draws = sample[0], torch.tensor([sample[1]])  # (1, DRAWS)
        try:
            image = read_image(self.images.paths[index], self.images.mode)
        except DataError as error:  # raised in the main process, without a worker's traceback
            return error
        height, width = torch.tensor([image.height]), torch.tensor([image.width])
        top, left, h, w = self.augmentation.boxes(draws, height, width)[0].tolist()
        image = image.crop((left, top, left + w, top + h))  # so that nothing outside bleeds in
        image = image.resize(self.augmentation.size[::-1], Image.Resampling.BILINEAR)
        return to_tensor(image), self.images.labels[index], draws[0]


def _samples(micro: tuple[Tensor, Tensor]) -> list[tuple[int, Tensor]]:
    indices, draws = micro
    # Plain numbers: a tensor for every sample would cost a file descriptor each.
    return list(zip(indices.tolist(), draws.tolist(), strict=True))


def _collate(samples: list):
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    return tuple(torch.stack(column) for column in zip(*samples, strict=True))


def _loader(files: _Files, batches, stream) -> DataLoader:
    return DataLoader(
        files,
        batch_sampler=batches,
        num_workers=min(stream.workers, os.cpu_count() or 1),  # PyTorch warns of more
        collate_fn=_collate,
        worker_init_fn=leave_to_main,
        pin_memory=stream.device.type == "cuda",
    )


def _checked(micro) -> tuple[Tensor, ...]:
    if isinstance(micro, DataError):
        raise micro
    return micro
