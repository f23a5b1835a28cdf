"""Decoded images that stay in memory, where all workers of a process see them."""

import multiprocessing
from copy import copy
from math import prod
from mmap import mmap

import numpy as np

from utils.hardware import free_memory, processes_here

SHARE = 1 / 4  # of the free memory, that "auto" takes


def new_cache(size: str | float) -> "ImageCache | None":
    """A cache for this process: of `size` GiB for all processes of the machine, or "auto".

    It is never larger than the free memory.
    """
    if multiprocessing.get_start_method() != "fork":  # workers do not see this memory
        return None
    free = free_memory()
    wanted = free * SHARE if size == "auto" else min(size * 2**30, free)
    room = int(wanted) // processes_here()
    try:
        return ImageCache(room) if room else None
    except OSError:  # a system may refuse memory that is only taken later
        return None


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
        # Height, width, channels, and 1 + the first byte in the room, which is written last.
        own.entries = np.frombuffer(mmap(-1, count * 32), np.int64).reshape(count, 4)
        return own

    def get(self, index: int) -> np.ndarray | None:
        """Pixels uint8 (h, w, C) of an image that was put, else None."""
        if not (place := int(self.entries[index, 3])):
            return None
        shape = self.entries[index, :3].tolist()
        return self.room[place - 1 : place - 1 + prod(shape)].reshape(shape)

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keep pixels (h, w, C) if there is room. Two workers may put one image: both are right."""
        with self.used.get_lock():
            start = self.used.value
            if start + pixels.size > len(self.room):
                return
            self.used.value += pixels.size
        self.room[start : start + pixels.size].reshape(pixels.shape)[:] = pixels
        self.entries[index, :3] = pixels.shape
        with self.used.get_lock():  # other processors see all of the above before
            self.entries[index, 3] = 1 + start
