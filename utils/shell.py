"""How a script ends: with a status, and one line on stderr in place of a traceback."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from utils.allocator import out_of_memory
from utils.files import SaveError


def status_of(
    program: str,
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None,
    mistakes: tuple[type[Exception], ...],
) -> int:
    """What `main(argv)` returns (None is 0), 2 for one of the user's `mistakes` or a file that may
    not be opened, 1 for a failure on the way, 128 + the signal for Ctrl-C. Anything else is a bug,
    and its traceback is shown."""
    try:
        status = main(argv) or 0
        if sys.stdout:
            sys.stdout.flush()
        return status
    except mistakes as error:
        line, status = f"error: {error}", 2
    except SaveError as error:
        line, status = f"error: {error}", 1
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        mute_stdout()
        return 0
    except KeyboardInterrupt:
        line, status = "stopped by SIGINT", 128 + signal.SIGINT
    except Exception as error:
        if reason := out_of_memory(error):
            line, status = f"error: out of memory ({reason}): try a smaller batch or --img_size", 1
        elif reason := refused(error):
            line, status = f"error: {reason}", 2 if error.filename else 1
            if not error.filename:  # the standard output's, most likely, which is full
                mute_stdout()
        else:
            raise
    complain(f"{program}: {line}")
    return status


def refused(error: Exception) -> str | None:
    """What the operating system refuses, and for which file; None for any other error."""
    if not isinstance(error, OSError) or not error.errno:
        return None
    if error.filename is None:  # not an open file's: the standard output's, most likely
        return f"the system refuses: {os.strerror(error.errno)}"
    return f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"


def complain(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(printable(line), file=sys.stderr, flush=True)


def mute_stdout() -> None:
    """Drop what is still to be written there, so that Python's end does not trip over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(name: str) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return name.encode(errors="backslashreplace").decode()
