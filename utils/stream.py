"""Streams of batches for training, evaluation and prediction.

The training stream is a pure function of (seed, step): which images, crops, flips and mixes make
up the batch of a step depends neither on processes, micro-batches and workers, nor on where a run
was resumed. Images in memory live on the device, where whole batches are cropped and resized;
workers do that for files. B batch, C channels, h w source size, H W target size in pixels.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import islice, repeat, starmap, tee
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from models.errors import UserError
from utils.augment import DRAWS, crop_boxes, crop_resize, flips, mix_pairs, normalize, resize, send
from utils.balance import balanced_draws, class_weights
from utils.hardware import fitting_workers
from utils.image_set import ImageSet
from utils.images import Decoding, read_image, to_pixels
from utils.seeds import named_seed, permutation
from utils.signals import leave_to_main

AUGMENTATIONS = ("crop", "crop+flip", "none")


@dataclass(frozen=True)
class Shard:
    """Which share of every global batch a process takes, and in how many micro-batches."""

    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images."""

    kind: str  # one of AUGMENTATIONS
    size: tuple[int, int]  # (H, W) in pixels
    min_area: float = 0.05  # the smallest fraction of an image that a crop keeps
    mixup: float = 0.0  # the alphas of `mix_pairs`, 0 for off
    cutmix: float = 0.0

    def boxes(self, draws: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Boxes (B, 4) in images of (height, width) pixels: random crops, or the whole image."""
        if self.kind == "none":
            zeros = torch.zeros_like(height)
            return torch.stack([zeros, zeros, height, width], dim=1)
        return crop_boxes(draws, height, width, self.min_area)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int, members: tuple[Tensor, ...] | None) -> Tensor:
    order = permutation(n, seed, "order", epoch)
    return order if members is None else balanced_draws(members, seed, epoch)[order]


def global_batch(
    n: int, seed: int, step: int, batch_size: int, members: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The batch of one step from `n` images: indices (B,) and uniform draws (B, DRAWS).

    Every epoch of n images has its own order. A batch may end one epoch and begin the next. With
    `members`, the indices of each class, classes are drawn equally often; else images are.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // n
    orders = {epoch: _order(n, seed, epoch, members) for epoch in epochs.unique().tolist()}
    indices = torch.cat([order[position[epochs == epoch] % n] for epoch, order in orders.items()])
    generator = torch.Generator().manual_seed(named_seed(seed, "augment", step))
    return indices, torch.rand(batch_size, DRAWS, generator=generator)


@dataclass
class TrainStream:
    """This process's micro-batches of every step.

    `steps` yields a list of raw micro-batches for each step; `prepare` makes one of them
    (images float32 (B, C, H, W) in [-1, 1], labels (B,)) on `device`; mixed labels are
    (B, classes). One may be prepared twice: a step that overflows is retried on the same images.
    `class_weights` (classes,) are for the loss; None weighs all images alike.
    """

    images: ImageSet
    augmentation: Augmentation
    _: KW_ONLY
    seed: int
    batch_size: int  # of a step, over all processes and micro-batches
    shard: Shard
    device: torch.device
    num_workers: int = 0
    balance: str = "none"  # one of BALANCES

    def __post_init__(self):
        self.images = self.images.to(self.device)
        labels, balance = self.images.labels, self.balance
        self.classes = int(labels.max()) + 1
        self.class_weights = class_weights(labels).to(self.device) if balance == "loss" else None
        members = labels.argsort(stable=True).split(labels.bincount().tolist())
        self.members = members if balance == "sampling" else None

    def steps(self, start: int, stop: int) -> Iterator[list[tuple]]:
        """Raises UserError, which names the file, for an image that cannot be decoded."""
        batches, decoded = self._micro_batches(range(start, stop)), repeat(None)
        if self.images.pixels is None:
            batches, requests = tee(batches)
            size, decoding = self.augmentation.size, self.images.decoding
            files = _Files(self.images.paths, size, decoding, self.augmentation)
            samples, count = starmap(_samples, requests), self.shard.micro_batches
            batch = self.batch_size // self.shard.world_size // count
            decoded = _decode(files, samples, self.device, self.num_workers, batch)
        pairs = zip(decoded, batches, strict=False)  # `repeat` never ends
        micro_batches = ((*batch, pixels) for pixels, batch in pairs)
        while step := list(islice(micro_batches, self.shard.micro_batches)):
            yield step

    def _micro_batches(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, draws) of this process's micro-batches, in order."""
        size, count = self.batch_size // self.shard.world_size, self.shard.micro_batches
        own = slice(self.shard.rank * size, (self.shard.rank + 1) * size)
        n = len(self.images)
        for step in steps:
            indices, draws = global_batch(n, self.seed, step, self.batch_size, self.members)
            batch = self.images.replacements[indices], draws
            yield from zip(*(each[own].chunk(count) for each in batch), strict=True)

    def prepare(self, micro_batch: tuple) -> tuple[Tensor, Tensor]:
        indices, draws, pixels = micro_batch  # pixels only of files
        how = self.augmentation
        flip = flips(draws) & (how.kind == "crop+flip")
        if pixels is None:
            pixels = self.images.pixels[send(indices, self.device)]  # (B, C, h, w)
            height, width = (torch.full((len(indices),), side) for side in pixels.shape[2:])
            pixels = crop_resize(pixels, how.boxes(draws, height, width), how.size, flip)
        else:
            flip = send(flip, self.device)[:, None, None, None]
            pixels = torch.where(flip, pixels.flip(3), pixels)  # (B, C, H, W)
        images, labels = normalize(pixels), send(self.images.labels[indices], self.device)
        if not (how.mixup or how.cutmix):
            return images, labels
        alphas = {"mixup": how.mixup, "cutmix": how.cutmix}
        return mix_pairs(images, labels, draws, classes=self.classes, **alphas)


@dataclass
class EvalStream:
    """Every image of a set once, over all processes together, plainly resized to `size` (H, W).

    Iterating gives (images, labels) as TrainStream.prepare does, and raises UserError for a
    damaged file. `indices` are the images of each batch of this process, `len` counts the batches.
    """

    images: ImageSet
    size: tuple[int, int]
    _: KW_ONLY
    batch_size: int
    device: torch.device
    shard: Shard = Shard()
    num_workers: int = 0

    def __post_init__(self):
        self.images = self.images.readable().to(self.device)
        own = torch.arange(len(self.images))[self.shard.rank :: self.shard.world_size]
        # A process without images has no batch; split would give it one, which is empty.
        self.indices = own.split(self.batch_size) if len(own) else ()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images.pixels is None:
            files = _Files(self.images.paths, self.size, self.images.decoding)
            samples = map(_samples, self.indices)
            batches = _decode(files, samples, self.device, self.num_workers, self.batch_size)
        else:
            own = (self.images.pixels[send(indices, self.device)] for indices in self.indices)
            batches = (resize(pixels, self.size) for pixels in own)
        for indices, pixels in zip(self.indices, batches, strict=True):
            yield normalize(pixels), send(self.images.labels[indices], self.device)


def decode_files(
    paths: Sequence[str | Path],
    size: tuple[int, int],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    keep_images: bool = False,
) -> Iterable[list[tuple[str | Path, np.ndarray | UserError, Image.Image | None]]]:
    """Batches of (path, uint8 pixels (C, H, W) or the error of a damaged file, image if kept)."""
    files = _Files(paths, size, decoding, keep_images=keep_images)
    batches = torch.arange(len(paths)).split(batch_size) if paths else ()
    # Starting a worker takes longer than decoding a few files.
    return _loader(files, map(_samples, batches), list, min(num_workers, len(paths) // 16))


@dataclass
class _Files:
    """What workers do for (index, draws or None): decode, crop and resize a file as its path,
    pixels uint8 (C, H, W) or the UserError of a damaged file, and the image if `keep_images`.
    """

    paths: Sequence[str | Path]
    size: tuple[int, int]
    decoding: Decoding | None
    augmentation: Augmentation | None = None
    keep_images: bool = False

    def __getitem__(self, sample: tuple[int, list[float] | None]):
        index, draws = sample
        path, box = self.paths[index], None
        try:
            image = read_image(path, self.decoding)
        except UserError as error:  # raised here, it would carry the worker's traceback
            return path, error, None
        if draws is not None:
            width, height = torch.tensor(image.size)[:, None]
            box = self.augmentation.boxes(torch.tensor([draws]), height, width)[0].tolist()
        # An array, since every tensor that leaves a worker by itself costs a file descriptor.
        pixels = to_pixels(image, self.size, box).numpy()
        return path, pixels, image if self.keep_images else None


def _samples(indices: Tensor, draws: Tensor | None = None) -> list[tuple]:
    draws = [None] * len(indices) if draws is None else draws.tolist()
    return list(zip(indices.tolist(), draws, strict=True))


def _stack(decoded: list) -> Tensor | UserError:
    arrays = [pixels for _, pixels, _ in decoded]
    errors = [each for each in arrays if isinstance(each, UserError)]
    return errors[0] if errors else torch.from_numpy(np.stack(arrays))


def _decode(
    files: _Files, samples, device: torch.device, num_workers: int, batch_size: int
) -> Iterator[Tensor]:
    """Pixels (B, C, H, W) of every batch on `device`. Raises the UserError of a damaged file."""
    batch_bytes = batch_size * files.decoding.channels * math.prod(files.size)
    num_workers = fitting_workers(num_workers, batch_bytes)
    for pixels in _loader(files, samples, _stack, num_workers, device.type == "cuda"):
        if isinstance(pixels, UserError):
            raise pixels
        yield send(pixels, device)


def _loader(files: _Files, samples, collate, num_workers: int, pin_memory=False) -> DataLoader:
    workers = {"num_workers": min(num_workers, os.cpu_count() or 1)}  # PyTorch warns of more
    workers |= {"worker_init_fn": leave_to_main, "pin_memory": pin_memory}
    return DataLoader(files, batch_sampler=samples, collate_fn=collate, **workers)
