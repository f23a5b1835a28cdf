"""One run in several processes: rank, world size and device, and what the processes exchange."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import UserError

T = TypeVar("T")
_control_group = None  # gloo, for numbers that only the CPU needs


def launcher_env(local_rank: int = -1) -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment, which the launcher sets.

    `local_rank` is the argument of older launchers, and the environment wins over it.
    (0, 0, 1) without a launcher. Raises UserError if the environment makes no sense.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        local_rank = env.get("LOCAL_RANK", max(local_rank, 0))
        try:
            numbers = int(env["RANK"]), int(local_rank), int(env["WORLD_SIZE"])
        except ValueError:
            numbers = (0, 0, 0)
        if numbers[2] < 1:
            names = "RANK, LOCAL_RANK and WORLD_SIZE in the environment"
            raise UserError(f"{names} must be whole numbers: start with torchrun, or unset them")
        return numbers
    if local_rank > 0:
        why = "without RANK and WORLD_SIZE in the environment"
        raise UserError(f"local rank {local_rank} {why}: start several processes with torchrun")
    return 0, 0, 1


def init(local_rank: int, timeout_minutes: float = 30) -> torch.device:
    """Choose the device of this process and join the others: nccl on GPUs, gloo on CPUs.

    Raises UserError if there are too few GPUs, or if the announced processes do not come.
    """
    global _control_group
    _, local_rank, announced = launcher_env(local_rank)
    device, gpu = torch.device("cpu"), None
    if torch.cuda.is_available():
        # All processes of this machine, so that each of them finds the mistake.
        needed = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if needed > (gpus := torch.cuda.device_count()):
            raise UserError(f"{needed} processes need {needed} GPUs, this machine has {gpus}")
        device = gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
    if announced == 1:
        return device
    timeout = timedelta(minutes=timeout_minutes)
    try:
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=gpu)
    except (ValueError, dist.DistError) as error:
        what = f"{announced} processes are announced, but they cannot join"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({reason}): start them with torchrun") from error
    _control_group = dist.new_group(backend="gloo", timeout=timeout)
    return device


def shutdown() -> None:
    """Leave the other processes. Does nothing in a single process."""
    global _control_group
    _control_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def describe_device(device: torch.device) -> str:
    """The device of this process in words, and the number of processes."""
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return name if world_size() == 1 else f"{world_size()} processes, each {name}"


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The maximum of `value` over all processes, without waiting for a GPU."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control_group)
    return int(tensor)


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every process. All of them raise its UserError."""
    if world_size() == 1:
        return make()
    answer = [None]
    if is_main():
        try:
            answer = [make()]
        except UserError as error:
            answer = [error]
    dist.broadcast_object_list(answer, group=_control_group)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
