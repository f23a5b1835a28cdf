"""Decoded images that stay in memory, where all workers of a process see them."""

import multiprocessing
from copy import copy
from math import prod
from mmap import mmap

import numpy as np

from models.errors import UserError
from utils.hardware import free_memory, processes_here

SHARE = 1 / 4  # of the free memory, that "auto" takes


def new_cache(size: str | float) -> "ImageCache | None":
    """A cache for this process: of `size` GiB for all processes of the machine, or "auto"."""
    if multiprocessing.get_start_method() != "fork":  # workers do not see this memory
        return None
    wanted = int(free_memory() * SHARE) if size == "auto" else int(size * 2**30)
    wanted //= processes_here()
    try:
        return ImageCache(wanted) if wanted else None
    except (OSError, OverflowError) as error:
        raise UserError(f"no memory for a cache of {size} GiB: give it less") from error


class ImageCache:
    """Room for `size` bytes of decoded images, which fills until there is no more.

    The memory is shared with processes that are forked later, and taken only when it is written.
    It does not lie in /dev/shm, which is small in a container.
    """

    def __init__(self, size: int):
        self.room = np.frombuffer(mmap(-1, size), np.uint8)
        self.used = multiprocessing.Value("q", 0)  # bytes

    def for_images(self, count: int) -> "ImageCache":
        """The same room for another `count` images, whose numbers begin at 0 again."""
        own = copy(self)
        own.entries = np.frombuffer(mmap(-1, count * 32), np.int64).reshape(count, 4)
        return own

    def get(self, index: int) -> np.ndarray | None:
        """Pixels uint8 (h, w, C) of an image that was put, else None."""
        with self.used.get_lock():
            start, *shape = self.entries[index].tolist()
        return self.room[start : start + prod(shape)].reshape(shape) if shape[0] else None

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keep pixels (h, w, C) if there is room. Two workers may put one image: both are right."""
        with self.used.get_lock():
            start = self.used.value
            if start + pixels.size > len(self.room):
                return
            self.used.value += pixels.size
        self.room[start : start + pixels.size].reshape(pixels.shape)[:] = pixels
        with self.used.get_lock():
            self.entries[index] = start, *pixels.shape
