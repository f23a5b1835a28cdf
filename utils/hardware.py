"""What depends on the machine: memory, workers that fit into it, and torch.compile."""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
COMPILE_CHOICES = ("auto", "on", "off")
# Compiling takes a minute, or some hundred steps of ViT-B_16 at batch size 512 on a large GPU.
# After that it saves a tenth of the time or more.
COMPILE_MIN_STEPS = 1000
MAX_WORKERS = 16  # of `--num_workers auto`
PREFETCHED = 2  # batches that a DataLoader's worker makes ahead


def compute_the_same_bits() -> None:
    """Let PyTorch choose operations that give the same bits each time, or refuse to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep large freed blocks for the next tensors, on a CPU.

    Else the kernel clears every large block again at its next use, and many layers take less time
    than that. In return the memory stays at its peak until the process ends.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # -1: never return the top of the heap
    libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def out_of_memory_reason(error: BaseException) -> str | None:
    """What could not be allocated if `error` means out of memory; None for any other error."""
    if isinstance(error, MemoryError):
        return str(error) or "Python could allocate no more"
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).split(". ")[0]
    # The allocator of the CPU raises a plain RuntimeError.
    _, _, rest = str(error).partition("DefaultCPUAllocator: ")
    return rest.split(". ")[0] if rest and isinstance(error, RuntimeError) else None


def can_compile() -> bool:
    """Whether this machine has what torch.compile needs: a C++ compiler and Python's headers."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return any(shutil.which(name) for name in compilers if name) and headers.is_file()


def should_compile(choice: str, device_type: str, steps: int) -> bool:
    """Whether to compile; "auto" does so for long runs on a GPU. On a CPU it makes slower."""
    if choice == "auto":
        return device_type == "cuda" and steps >= COMPILE_MIN_STEPS and can_compile()
    return choice == "on"


def processes_here() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def auto_workers() -> int:
    """The cores of the machine for each of its processes, at most MAX_WORKERS."""
    affinity = getattr(os, "sched_getaffinity", None)  # cores of this process; on Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // processes_here()))


def free_memory() -> int:
    """Bytes that programs may still take on Linux, in a container (cgroup v2) too."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvail")) * 1024
    with suppress(OSError, ValueError, StopIteration):  # a group without a limit says "max"
        group = Path("/sys/fs/cgroup")
        limit, taken = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        files = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        free = min(free, int(limit) - int(taken) + files)  # the kernel drops files from memory
    return max(free, 0)


@cache  # the same answer, and one line, for all batches of a run
def fitting_workers(wanted: int, batch_bytes: int) -> int:
    """`wanted`, or as many workers as the shared memory has room for.

    A worker hands over its batches in /dev/shm, where a container has 64 MB by default. It makes
    two ahead, and a full /dev/shm would kill it.
    """
    shared = Path("/dev/shm")
    if not wanted or not shared.is_dir():
        return wanted
    free = shutil.disk_usage(shared).free // processes_here()
    workers = max(0, min(wanted, free // batch_bytes // PREFETCHED - 1))
    if workers < wanted and os.environ.get("RANK", "0") == "0":
        room = f"{shared} has {free / 2**20:.0f} MiB free, a batch takes {batch_bytes / 2**20:.1f}"
        advice = "give a container more with --shm-size=8g"
        line = f"note: {room}: {workers} of {wanted} workers read images; {advice}"
        tqdm.write(line, file=sys.stderr)
    return workers
