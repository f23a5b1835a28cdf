"""Streams of batches for training, evaluation and prediction.

The training stream is a pure function of (seed, step): which images, crops, flips and mixes make
up the batch of a step depends neither on processes, micro-batches and workers, nor on where a run
was resumed. Images in memory live on the device, where whole batches are cropped and resized;
workers do that for files. B batch, C channels, h w source size, H W target size in pixels.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from itertools import islice, repeat, starmap, tee

import torch
from torch import Tensor

from utils import rand_augment
from utils.augment import (
    DRAWS,
    Augmentation,
    crop_resize,
    mix_pairs,
    mixes,
    normalize,
    send,
)
from utils.balance import balanced_draws, class_weights
from utils.crop_table import CropTable
from utils.image_cache import ImageCache
from utils.image_set import ImageSet
from utils.loading import Files, Waiting, decode_batches, samples_of
from utils.seeds import named_seed, permutation


@dataclass(frozen=True)
class Shard:
    """Which share of every global batch a process takes, and in how many micro-batches."""

    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int, members: tuple[Tensor, ...] | None) -> Tensor:
    order = permutation(n, seed, "order", epoch)
    return order if members is None else balanced_draws(members, seed, epoch)[order]


def global_batch(
    n: int,
    seed: int,
    step: int,
    batch_size: int,
    members: tuple[Tensor, ...] | None = None,
    policy_draws: int = 0,
) -> tuple[Tensor, Tensor]:
    """The batch of one step from `n` images: indices (B,), uniform draws (B, DRAWS + policy_draws).

    Every epoch of n images has its own order. A batch may end one epoch and begin the next. With
    `members`, the indices of each class, classes are drawn equally often; else images are.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // n
    orders = {epoch: _order(n, seed, epoch, members) for epoch in epochs.unique().tolist()}
    indices = torch.cat([order[position[epochs == epoch] % n] for epoch, order in orders.items()])
    generator = torch.Generator().manual_seed(named_seed(seed, "augment", step))
    draws = torch.rand(batch_size, DRAWS, generator=generator)
    if policy_draws:  # of another seed: with or without them, crops and mixes are the same
        generator.manual_seed(named_seed(seed, "policy", step))
        more = torch.rand(batch_size, policy_draws, generator=generator)
        draws = torch.cat([draws, more], dim=1)
    return indices, draws


