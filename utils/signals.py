"""Signals as requests to save or to stop, which the training loop answers between two steps."""

import os
import signal
from contextlib import suppress

from utils import dist_util

SAVE = 1  # a request to stop is 128 + the signal, its exit status
WORKER_GRACE = 120  # seconds: an evaluation may still need its workers
LAUNCHER = os.getppid()  # if there is one
SIGUSR1, SIGHUP = getattr(signal, "SIGUSR1", None), getattr(signal, "SIGHUP", None)  # not Windows


class Interrupted(Exception):
    """The run was asked to stop, and is saved; `advice` says how it continues."""

    def __init__(self, status: int, advice: str):
        self.status = status
        super().__init__(f"stopped by {signal.Signals(status - 128).name}; {advice}")


class StopRequest:
    """SIGUSR1 asks to save; SIGINT, SIGTERM and SIGHUP (a closed terminal) to save and stop.

    A second SIGINT or SIGTERM ends the process at once, unless a launcher started it: launchers
    repeat what a scheduler has sent to every process, and themselves end a process that hangs.
    """

    def __init__(self):
        self.save, self.stop = 0, 0
        self.sent = lambda: 0  # what was asked for after the last step; it arrives at the next
        self.rank = os.environ.get("RANK")  # None without a launcher
        numbers = {signal.SIGINT, signal.SIGTERM, SIGUSR1, SIGHUP} - {None}
        if SIGHUP and signal.getsignal(SIGHUP) == signal.SIG_IGN:  # nohup's
            numbers.remove(SIGHUP)
        self.previous = {number: signal.signal(number, self._note) for number in numbers}

    def take(self) -> int:
        """0 for nothing, SAVE, or 128 + the first signal that asked to stop.

        A request to save is returned once, a request to stop every time. A launcher that was
        killed can send no signal: its processes stop as if it had sent SIGTERM.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER:
            self.stop = self.stop or 128 + signal.SIGTERM
        asked, self.save = self.stop or self.save, 0
        return asked

    def agreed(self, wait: bool) -> int:
        """What the processes were asked for, the same on all of them.

        Several processes learn of it one step later, so that no step waits for the network, unless
        they `wait` for it. The highest request counts.
        """
        sent, self.sent = self.sent, dist_util.start_all_reduce_max(self.take())
        asked = sent()
        if wait or asked > SAVE or dist_util.world_size() == 1:
            asked, self.sent = max(asked, self.sent()), lambda: 0
        return asked

    def _note(self, number: int, frame) -> None:
        if number == SIGUSR1:
            self.save = SAVE
            return
        if self.rank is None and number != SIGHUP:  # a closing terminal may send two SIGHUPs
            signal.signal(number, signal.SIG_DFL)
        if not self.stop and self.rank in (None, "0"):
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step or evaluation\n")  # print may be busy
        self.stop = self.stop or 128 + number

    def close(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def leave_to_main(*_) -> None:
    """For data workers: only the main process answers signals, and it needs them for its step.

    A worker leaves the process group, which a terminal or a launcher signals. SIGTERM, which a
    scheduler sends to every process and Python to left-over workers, ends it after a while.
    """
    for number in {signal.SIGINT, SIGUSR1, SIGHUP} - {None}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # Windows has neither groups nor alarms
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
