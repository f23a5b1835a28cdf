"""Train on two machines, break one or the cable between them, and compare the end with one host's.

A machine is a name, an address and a loopback of its own: namespaces of Linux. Each one runs the
torchrun of docs/clusters.md, and they share a folder. Needs root and iproute2.

python3 -m tests.two_machines    # some minutes; test_clusters.py runs a short form
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import torch

from models.checkpoints import load_torch
from tests.helpers import ROOT, words
from utils.checkpoint import RunPaths

HOSTS = {"node0": "10.77.0.1", "node1": "10.77.0.2"}
TORCHRUN = words(
    "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
    "--rdzv_id job --max-restarts 3"
)
FLAGS = words(
    "--name run --resume auto --dataset digits --model_type ViT-Mini_8 --img_size 8 "
    "--pretrained_dir none --warmup_steps 2 --train_batch_size 16 --eval_batch_size 360 "
    "--num_steps 60 --save_every 10 --eval_every 30"
)
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
ENV["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/clusters.md
# What a machine does: it gets ready, and is there until the script that started it ends.
BOOT = """
echo {name} > /proc/sys/kernel/hostname
mount --bind {hosts} /etc/hosts
ip link set lo up
echo ready
exec cat
"""
LIMIT = 150  # seconds for one run


def missing() -> str:
    """Why no two machines can be made here; empty if they can."""
    tools = [tool for tool in ("ip", "unshare", "nsenter", "mount") if not shutil.which(tool)]
    if tools:
        return f"not installed: {', '.join(tools)} (packages iproute2, util-linux, mount)"
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "type", "veth"]
    made = subprocess.run(probe, capture_output=True, text=True)
    why = f"namespaces and virtual cables need root: {made.stderr.strip()}"
    return why if made.returncode else ""


class Machines:
    """Two machines and their cable, which are gone after the `with` block."""

    def __init__(self):
        self.holders, self.launchers, self.logs = [], [], []

    def __enter__(self):
        try:
            with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
                lines = [f"{address} {name}\n" for name, address in HOSTS.items()]
                hosts.write("127.0.0.1 localhost\n" + "".join(lines))
                hosts.flush()
                for name in HOSTS:
                    boot = ["sh", "-ec", BOOT.format(name=name, hosts=hosts.name)]
                    command = ["unshare", "--net", "--uts", "--mount", *boot]
                    self.holders.append(subprocess.Popen(command, stdin=PIPE, stdout=PIPE))
                    assert self.holders[-1].stdout.readline() == b"ready\n", name
            peer = ["peer", "name", "cable", "netns", str(self.holders[1].pid)]
            self.call(0, "ip", "link", "add", "cable", "type", "veth", *peer)
            for machine, address in enumerate(HOSTS.values()):
                self.call(machine, "ip", "address", "add", f"{address}/24", "dev", "cable")
                self.plug(machine, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for machine, holder in enumerate(self.holders):
            self.kill(machine)
            holder.communicate()

    def enter(self, machine: int, folder: Path, command: list[str]) -> list[str]:
        inside = ["nsenter", "--net", "--uts", "--mount", "--target"]
        moved = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]  # nsenter leaves the folder
        return [*inside, str(self.holders[machine].pid), *moved, *command]

    def call(self, machine: int, *command: str) -> None:
        subprocess.run(self.enter(machine, Path("/"), list(command)), check=True)

    def plug(self, machine: int, state: str) -> None:
        """Plug the cable in (`up`), or pull it out (`down`)."""
        self.call(machine, "ip", "link", "set", "cable", state)

    def pids(self, machine: int) -> list[int]:
        """The processes of a machine."""
        network = os.readlink(f"/proc/{self.holders[machine].pid}/ns/net")
        if network == os.readlink("/proc/self/ns/net"):
            return []  # it is not set up yet: these would be the processes of the host
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # a process that has just ended
                found += [int(folder.name)] if os.readlink(folder / "ns/net") == network else []
        return [pid for pid in found if pid != self.holders[machine].pid]

    def worker(self, machine: int) -> int:
        """The training process of a machine."""
        for pid in self.pids(machine):
            with suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
        raise AssertionError(f"no worker on machine {machine}")

    def kill(self, machine: int) -> None:
        """Every process of a machine, as if its power failed."""
        while pids := self.pids(machine):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for launcher in filter(None, self.launchers):
                launcher.poll()  # so that its process disappears
            time.sleep(0.01)

    def start(self, machine: int, folder: Path, flags: list[str]) -> None:
        """Run the command of docs/clusters.md in the shared `folder`."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN]
        command = self.enter(machine, folder, [*torchrun, str(ROOT / "train.py"), *FLAGS, *flags])
        self.logs[machine] = folder / f"{machine}_{time.monotonic_ns()}.log"
        with open(self.logs[machine], "w") as log:
            options = {"stdin": DEVNULL, "stdout": log, "stderr": STDOUT, "env": os.environ | ENV}
            self.launchers[machine] = subprocess.Popen(command, **options)

    def train(self, folder: Path, event: Callable | None = None, flags: str = "") -> int:
        """Train to the end; returns how often the commands were repeated after a failure.

        `event(self, again)` comes after the first save; `again(machine)` starts a machine again.
        """
        last, repeats = RunPaths(folder / "output", "run").last, 0
        self.launchers, self.logs = [None, None], [None, None]

        def again(machine: int) -> None:
            self.start(machine, folder, words(flags))

        for machine in (0, 1):
            again(machine)
        if event:
            wait_until(last.exists, self)
            event(self, again)
        while any([launcher.wait(LIMIT) for launcher in self.launchers]):
            repeats += 1
            assert repeats < 4, self.tails()
            for machine in (0, 1):
                again(machine)
        return repeats

    def tails(self) -> str:
        """The end of what both launchers have printed."""
        return "\n".join(str(log) + ":\n" + log.read_text()[-3000:] for log in self.logs)


