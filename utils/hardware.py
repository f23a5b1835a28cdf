"""What depends on the machine: memory, workers that fit into it, and torch.compile."""

import ctypes
import math
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.errors import UserError
from models.modeling import Block, VisionTransformer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
DEVICES = ("auto", "cpu", "cuda", "mps")  # mps: the GPU of an Apple computer
EVAL_BATCH_SIZE = {"cpu": 64, "mps": 64, "cuda": 512}  # a large GPU has little to do at 64
COMPILE_CHOICES = ("auto", "on", "off")
# Estimates for `--compile auto`, until a GPU is measured: what compiled blocks save of a step
# (5 ms in ViT-B_16 with 512 images at 224 pixels on an H100), and how long compiling takes.
COMPILE_SAVES = 5e-12  # seconds a step for each value (image, patch, width) of each block
COMPILE_TAKES = 10  # seconds; all blocks are alike, so their number hardly matters
MAX_WORKERS = 16  # of `--num_workers auto`
PREFETCHED = 2  # batches that a DataLoader's worker makes ahead


def choose_device(name: str, several: bool = False) -> torch.device:
    """The device of the `name`, one of DEVICES; auto takes a CUDA GPU where there is one.

    `several` processes share no Apple GPU. Raises UserError if the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "cpu": True}
    there["mps"] = torch.backends.mps.is_available() and not several
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    elif not there[name]:
        why = " for several processes" * several
        raise UserError(f"there is no device {name} here{why}: take auto or cpu")
    return torch.device(name)


def choose_kernels(deterministic: bool) -> None:
    """Let PyTorch choose fast kernels, or those that give the same bits each time, or refuse."""
    torch.backends.cudnn.benchmark = not deterministic
    if not deterministic:
        return
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


def should_compile(choice: str, model: VisionTransformer, images: int, steps: int) -> bool:
    """Whether to compile for `steps` of so many `images` in this process.

    "auto" does so on a CUDA GPU if it saves more time than it takes; a CPU becomes slower.
    """
    if choice == "auto":
        values = images * math.prod(model.grid) * model.config.hidden_size * model.config.num_layers
        saves = steps * values * COMPILE_SAVES > COMPILE_TAKES
        return model.head.weight.is_cuda and saves and can_compile()
    return choice == "on"


def compile_blocks(model: VisionTransformer) -> None:
    """Compile the blocks for training. They are alike, so that this takes half as long or less.

    An evaluation has other shapes: its last batch would be compiled for a single use.
    """
    for block in model.transformer.encoder.layer:
        compiled = torch.compile(block.forward, dynamic=False)
        block.forward = partial(_forward, block, block.forward, compiled)


def _forward(block: Block, eager: Callable, compiled: Callable, *args) -> Tensor:
    return (compiled if block.training else eager)(*args)


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
