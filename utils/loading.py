"""Image files become batches, in worker processes. B batch, C channels, H W target size."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.errors import UserError
from models.pixels import Window
from utils import rand_augment
from utils.augment import Augmentation
from utils.hardware import fitting_workers
from utils.image_cache import ImageCache
from utils.images import Decoding, Item, Source, decode, to_pixels
from utils.resize import Decoded, resize
from utils.signals import leave_to_main

LONG_WAIT = 0.2  # fraction of the time: if training waits longer, a note says so


@dataclass
class Files:
    """What workers do for (index, draws or None): decode a file, crop and resize it.

    With RandAugment or random erasing, that follows, and the image is mirrored before it. The
    result is pixels uint8 (C, H, W), or the UserError of a damaged file.
    """

    paths: Sequence[str | Path | Item]
    crops: Augmentation
    decoding: Decoding
    cache: ImageCache | None = None

    def __getitem__(self, sample: tuple[int, list[float] | None]) -> np.ndarray | UserError:
        try:  # An array: every tensor that leaves a worker by itself costs a file descriptor.
            return self._pixels(*sample).numpy()
        except UserError as error:  # raised here, it would carry the worker's traceback
            return error

    def _pixels(self, index: int, draws: list[float] | None) -> Tensor:
        how, size = self.decoding, self.crops.size
        window_of = partial(self.crops.window, draws, how.pixels)
        kept = None if self.cache is None else self.cache.get(index)
        if kept is not None:
            image = Decoded(kept, kept.shape[:2])
        else:
            image = decode(self.paths[index], how, window_of)
            largest = Window((0, 0, *image.sides), size, (0, 0))
            if self.cache and how.scale(largest) == 1:  # no crop decodes it at a scale
                self.cache.put(index, image.pixels)
        pixels = resize(image, window_of(*image.sides), size, how.pixels)
        if draws is None or not self.crops.policy_draws:
            return pixels
        pixels = pixels.flip(2) if self.crops.mirrored(torch.tensor([draws])) else pixels
        return rand_augment.apply(pixels[None], [draws], self.crops)[0]


@dataclass
class Images:
    """What workers do for the image that a sample is: decode and resize it, as Files does.

    An error in its place stays as it is.
    """

    size: tuple[int, int]
    decoding: Decoding

    def __getitem__(self, source: Source | UserError) -> np.ndarray | UserError:
        try:
            failed = isinstance(source, UserError)
            return source if failed else to_pixels(source, self.size, self.decoding).numpy()
        except UserError as error:
            return error


def decode_images(
    sources: Iterable[Source | UserError],
    size: tuple[int, int],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Iterable[list[np.ndarray | UserError]]:
    """Batches of uint8 pixels (C, H, W), or of the error of a damaged image, in order.

    `sources` are drawn in this process, a batch at a time, and two ahead for each worker.
    """
    rest = iter(sources)
    batches = iter(lambda: list(islice(rest, batch_size)), [])
    return _loader(Images(size, decoding or Decoding()), batches, list, num_workers)


def decode_batches(
    files: Files, samples: Iterable, device: torch.device, num_workers: int, batch_size: int
) -> Iterator[Tensor]:
    """Pixels (B, C, H, W) of every batch on `device`. Raises the UserError of a damaged file."""
    batch_bytes = batch_size * files.decoding.channels * math.prod(files.crops.size)
    num_workers = fitting_workers(num_workers, batch_bytes)
    for pixels in _loader(files, samples, _stack, num_workers, device.type == "cuda"):
        if isinstance(pixels, UserError):
            raise pixels
        yield pixels.to(device, non_blocking=True)


def samples_of(indices: Tensor, draws: Tensor | None = None) -> list[tuple]:
    """What `Files` takes for each of the `indices` (B,), with its row of `draws` (B, DRAWS)."""
    draws = [None] * len(indices) if draws is None else draws.tolist()
    return list(zip(indices.tolist(), draws, strict=True))


def _stack(arrays: list[np.ndarray | UserError]) -> Tensor | UserError:
    """Pixels (B, C, H, W), or the first error."""
    errors = [each for each in arrays if isinstance(each, UserError)]
    return errors[0] if errors else torch.from_numpy(np.stack(arrays))


def _loader(
    files: Files | Images, samples, collate, num_workers: int, pin_memory=False
) -> DataLoader:
    workers = {"num_workers": min(num_workers, os.cpu_count() or 1)}  # PyTorch warns of more
    workers |= {"worker_init_fn": leave_to_main, "pin_memory": pin_memory}
    return DataLoader(files, batch_sampler=samples, collate_fn=collate, **workers)


class Waiting:
    """How long a device has nothing to do because the next batch is not there yet."""

    def __init__(self, device: torch.device):
        self.device, self.spans, self.reports = device, [], 0

    def measured(self, batches: Iterator) -> Iterator:
        """The same `batches`; the time until each of them is there is measured."""
        start = self._mark()
        for batch in batches:
            self.spans.append((start, self._mark()))
            yield batch
            start = self._mark()

    def _mark(self):
        """Now; on a GPU the moment when its work so far is done."""
        if self.device.type != "cuda":
            return time.monotonic()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def report(self, seconds: float, speed: float, log: Callable[[str], None]) -> None:
        """Say once what helps against a long wait in the last `seconds`.

        `speed` are images a second; the device must have done its work. The first call counts for
        nothing: workers have just started.
        """
        spans, self.spans, self.reports = self.spans, [], self.reports + 1
        if self.device.type == "cuda":
            waited = sum(start.elapsed_time(stop) for start, stop in spans) / 1000
        else:
            waited = sum(stop - start for start, stop in spans)
        if self.reports > 1 and waited > LONG_WAIT * seconds:
            self.reports = -math.inf
            possible = speed * seconds / max(seconds - waited, 1e-9)
            rates = f"{speed:.0f} images/s are read, the model could take {possible:.0f}"
            advice = "more workers, a larger cache or smaller files help"
            log(f"note: training waits for images: {rates}; {advice}")
