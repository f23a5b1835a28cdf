"""Memory for tensors: how a CPU's C library hands it out, and when there is no more."""

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, let glibc keep large freed blocks for the next tensors; True where it could be
    told so.

    By default it maps every large activation anew and returns it when it is freed, and the kernel
    clears each page again at its first touch: more time than many layers take to compute. Memory
    then stays at its peak until the process ends.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(M_TRIM_THRESHOLD, -1)  # never give the top of the heap back
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) and kept)


def out_of_memory(error: BaseException) -> str | None:
    """What could not be had, in a few words, if `error` says that no memory was left; else None."""
    if isinstance(error, MemoryError):
        return str(error) or "Python had none left"
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).split(". ")[0]
    # The CPU's allocator raises plain RuntimeErrors.
    _, allocator, rest = str(error).partition("DefaultCPUAllocator: ")
    return rest.split(". ")[0] if allocator and isinstance(error, RuntimeError) else None