def wait_until(condition: Callable[[], bool], machines: Machines) -> None:
    """Wait for something that a run does before its end."""
    end = time.monotonic() + LIMIT
    while not condition():
        alive = [launcher.poll() is None for launcher in machines.launchers]
        assert all(alive) and time.monotonic() < end, machines.tails()
        time.sleep(0.05)


def kill_worker(machine: int) -> Callable:
    def event(machines: Machines, again: Callable) -> None:
        os.kill(machines.worker(machine), signal.SIGKILL)

    return event


def kill_machine(machine: int) -> Callable:
    def event(machines: Machines, again: Callable) -> None:
        machines.kill(machine)
        machines.launchers[machine].wait()
        again(machine)
        if machine == 0:  # it hosted the rendezvous: the other launcher ends, and starts again
            assert machines.launchers[1].wait(LIMIT) != 0
            again(1)

    return event


def kill_launcher(machine: int) -> Callable:
    """Its process lives on, to save and stop, while the launcher is started again."""

    def event(machines: Machines, again: Callable) -> None:
        machines.launchers[machine].kill()
        machines.launchers[machine].wait()
        again(machine)
        if machine == 0:  # as above
            assert machines.launchers[1].wait(LIMIT) != 0
            again(1)

    return event


def pull_cable(machines: Machines, again: Callable) -> None:
    """For some seconds, in which the run stands still."""
    machines.plug(0, "down")
    time.sleep(1)  # what was on its way has arrived
    folder = machines.logs[0].parent
    before = saves(folder)
    time.sleep(4)
    assert saves(folder) == before, "the run goes on without a cable"
    machines.plug(0, "up")


def pull_cable_until_timeout(more: float) -> Callable:
    """Until both processes have waited for longer than --timeout, and for some seconds more."""

    def event(machines: Machines, again: Callable) -> None:
        machines.plug(0, "down")
        wait_until(lambda: all("Timed out" in log.read_text() for log in machines.logs), machines)
        time.sleep(more)
        machines.plug(0, "up")

    return event


SCENARIOS = {  # name: event, flags; all but two are resumed from a save
    "nothing happens": (None, ""),
    "the process of machine 1 is killed": (kill_worker(1), ""),
    "the process of machine 0 is killed": (kill_worker(0), ""),
    "the launcher of machine 1 is killed": (kill_launcher(1), ""),
    "the launcher of machine 0 is killed": (kill_launcher(0), ""),
    "machine 1 dies and starts again": (kill_machine(1), ""),
    "machine 0 dies, and both start again": (kill_machine(0), ""),
    "the cable is out for five seconds": (pull_cable, ""),
    "the cable is out until --timeout": (pull_cable_until_timeout(0), "--timeout 0.2"),
    # The launchers lose each other after a minute.
    "the cable is out for 70 s more": (pull_cable_until_timeout(70), "--timeout 0.2"),
}


def saves(folder: Path) -> int:
    """The time of the last save."""
    return RunPaths(folder / "output", "run").last.stat().st_mtime_ns


def train_on_one_host(folder: Path) -> None:
    """The run that all scenarios are to equal: two processes without a cable between them."""
    torchrun = words("-m torch.distributed.run --standalone --nproc_per_node 2")
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *FLAGS]
    options = {"cwd": folder, "env": os.environ | ENV, "timeout": LIMIT}
    ended = subprocess.run(command, capture_output=True, text=True, **options)
    assert ended.returncode == 0, ended.stderr


def assert_same_end(one: Path, two: Path) -> None:
    """Both runs have the same last step, figures, parameters, optimizer and best weights."""
    a, b = (load_torch(RunPaths(folder / "output", "run").last) for folder in (one, two))
    del a["state"]["seconds"], b["state"]["seconds"]
    assert a["state"] == b["state"], (a["state"], b["state"])
    for key, value in a["precision"]["parameters"].items():
        assert torch.equal(value, b["precision"]["parameters"][key]), key
    for key, slots in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(slots["momentum_buffer"], other), key
    best = [load_torch(RunPaths(folder / "output", "run").best) for folder in (one, two)]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]


def play(names: list[str], folder: Path) -> None:
    """Play the scenarios, and print a line for each. Raises AssertionError."""
    (folder / "one").mkdir()
    train_on_one_host(folder / "one")
    with Machines() as machines:
        for name in names:
            start, event, flags = time.monotonic(), *SCENARIOS[name]
            shared = folder / name.replace(" ", "_")
            shared.mkdir()
            repeats = machines.train(shared, event, flags)
            resumed = "resumed: output/run_last.pt" in machines.logs[0].read_text()
            assert resumed == (event not in (None, pull_cable)), machines.tails()
            assert_same_end(folder / "one", shared)
            seconds = time.monotonic() - start
            commands = f"commands repeated {repeats} times, " if repeats else ""
            print(f"{name}: {commands}{seconds:.0f} s, the same bits as on one host", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = {"choices": SCENARIOS, "default": list(SCENARIOS), "metavar": "SCENARIO"}
    parser.add_argument("--only", nargs="+", help=", ".join(map(repr, SCENARIOS)), **names)
    args = parser.parse_args()
    if why := missing():
        sys.exit(f"two machines cannot be made here: {why}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    with tempfile.TemporaryDirectory() as folder:
        play(args.only, Path(folder))


if __name__ == "__main__":
    main()
