"""How a script ends: with a status, and one line on stderr in place of a traceback."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from utils.allocator import out_of_memory
from utils.files import SaveError


def status_of(
    program: str,
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None,
    mistakes: tuple[type[Exception], ...],
) -> int:
    """What `main(argv)` returns (None is 0), 2 for one of the user's `mistakes`, 1 for a failure
    on the way, 128 + the signal for Ctrl-C. Anything else is a bug, and its traceback is shown."""
    try:
        return main(argv) or 0
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
        if not (reason := out_of_memory(error)):
            raise
        line, status = f"error: out of memory ({reason}): try a smaller batch or --img_size", 1
    print(printable(f"{program}: {line}"), file=sys.stderr)
    return status


def mute_stdout() -> None:
    """Drop what is still to be written there, so that Python's end does not trip over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(name: str) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return name.encode(errors="backslashreplace").decode()
