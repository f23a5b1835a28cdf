"""What the launcher says (rank, world, device), and the few words that processes exchange."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_control = None  # the group that speaks between hosts alone, whatever the devices do
_turn = 0  # how many times main_first has been used: each turn has its own key in the store


class LaunchError(ValueError):
    """A launch that cannot work; the message says why."""


def launched(local_rank: int) -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment, which torchrun and launch both set.

    `local_rank` is the flag of older launchers; the environment wins. (0, 0, 1) without either.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local = os.environ.get("LOCAL_RANK", max(local_rank, 0))
        try:
            rank, local, world = int(os.environ["RANK"]), int(local), int(os.environ["WORLD_SIZE"])
        except ValueError:
            world = 0
        if world < 1:
            raise LaunchError("RANK, LOCAL_RANK and WORLD_SIZE of the environment must be whole "
                              "numbers: start with torchrun, or unset them")  # fmt: skip
        return rank, local, world
    if local_rank > 0:
        raise LaunchError(
            f"--local_rank {local_rank} without RANK and WORLD_SIZE: start several processes with "
            "torchrun --nproc_per_node N train.py ..."
        )
    return 0, 0, 1


def speaks() -> bool:
    """Whether the line of an error is this process's to show, whatever the launch was like."""
    return os.environ.get("RANK", "0") in ("0", "") or not os.environ["RANK"].isdecimal()


def start(local_rank: int, timeout_minutes: float = 30) -> torch.device:
    """Choose this process's device and join the others: nccl on GPUs, gloo on CPUs."""
    _, local, processes = launched(local_rank)
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {local} has no GPU of its own, {torch.cuda.device_count()} are here: "
                "lower --nproc_per_node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if processes > 1:
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(minutes=timeout_minutes),
                device_id=device if device.type == "cuda" else None,
            )
        # Not all that goes with RANK and WORLD_SIZE was set, or the others do not come.
        except (ValueError, dist.DistError) as error:
            why = " ".join(str(error).split())[:200]
            raise LaunchError(
                f"{processes} processes are announced but cannot be joined ({why}): start them "
                "with torchrun --nproc_per_node N train.py ..."
            ) from None
        global _control
        _control = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    return device


def described(device: torch.device) -> str:
    """This process's device in words, and how many processes there are."""
    what = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads")  # fmt: skip
    return what if world() == 1 else f"{world()} processes, each {what}"


def stop() -> None:
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_alone(status: int, error: BaseException | None = None) -> None:
    """End a process that fails alone where its farewell would wait for the others, as nccl's does:
    they are waiting for it, and only the launcher can end them. Shows the traceback of `error`."""
    if world() == 1 or dist.get_backend() != "nccl":
        return
    if error is not None:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def peer_lost(error: BaseException) -> bool:
    """Whether `error` only says that another process has died, or not come within the time-out."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "nccl", "connection", "timed out", "peer")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def report(line: str) -> None:
    """Give torchrun the line for its closing summary, where it names the root cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def main_first(action: Callable[[], T]) -> T:
    """Run `action` on the main process, then on the others, which find its downloads there.

    They wait at the store, not in a collective, so that a slow host does not run into the
    collectives' time-out. If the main process fails, the others leave without a word of theirs.
    """
    global _turn
    if world() == 1:
        return action()
    _turn += 1
    store, key = dist.distributed_c10d._get_default_store(), f"main_first/{_turn}"
    if rank() == 0:
        try:
            result = action()
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return result
    store.wait([key], timedelta(days=1))
    if store.get(key) == b"failed":
        raise SystemExit(2)
    return action()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of everybody's `tensor`, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def highest(value: int) -> int:
    """The highest `value` of all processes: the hosts agree, and no device is waited for."""
    if world() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control)
    return int(tensor)


def barrier() -> None:
    """Wait for everybody."""
    if world() > 1:
        dist.barrier()
