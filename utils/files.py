"""Safe files: written completely or not at all, and locked by one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import RunError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends well.

    It keeps the suffix, by which libraries choose the format. If `path` is a symbolic link, its
    target is replaced. Raises RunError, with the old file intact, if the disk is full or refuses.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device is not replaced
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the rename survives a power cut only once the folder is on the disk
    except OSError as error:
        if error.filename and Path(error.filename) not in (temporary, path, path.parent):
            raise  # of another file, inside the block
        reason = os.strerror(error.errno) if error.errno else str(error)
        old = "the old file is intact" if path.exists() else "no file is left behind"
        raise RunError(f"{path} could not be written ({reason}); {old}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: str | Path) -> Iterator[None]:
    """Hold the lock file `path` during the block. Raises BlockingIOError if another process does.

    A kill releases the lock. A file system without locks lets every process pass.
    """
    path = Path(path)
    with path.open("a") as file:
        try:
            # lockf belongs to this process alone. flock would also belong to its forked data
            # workers, which may live on for a while after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError | PermissionError):  # POSIX allows either
                raise BlockingIOError(f"{path} is locked") from error
        # The last owner may have removed the file after this process opened it.
        if not path.exists() or not os.path.samefile(path, file.fileno()):
            raise BlockingIOError(f"{path} was removed")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def flush(path: str | Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
