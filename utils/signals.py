"""Signals as requests: they are noted at once, and met by the training loop between updates."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils import dist_util

NOTHING, SAVE = -1, 0  # any higher number is the signal that asks the run to stop
WORKER_GRACE = 10  # seconds
REPEAT_SECONDS = 2.0  # a launcher and a terminal may both send the same signal
REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was asked to stop and is saved; `status` is the exit status that says so."""

    def __init__(self, number: int, saved: Path):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}, saved in {saved}: the same command with --resume "
                         "goes on")  # fmt: skip
        self.status = 128 + number


class Requests:
    """SIGUSR1 asks for a save; SIGINT, SIGTERM and SIGHUP, which a closed terminal sends, for a
    save and an end, with 130, 143 or 129.

    A second SIGINT or SIGTERM leaves at once. Where nohup has SIGHUP ignored, it stays so. Under a
    launcher (`processes` > 1), which forwards what the terminal has sent already, a repetition
    within two seconds does not count.
    """

    def __init__(self, processes: int = 1):
        self.pending = NOTHING
        self.first_stop = 0.0
        self.patience = REPEAT_SECONDS if processes > 1 else 0.0
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.previous = {number: signal.signal(number, self._note)
                         for number in REQUESTS if number not in ignored}  # fmt: skip

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGUSR1:
            self.pending = max(self.pending, SAVE)
            return
        now = time.monotonic()
        if number == signal.SIGHUP and self.pending > SAVE:
            return  # a shell and the kernel both send it where a terminal closes
        if self.pending > SAVE and now - self.first_stop >= self.patience:
            _tell("second signal: leaving at once")
            os._exit(128 + number)
        if self.pending <= SAVE:
            self.first_stop = now
            if dist_util.speaks():
                _tell(f"{signal.Signals(number).name}: ends after this update or evaluation; a "
                      "second signal leaves at once")  # fmt: skip
        self.pending = max(self.pending, int(number))

    def met(self) -> None:
        """A save that was asked for has been made."""
        if self.pending == SAVE:
            self.pending = NOTHING

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _tell(line: str) -> None:
    """From a signal handler, which may have interrupted a print."""
    with suppress(OSError):  # the terminal may be gone
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


def leave_to_main(*_) -> None:
    """For workers: the main process meets the signals, and needs its workers to end the update.

    A terminal or launcher signals the whole process group, which a worker leaves; a scheduler
    signals every process, so that SIGTERM, which Python also sends to workers that are left over
    at its end, takes effect later.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