@dataclass
class TrainStream:
    """This process's micro-batches of every step.

    `steps` yields a list of raw micro-batches for each step; `prepare` makes one of them
    (images (B, C, H, W) in [-1, 1], labels (B,)) on `device`; mixed labels are (B, classes). One
    may be prepared twice: a step that overflows is retried on the same images.
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
    cache: ImageCache | None = None  # for decoded files
    balance: str = "none"  # one of BALANCES
    dtype: torch.dtype = torch.float32  # of the images that are prepared

    def __post_init__(self):
        self.images = self.images.to(self.device)
        self.waiting = Waiting(self.device)
        self.files = _files(self.images, self.augmentation, self.cache)
        if not self.files:
            shape, recipe = self.images.pixels.shape[2:], self.images.decoding.pixels
            self.crops = CropTable(self.augmentation, recipe, tuple(shape), self.device)
        labels, balance = self.images.labels, self.balance
        self.classes = int(labels.max()) + 1
        self.class_weights = class_weights(labels).to(self.device) if balance == "loss" else None
        members = labels.argsort(stable=True).split(labels.bincount().tolist())
        self.members = members if balance == "sampling" else None

    def steps(self, start: int, stop: int) -> Iterator[list[tuple]]:
        """Raises UserError, which names the file, for an image that cannot be decoded."""
        batches, decoded = self._micro_batches(range(start, stop)), repeat(None)
        if self.files:
            batches, requests = tee(batches)
            samples, count = starmap(samples_of, requests), self.shard.micro_batches
            batch = self.batch_size // self.shard.world_size // count
            again = (stop - start) * self.batch_size > len(self.images)
            files = self.files if again else replace(self.files, cache=None)
            decoded = decode_batches(files, samples, self.device, self.num_workers, batch)
        pairs = zip(decoded, batches, strict=False)  # `repeat` never ends
        micro_batches = ((*batch, pixels) for pixels, batch in pairs)
        steps = iter(lambda: list(islice(micro_batches, self.shard.micro_batches)), [])
        yield from self.waiting.measured(steps)

    def _micro_batches(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, draws) of this process's micro-batches, in order."""
        size, count = self.batch_size // self.shard.world_size, self.shard.micro_batches
        own = slice(self.shard.rank * size, (self.shard.rank + 1) * size)
        n, more = len(self.images), (self.members, self.augmentation.policy_draws)
        for step in steps:
            indices, draws = global_batch(n, self.seed, step, self.batch_size, *more)
            batch = self.images.replacements[indices], draws
            yield from zip(*(each[own].chunk(count) for each in batch), strict=True)

    def prepare(self, micro_batch: tuple) -> tuple[Tensor, Tensor]:
        indices, draws, pixels = micro_batch  # pixels only of files
        how = self.augmentation
        flip = how.mirrored(draws)
        mix = [mixes(draws, how.size, how.mixup, how.cutmix)] if how.mixup or how.cutmix else []
        small = [self.images.labels[indices], *mix]
        if pixels is None:
            recipe, source = self.images.decoding.pixels, self.crops.source
            rows = draws.tolist()
            windows = [how.window(row, recipe, *source) for row in rows]
            small += [indices, *self.crops.places(windows, flip)]
            labels, *mix, indices, y, x = send(self.device, *small)
            pixels = self.images.pixels[indices]  # (B, C, h, w)
            pixels = self.crops.resize(pixels, y, x)  # (B, C, H, W)
            if how.policy_draws:
                pixels = rand_augment.apply(pixels, rows, how)
        elif how.policy_draws:  # workers have mirrored them
            labels, *mix = send(self.device, *small)
        else:
            labels, *mix, flip = send(self.device, *small, flip)
            pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)  # (B, C, H, W)
        if not mix:
            return normalize(pixels, self.dtype), labels
        images, targets = mix_pairs(normalize(pixels), labels, *mix, self.classes)
        return images.to(self.dtype), targets


@dataclass
class EvalStream:
    """Every image of a set once, over all processes together, resized to `size` (H, W).

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
    cache: ImageCache | None = None  # for decoded files

    def __post_init__(self):
        self.images = self.images.readable().to(self.device)
        self.files = _files(self.images, Augmentation("none", self.size), self.cache)
        own = torch.arange(len(self.images))[self.shard.rank :: self.shard.world_size]
        # A process without images has no batch; split would give it one, which is empty.
        self.indices = own.split(self.batch_size) if len(own) else ()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.indices:
            return
        own = torch.cat(self.indices)
        sent = send(self.device, self.images.labels[own], own)
        labels, indices = (each.split(self.batch_size) for each in sent)
        if self.files:
            workers, samples = self.num_workers, map(samples_of, self.indices)
            batches = decode_batches(self.files, samples, self.device, workers, self.batch_size)
        else:
            recipe = self.images.decoding.pixels
            window = recipe.window(*self.images.pixels.shape[2:], self.size)
            parts = (self.images.pixels[part] for part in indices)
            batches = (crop_resize(pixels, window, self.size, recipe) for pixels in parts)
        yield from zip(map(normalize, batches), labels, strict=True)


def _files(images: ImageSet, crops: Augmentation, cache: ImageCache | None) -> Files | None:
    """What workers do for `images`; None for images in memory."""
    if images.pixels is not None:
        return None
    return Files(images.paths, crops, images.decoding, cache and cache.for_images(len(images)))
