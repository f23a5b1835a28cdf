"""How a script ends: with a status, and one line on stderr in place of a traceback."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import IO

from utils.allocator import out_of_memory
from utils.files import SaveError


def status_of(
    program: str,
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None,
    mistakes: tuple[type[Exception], ...],
) -> int:
    """What `main(argv)` returns (None is 0), or what `ending` says of the error it raises; a bug's
    traceback is shown."""
    open_streams()
    try:
        status = main(argv) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        mute(sys.stdout)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        known = ending(error, mistakes)
        if known is None:
            raise
        if refused(error) and not error.filename and not isinstance(error, SaveError):
            mute(sys.stdout)  # which is full, most likely
    line, status = known
    complain(f"{program}: {line}")
    return status


def open_streams() -> None:
    """Where the shell has closed the output or the errors, which Python calls None: nobody wants
    to read them."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")  # noqa: SIM115
                              for stream in (sys.stdout, sys.stderr))  # fmt: skip


def ending(
    error: BaseException,
    mistakes: tuple[type[Exception], ...],
    failures: tuple[type[Exception], ...] = (SaveError,),
    memory: str = "try a smaller batch or --img_size",
) -> tuple[str, int] | None:
    """(line, status) that a script ends with: 2 for one of the user's `mistakes` or a file that may
    not be opened, 1 for a failure on the way, 128 + the signal for Ctrl-C. None for a bug.

    `memory` is what to do where there is too little of it.
    """
    if isinstance(error, mistakes):
        return f"error: {error}", 2
    if isinstance(error, failures):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", 128 + signal.SIGINT
    if reason := out_of_memory(error):
        return f"error: out of memory ({reason}): {memory}", 1
    if reason := refused(error):
        return f"error: {reason}", 2 if error.filename else 1
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return ("error: a process that decodes images was killed: lower --num_workers, or give the "
                "machine more memory (a container, --shm-size)"), 1  # fmt: skip
    return None


def refused(error: BaseException) -> str | None:
    """What the operating system refuses, and for which file; None for any other error."""
    if not isinstance(error, OSError) or not error.errno:
        return None
    if error.filename is None:  # not an open file's: the standard output's, most likely
        return f"the system refuses: {os.strerror(error.errno)}"
    return f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"


def complain(line: str) -> None:
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone
        mute(sys.stderr)


def mute(stream: IO) -> None:
    """Drop what is still to be written there, so that Python's end does not trip over it and
    change the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(name: str) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return name.encode(errors="backslashreplace").decode()
