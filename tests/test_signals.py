"""Signals as requests, each sent to a real process."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from signal import SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1
from subprocess import DEVNULL, PIPE

import pytest

from tests.helpers import ROOT
from utils import dist_util
from utils.signals import SAVE, StopRequest

# Prints what is asked for after each signal that it handles.
LISTENER = """
import os, time
from utils.signals import StopRequest
class Listener(StopRequest):
    def _note(self, *signal):
        super()._note(*signal)
        os.write(1, f"{self.take()}\\n".encode())
Listener()
print("ready", flush=True)
time.sleep(60)
"""

# Decodes slowly in two data workers, and ends with all images.
WORKERS = """
import os, time
from torch.utils.data import DataLoader
from utils.signals import StopRequest, leave_to_main
class Images(list):
    def __getitem__(self, i):
        time.sleep(0.1)
        return i, os.getpid()
request = StopRequest()
loader = DataLoader(Images(range(20)), 1, num_workers=2, worker_init_fn=leave_to_main)
for i, (index, pid) in enumerate(loader):
    assert int(index) == i
    if i < 2: print(int(pid), flush=True)
print("end", request.take(), flush=True)
"""

# A data worker whose main process is gone.
LEFT_OVER = """
import time
from utils import signals
signals.WORKER_GRACE = 1
signals.leave_to_main()
print("ready", flush=True)
time.sleep(60)
"""


def start(code, *prefix):
    """A process that runs `code`, and the first line that it prints."""
    command = [*prefix, sys.executable, "-c", code]
    streams = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    return process, process.stdout.readline()


def end(process):
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()


@pytest.mark.parametrize(
    "prefix, signals",
    [
        # (signal, what is then asked for; "" if the process ends, None if it does nothing)
        ("", [(SIGINT, 130), (SIGINT, "")]),
        ("", [(SIGTERM, 143), (SIGTERM, "")]),
        # The first reason to stop counts, and a closing terminal may send two SIGHUPs.
        ("", [(SIGUSR1, 1), (SIGHUP, 129), (SIGHUP, 129), (SIGTERM, 129), (SIGTERM, "")]),
        # A scheduler signals every process, and torchrun then passes its own signal on.
        ("env RANK=0", [(SIGTERM, 143), (SIGTERM, 143)]),
        ("env RANK=1", [(SIGTERM, 143), (SIGTERM, 143)]),
        ("nohup", [(SIGHUP, None), (SIGINT, 130), (SIGINT, "")]),
    ],
)
def test_the_first_signal_is_a_request_and_a_second_may_end(prefix, signals):
    process, _ = start(LISTENER, *prefix.split())
    for number, answer in signals:
        process.send_signal(number)
        assert answer is None or process.stdout.readline().strip() == str(answer)
    if answer:
        process.kill()
    _, err = end(process)
    assert process.returncode == -(signal.SIGKILL if answer else number)
    line = "\nstopping after this step or evaluation\n"
    assert err == ("" if prefix.endswith("1") else line)


def test_a_save_is_asked_for_once_and_a_stop_is_not_forgotten():
    before = signal.getsignal(SIGUSR1), signal.getsignal(SIGTERM)
    with closing(StopRequest()) as request:
        os.kill(os.getpid(), SIGUSR1)
        assert [request.agreed(wait=False) for _ in range(2)] == [SAVE, 0]
        os.kill(os.getpid(), SIGUSR1)
        os.kill(os.getpid(), SIGTERM)
        assert [request.agreed(wait=False) for _ in range(2)] == [128 + SIGTERM] * 2
    assert (signal.getsignal(SIGUSR1), signal.getsignal(SIGTERM)) == before


def test_several_processes_learn_of_a_request_one_step_later(monkeypatch):
    """Unless they wait for it."""
    others = iter([SAVE, 0, 0, 143, 143, 0])

    def start(own):
        highest = max(own, next(others))
        return lambda: highest

    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "start_all_reduce_max", start)
    with closing(StopRequest()) as request:
        asked = [request.agreed(wait) for wait in (False, False, False, True, False, False)]
    assert asked == [0, SAVE, 0, 143, 0, 143]


def test_data_workers_survive_a_signal_to_everyone():
    process, line = start(WORKERS)
    pids = [int(line), int(process.stdout.readline())]
    assert len({os.getpgid(pid) for pid in [process.pid, *pids]}) == 3
    for number in (SIGUSR1, SIGINT, SIGHUP, SIGTERM):
        for pid in [process.pid, *pids]:
            os.kill(pid, number)
    out, err = end(process)
    assert process.returncode == 0 and err.count("stopping") == 1, err
    assert out in ("end 129\n", "end 130\n", "end 143\n")  # any may be first
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_left_over_worker_ends_a_while_after_sigterm():
    process, _ = start(LEFT_OVER)
    for number in (SIGUSR1, SIGINT, SIGHUP, SIGTERM):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    end(process)
    assert process.returncode == -SIGALRM
