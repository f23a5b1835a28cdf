"""One run in several processes: rank, world size and device, and what the processes exchange."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import RunError, UserError
from utils.hardware import choose_device

T = TypeVar("T")
_control_group = None  # gloo, for numbers that only the CPU needs
# What torchrun sets, and where Slurm's srun has it.
SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",
}


def adopt_slurm() -> None:
    """Set torchrun's variables from those of Slurm, in one of several processes of `srun`.

    A batch script has SLURM_PROCID and SLURM_NTASKS, too, but is no process of `srun`.
    """
    env = os.environ
    batch = "SLURM_JOB_ID" in env and "SLURM_STEP_NUM_TASKS" not in env
    several = "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1"
    if several and "RANK" not in env and not batch:
        found = {name: env[slurm] for name, slurm in SLURM.items() if slurm in env}
        if text := found.pop("LOCAL_WORLD_SIZE", None):  # 4(x2),3: 4, 4 and 3 on three machines
            groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
            counts = [count for count, machines in groups for _ in range(int(machines or 1))]
            found["LOCAL_WORLD_SIZE"] = counts[int(env.get("SLURM_NODEID", 0))]
        env.update(found)


def launcher_env(local_rank: int = -1) -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment, which the launcher sets.

    `local_rank` is the argument of older launchers, and the environment wins over it.
    (0, 0, 1) without a launcher. Raises UserError if the environment makes no sense.
    """
    adopt_slurm()
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


def init(local_rank: int, timeout_minutes: float = 30, device: str = "auto") -> torch.device:
    """Choose the device of this process and join the others: nccl on GPUs, gloo on CPUs.

    `device` is one of hardware.DEVICES. Raises UserError if there are too few GPUs, or if the
    announced processes do not come.
    """
    global _control_group
    _, local_rank, announced = launcher_env(local_rank)
    device, gpu = choose_device(device, several=announced > 1), None
    if device.type == "cuda":
        # All processes of this machine, so that each of them finds the mistake.
        needed = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        gpus = torch.cuda.device_count()
        if gpus == 1 and "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
            local_rank, needed = 0, 1  # `srun --gpus-per-task` shows each process its own
        if needed > gpus:
            raise UserError(f"{needed} processes need {needed} GPUs, this machine has {gpus}")
        device = gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
    if announced == 1:
        return device
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps the store when it starts the processes of one machine again, and they
            # would find the addresses of those that have ended (pytorch/pytorch issue 167288).
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        options = {"store": store, "rank": own_rank, "world_size": size, "timeout": timeout}
        dist.init_process_group("nccl" if gpu else "gloo", **options, device_id=gpu)
        _control_group = dist.new_group(backend="gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:  # gloo's own errors are plain RuntimeErrors
        what = f"{announced} processes are announced, but they cannot join"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({reason}): start them as in docs/clusters.md") from error
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
    names = {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "Apple GPU"}
    name = names.get(device.type) or torch.cuda.get_device_name(device)
    return name if world_size() == 1 else f"{world_size()} processes, each {name}"


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Take the values of rank 0, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def start_all_reduce_max(value: int) -> Callable[[], int]:
    """Begin to find the maximum of `value` over all processes; the result waits for it.

    No GPU is waited for.
    """
    if world_size() == 1:
        return lambda: value
    tensor = torch.tensor(value)
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control_group, async_op=True)

    def finish() -> int:
        work.wait()
        return int(tensor)

    return finish


def all_reduce_max(value: int) -> int:
    """The maximum of `value` over all processes, without waiting for a GPU."""
    return start_all_reduce_max(value)()


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every process. All of them raise its error.

    That is a UserError, RunError or OSError: any other is a bug, and ends rank 0 alone.
    """
    if world_size() == 1:
        return make()
    answer = [None]
    if is_main():
        try:
            answer = [make()]
        except (UserError, RunError, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, group=_control_group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
